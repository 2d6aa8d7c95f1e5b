"""How each engine of the matrix gets an adapter: as PEFT saved it, or as this package exports it.

An engine of verify's registry whose own `start` exports the adapter is in the matrix without a line here. A line in
`PEFT_FORM` says what its users give it without this package; one in `OUR_FORM` replaces its `start`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from transformers import AutoModelForCausalLM

from loraover.checkpoint.tensor_file import open_tensors
from loraover.common.errors import EngineError, ExportError
from loraover_export import export_gguf, export_onnx, export_vllm
from loraover_export.gguf import llamacpp
from loraover_export.gguf.llamacpp import LlamaCpp
from loraover_serve.engines.onnx import OnnxArm, OnnxEngine
from loraover_serve.verify.answers import ADAPTER, BASE
from loraover_serve.verify.engines import ENDPOINT, ENGINES, engine_class
from loraover_serve.verify.engines.base import LogitEngine, Setting, VerifyEngine
from loraover_serve.verify.engines.onnx import Onnx
from loraover_serve.vllm.server import VllmServer, VllmServerConfig, serve_vllm

from support.compatibility import PEFT
from support.gguf_base import ARCHITECTURES, INTERLEAVED, head_size, interleaved, write_base
from support.vllm_command import vllm_command


@dataclass(frozen=True)
class Running:
    """Servers that run until the last cell is judged, one for each base model.

    Args:
        folder: folder for their logs.
        until: stack that stops them.
        servers: servers by the location of their base model.
    """

    folder: Path
    until: ExitStack
    servers: dict[str, VllmServer] = field(default_factory=dict)

    def vllm(self, base: str) -> VllmServer:
        if base not in self.servers:
            config = VllmServerConfig(
                model=base,
                max_lora_rank=8,
                dtype="float32",
                runtime_loading=True,
                options=("--max-model-len", "128", "--enforce-eager", "--no-enable-prefix-caching"),
                environment={"VLLM_CPU_KVCACHE_SPACE": "1"},
            )
            log = self.folder / f"vllm-{len(self.servers)}.log"
            self.servers[base] = self.until.enter_context(serve_vllm(config, log, executable=str(vllm_command())))
        return self.servers[base]


Presented = Callable[[Setting, Running], AbstractContextManager[VerifyEngine]]


def uniform(setting: Setting) -> Path:
    """The adapter as `loraover-export vllm` writes it, which is meant to be right on every engine."""
    folder = setting.scratch / "uniform"
    report = export_vllm(setting.adapter, folder, model=setting.base.location, dtype="fp32")
    if not report.passed:
        errors = [found.found for found in report.preflight.findings if found.level == "error"]
        raise ExportError(f"the export refuses the adapter: {'; '.join(errors)}")
    return folder


def peft_in_torch(setting: Setting, running: Running) -> AbstractContextManager[VerifyEngine]:
    return engine_class("torch").start(setting)


def ours_in_torch(setting: Setting, running: Running) -> AbstractContextManager[VerifyEngine]:
    return engine_class("torch").start(replace(setting, adapter=uniform(setting)))


@contextmanager
def peft_in_onnx(setting: Setting, running: Running) -> Iterator[VerifyEngine]:
    """PEFT's tensors, given to the swappable graph without a conversion."""
    graph = setting.scratch / "graph"
    export_onnx(setting.adapter, graph, mode="swappable", model=setting.base.location, names=(ADAPTER,), check=False)
    arms = {BASE: OnnxArm(graph), ADAPTER: OnnxArm(graph, setting.adapter / "adapter_model.safetensors")}
    yield Onnx(OnnxEngine("onnx", arms))


def peft_in_vllm(setting: Setting, running: Running) -> AbstractContextManager[VerifyEngine]:
    return _served(setting, setting.adapter, running)


def ours_in_vllm(setting: Setting, running: Running) -> AbstractContextManager[VerifyEngine]:
    return _served(setting, uniform(setting), running)


@contextmanager
def _served(setting: Setting, adapter: Path, running: Running) -> Iterator[VerifyEngine]:
    """The running server, with an adapter loaded for the length of the block."""
    server, name = running.vllm(setting.base.location), setting.scratch.name
    server.load_adapter(name, adapter)
    try:
        asked = replace(setting, endpoint=server.url, served_name=name, base_name=setting.base.location)
        with engine_class(ENDPOINT).start(asked) as engine:
            engine.version = server.version()
            yield engine
    finally:
        with suppress(EngineError):
            server.unload_adapter(name)


class LlamaCppPair(LogitEngine):
    """llama.cpp with a base model and an adapter of it.

    Args:
        arms: the loaded models.
    """

    def __init__(self, arms: Mapping[str, LlamaCpp]) -> None:
        self._arms, self.version = arms, version("llama-cpp-py-sync")

    def logits(self, arm: str, tokens: Sequence[int]) -> Any:
        return self._arms[arm].logits(tokens)

    @classmethod
    def install(cls, vllm: str) -> str | None:
        return None

    @classmethod
    def start(cls, setting: Setting) -> AbstractContextManager[VerifyEngine]:
        """An adapter as `loraover-export gguf` writes it, on an F32 GGUF file of the base model."""
        file = setting.scratch / "adapter.gguf"
        export_gguf(setting.adapter, file, model=setting.base.location)
        return _llamacpp(setting, file)


@contextmanager
def _llamacpp(setting: Setting, adapter: Path) -> Iterator[VerifyEngine]:
    model = AutoModelForCausalLM.from_pretrained(setting.base.location)
    base = write_base(model, setting.scratch / "base.gguf")
    with LlamaCpp(base, threads=1) as plain, LlamaCpp(base, adapter, threads=1) as adapted:
        yield LlamaCppPair({BASE: plain, ADAPTER: adapted})


def ours_in_llamacpp(setting: Setting, running: Running) -> AbstractContextManager[VerifyEngine]:
    return LlamaCppPair.start(setting)


@contextmanager
def peft_in_llamacpp(setting: Setting, running: Running) -> Iterator[VerifyEngine]:
    """The converted file, loaded without this package's check of the headers: llama.cpp itself refuses."""
    file = write_as_llamacpp_does(setting, setting.scratch / "converted.gguf")
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(llamacpp, "check_pair", lambda base, adapter: None)
            engine = stack.enter_context(_llamacpp(setting, file))
        yield engine


def write_as_llamacpp_does(setting: Setting, path: Path) -> Path:
    """Write an adapter as llama.cpp's convert_lora_to_gguf.py does; returns `path`.

    A and B are renamed, B of the queries and keys reordered, and A of an embedding transposed, as for the base model.
    Of the configuration, only lora_alpha is written. Copies of base weights are left out.
    """
    model = AutoModelForCausalLM.from_pretrained(setting.base.location)
    name = ARCHITECTURES[type(model).__name__]
    architecture = next(kind for kind, known in gguf.MODEL_ARCH_NAMES.items() if known == name)
    names = gguf.get_tensor_name_map(architecture, model.config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, name)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(setting.layout.config.lora_alpha))
    with open_tensors(setting.layout.tensors_path) as file:
        for key, full_name in setting.layout.sites.items():
            module, _, kind = key.rpartition(".")
            matrix: npt.NDArray[np.float32] = file.read(full_name).float().numpy()
            if kind == "lora_B" and name in INTERLEAVED and module.endswith(("q_proj", "k_proj")):
                matrix = interleaved(matrix, head_size(model.config))
            if kind == "lora_embedding_A":
                matrix = matrix.T
            target = names.get_name(module)
            assert target is not None, module
            writer.add_tensor(f"{target}.weight.lora_{kind[-1].lower()}", np.ascontiguousarray(matrix))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


PEFT_FORM: dict[str, Presented] = {
    "torch": peft_in_torch,
    "onnx": peft_in_onnx,
    "vllm": peft_in_vllm,
    "llamacpp": peft_in_llamacpp,
}
"""What an engine's users give it if they have PEFT's files only."""

OUR_FORM: dict[str, Presented] = {
    "torch": ours_in_torch,
    "vllm": ours_in_vllm,
    "llamacpp": ours_in_llamacpp,
}
"""What this package writes, where verify's own start is not what the matrix takes."""

MATRIX_ENGINES = tuple(dict.fromkeys([*ENGINES, *OUR_FORM]))


def present(engine: str, form: str, setting: Setting, running: Running) -> AbstractContextManager[VerifyEngine]:
    """Start an engine with the adapter in a form."""
    table = PEFT_FORM if form == PEFT else OUR_FORM
    return table[engine](setting, running) if engine in table else engine_class(engine).start(setting)
