"""Arguments of an ONNX export, checked before any file is read, and the sources that they name."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from loraover.checkpoint.base_model import resolve_base
from loraover.checkpoint.checkpoint import Checkpoint
from loraover.checkpoint.exact_tensors import adapter_of, read_source
from loraover.checkpoint.peft_adapter import AdapterDir, other_tensors
from loraover.common.errors import ConfigError, ExportError
from loraover.models.device import choose_compute
from loraover.models.load import ModelSource
from loraover_export.uniform.refusals import HELD, check_fields, check_no_experts, written_parameters

CHOICES = {"mode": ("merged", "swappable"), "precision": ("fp32", "fp16", "int4"), "device": ("cpu", "cuda")}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class OnnxRequest:
    """Arguments of `export_onnx`, where each is described.

    Raises:
        ConfigError: arguments that contradict one another, or names that cannot be names of files.
    """

    sources: tuple[Path, ...]
    output: Path
    mode: str
    precision: str | None = None
    device: str | None = None
    model: str | None = None
    cache: bool = True
    names: tuple[str, ...] = ()
    graph: Path | None = None
    web: bool = False
    check: bool = True
    check_device: str = "auto"
    compute_dtype: str = "fp32"
    force: bool = False

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            found = getattr(self, name)
            if found is not None and found not in known:
                raise ConfigError(f"--{name}: found {found!r}, expected one of {', '.join(known)}.")
        if not self.sources:
            raise ConfigError("SOURCE: expected one adapter at least, found none.")
        if self.mode == "merged" and len(self.sources) != 1:
            raise ConfigError(
                f"--mode merged takes one SOURCE, found {len(self.sources)}; export each alone, or use swappable."
            )
        if self.graph is not None and self.mode != "swappable":
            raise ConfigError("--graph adds adapters to a swappable graph; use it with --mode swappable.")
        if self.web and self.mode != "swappable":
            raise ConfigError(
                "--web makes the LoRA inputs of a swappable graph required; use it with --mode swappable. A merged "
                "graph runs in onnxruntime-web as it is."
            )
        if self.web and self.device not in (None, "cpu"):
            raise ConfigError(f"--web is for onnxruntime-web's CPU operators, found --device {self.device}.")
        if self.names and self.mode != "swappable":
            raise ConfigError("--name names the files of swappable adapters; use it with --mode swappable.")
        if self.names and len(self.names) != len(self.sources):
            raise ConfigError(f"--name is given {len(self.names)} times for {len(self.sources)} sources.")
        if self.mode == "swappable":
            _check_names(self.adapter_names)
        if self.check:
            choose_compute(self.check_device, self.compute_dtype)
        elif (self.check_device, self.compute_dtype) != ("auto", "fp32"):
            raise ConfigError("--check-device and --compute-dtype are for the check, which --no-check leaves out.")

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """Names of the adapters, which are those of a swappable graph's files, in the order of the sources."""
        return self.names or tuple(source.resolve().name for source in self.sources)

    def command(self) -> str:
        """Return the command line for the model card, without --force, which depends on what was at the output."""
        words = ["loraover", "export", "onnx", *map(str, self.sources), "-o", str(self.output), "--mode", self.mode]
        words += [] if self.precision is None else ["--precision", self.precision]
        words += [] if self.device is None else ["--device", self.device]
        words += [] if self.model is None else ["--model", self.model]
        words += [word for name in self.names for word in ("--name", name)]
        words += [] if self.graph is None else ["--graph", str(self.graph)]
        words += ["--web"] if self.web else []
        words += [] if self.cache else ["--no-cache"]
        if self.check:
            return shlex.join([*words, "--check-device", self.check_device, "--compute-dtype", self.compute_dtype])
        return shlex.join([*words, "--no-check"])


def _check_names(names: tuple[str, ...]) -> None:
    for name in names:
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"{name!r} cannot be the name of an adapter's file; choose one of letters, digits, '.', '_' and '-' "
                "with --name."
            )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"two sources are named {twice[0]!r}; give each another --name, in their order.")


@dataclass(frozen=True)
class Inputs:
    """The sources by name, and their base model.

    Args:
        adapters: checkpoints and adapters, by the names of their files.
        base: the base model.
        task_type: PEFT's name of the task; None if the adapters name none.
    """

    adapters: dict[str, Checkpoint | AdapterDir]
    base: ModelSource
    task_type: str | None


def read_inputs(request: OnnxRequest, say: Callable[[str], None] = lambda line: None) -> Inputs:
    """Read every source and find the base model that they share.

    Args:
        request: the arguments of the export.
        say: receiver of warnings about the base model.

    Raises:
        ConfigError: no base model, or several.
        ExportError: tensors that a graph of this mode cannot hold, or sources of different tasks.
        CheckpointError: files that cannot be trusted.
    """
    adapters = dict(zip(request.adapter_names, map(read_source, request.sources), strict=True))
    dirs = [adapter_of(source) for source in adapters.values()]
    for adapter in dirs:
        adapter.check_keeps_base()
        check_fields(adapter, "run it with PEFT", allowed={*HELD, *written_parameters(adapter)})
        check_no_experts(adapter, "the export to ONNX")
        if request.mode == "swappable":
            check_swappable(adapter)
    tasks = {adapter.config.task_type for adapter in dirs}
    if len(tasks) > 1:
        raise ExportError(f"the sources were trained for different tasks ({', '.join(sorted(map(str, tasks)))}).")
    base = resolve_base(dirs, request.model, option="--model", say=say)
    return Inputs(adapters, base, tasks.pop())


def check_swappable(adapter: AdapterDir) -> None:
    """Raise ExportError unless a swappable graph can take the adapter as inputs."""
    others = other_tensors(adapter)
    if others:
        raise ExportError(
            f"{adapter.tensors_path}: also holds {next(iter(others))}, which replaces a parameter of the base model; a "
            "swappable adapter holds A and B only. Use --mode merged."
        )
    embeddings = [name for name in adapter.sites if name.rpartition(".")[2].startswith("lora_embedding")]
    if embeddings:
        raise ExportError(
            f"{adapter.tensors_path}: {embeddings[0]} adapts an embedding, which no graph takes as an input; "
            "use --mode merged."
        )
