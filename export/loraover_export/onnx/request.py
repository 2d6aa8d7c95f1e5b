"""What an ONNX export is asked for, checked before anything large is read."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from loraover.checkpoint.base_model import resolve_base
from loraover.checkpoint.checkpoint import Checkpoint
from loraover.checkpoint.exact_tensors import adapter_of, read_source
from loraover.checkpoint.peft_adapter import AdapterDir
from loraover.common.errors import ConfigError, ExportError
from loraover.models.load import ModelSource
from loraover_export.numerics.delta import other_tensors

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class OnnxRequest:
    """What the command was asked for.

    Args:
        sources: LoRA-Over checkpoints, folded adapters or PEFT LoRAs; one for a merged graph.
        mode: merged or swappable.
        precision: fp32, fp16 or int4.
        device: cpu or cuda.
        base: base model, folder or hub name; None means the adapters'.
        cache: give a language model's graph a KV cache.
        names: of the adapters, in the order of the sources; empty means their folders'.
        graph: folder of a swappable export that only new adapters are wanted for.
        check: run ONNX Runtime against PyTorch.
        force: replace an export that lies at the output.
    """

    sources: tuple[Path, ...]
    output: Path
    mode: str
    precision: str = "fp32"
    device: str = "cpu"
    base: str | None = None
    cache: bool = True
    names: tuple[str, ...] = ()
    graph: Path | None = None
    check: bool = True
    force: bool = False

    def command(self) -> str:
        """The command line, for the model card; without --force, which is about what lay at the output."""
        words = ["loraover-export", "onnx", *map(str, self.sources), "-o", str(self.output), "--mode", self.mode]
        words += ["--precision", self.precision, "--device", self.device]
        words += [] if self.base is None else ["--base", self.base]
        words += [word for name in self.names for word in ("--name", name)]
        words += [] if self.graph is None else ["--graph", str(self.graph)]
        words += [] if self.cache else ["--no-cache"]
        return shlex.join(words if self.check else [*words, "--no-check"])


@dataclass(frozen=True)
class Inputs:
    """The sources by name, and their base model."""

    adapters: dict[str, Checkpoint | AdapterDir]
    base: ModelSource
    task_type: str | None


def read_inputs(request: OnnxRequest, say: Callable[[str], None] = lambda line: None) -> Inputs:
    """Read every source and find the base model that they share.

    Args:
        say: told a warning about the base model.

    Raises:
        ConfigError: options that contradict one another, or no base model, or several.
        ExportError: what the mode cannot hold, or sources of different tasks.
        CheckpointError: files that cannot be trusted.
    """
    _check_options(request)
    adapters = dict(zip(_names(request), map(read_source, request.sources), strict=True))
    dirs = [adapter_of(source) for source in adapters.values()]
    for adapter in dirs:
        adapter.check_keeps_base()
        if request.mode == "swappable":
            _check_swappable(adapter)
    tasks = {(adapter.config.model_extra or {}).get("task_type") for adapter in dirs}
    if len(tasks) > 1:
        raise ExportError(f"the sources were trained for different tasks ({', '.join(sorted(map(str, tasks)))}).")
    task = tasks.pop()
    base = resolve_base(dirs, request.base, option="--base", say=say)
    return Inputs(adapters, base, task if isinstance(task, str) else None)


def _check_options(request: OnnxRequest) -> None:
    if request.mode == "merged" and len(request.sources) != 1:
        raise ConfigError(
            f"--mode merged takes one SOURCE, found {len(request.sources)}; export each by itself, or use swappable."
        )
    if request.graph is not None and request.mode != "swappable":
        raise ConfigError("--graph adds adapters to a swappable graph; it goes with --mode swappable.")
    if request.names and len(request.names) != len(request.sources):
        raise ConfigError(f"--name is given {len(request.names)} times for {len(request.sources)} sources.")


def _names(request: OnnxRequest) -> list[str]:
    names = list(request.names) or [source.resolve().name for source in request.sources]
    for name in names:
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"{name!r} is no name for an adapter's file; choose one of letters, digits, '.', '_' and '-' "
                "with --name."
            )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"two sources are named {twice[0]!r}; give each its own --name, in their order.")
    return names


def _check_swappable(adapter: AdapterDir) -> None:
    others = other_tensors(adapter)
    if others:
        raise ExportError(
            f"{adapter.tensors_path}: also holds {others[0]}, which replaces a parameter of the base model; a "
            "swappable adapter holds A and B only. Use --mode merged."
        )
    embeddings = [name for name in adapter.sites if name.rpartition(".")[2].startswith("lora_embedding")]
    if embeddings:
        raise ExportError(
            f"{adapter.tensors_path}: {embeddings[0]} adapts an embedding, which no graph takes as an input; "
            "use --mode merged."
        )
