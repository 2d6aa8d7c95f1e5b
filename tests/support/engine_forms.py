"""How each engine of the matrix gets an adapter: as PEFT saved it, or as this package exports it.

A line in `PEFT_FORM` puts an engine of verify's registry into the matrix: it says what the engine's users give it
without this package. What we write is what the engine's own `start` exports, unless a line in `OUR_FORM` replaces it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
from transformers import AutoModelForCausalLM

from loraover.checkpoint.files import TENSORS_FILE
from loraover.checkpoint.peft_adapter import read_adapter_dir
from loraover.checkpoint.tensor_file import open_tensors
from loraover.common.errors import EngineError, ExportError
from loraover_export import export_vllm
from loraover_export.formats.gguf import llamacpp
from loraover_export.formats.gguf.base import write_base
from loraover_export.formats.gguf.llamacpp import LlamaCppModel
from loraover_export.formats.gguf.target import FAMILIES, interleave
from loraover_export.formats.onnx.kinds import decoder
from loraover_serve.engines import engine_class, mlx, openvino
from loraover_serve.engines.base import Engine, Setting
from loraover_serve.engines.llamacpp import LlamaCppEngine
from loraover_serve.engines.onnx import OnnxArm, OnnxEngine
from loraover_serve.engines.openvino import OpenVinoEngine
from loraover_serve.engines.vllm import VllmEngine
from loraover_serve.judge.limits import ADAPTER, BASE
from loraover_serve.verify.request import VerifyRequest
from loraover_serve.vllm.client import VllmServer
from loraover_serve.vllm.server import VllmServerConfig

from support.compatibility import PEFT
from support.vllm_loading import ENABLE_LORA, FEW_BLOCKS, load_adapter, serving_loader, unload_adapter

TINY = ("--dtype", "float32", "--max-model-len", "128", "--enforce-eager", "--no-enable-prefix-caching", *FEW_BLOCKS)
"""Options of a vLLM server of a tiny model."""


@dataclass(frozen=True)
class Running:
    """Servers that run until the last cell is judged, one for each base model."""

    folder: Path
    until: ExitStack
    servers: dict[str, VllmServer] = field(default_factory=dict)
    converted: dict[str, Path] = field(default_factory=dict)
    graphs: dict[str, Path] = field(default_factory=dict)

    def onnx(self, base: str) -> Path:
        """The base model's graph."""
        if base not in self.graphs:
            self.graphs[base] = build_graph(base, self.folder / f"onnx-{len(self.graphs)}")
        return self.graphs[base]

    def openvino(self, setting: Setting) -> Path:
        """The base model, exported once for all cells."""
        if setting.base.location not in self.converted:
            scratch = self.folder / f"openvino-{len(self.converted)}"
            scratch.mkdir()
            self.converted[setting.base.location] = convert_for_openvino(
                replace(setting, scratch=scratch, log=scratch / "log")
            )
        return self.converted[setting.base.location]

    def vllm(self, base: str) -> VllmServer:
        if base not in self.servers:
            config = VllmServerConfig(base, options=(*ENABLE_LORA, *TINY))
            log = self.folder / f"vllm-{len(self.servers)}.log"
            self.servers[base] = self.until.enter_context(serving_loader(config, log))
        return self.servers[base]


convert_for_openvino = OpenVinoEngine.convert
Presented = Callable[[Setting, Running], AbstractContextManager[Engine]]


def uniform(setting: Setting) -> Path:
    """The adapter as `loraover export vllm` writes it, which is meant to be right on every engine."""
    folder = setting.scratch / "uniform"
    report = export_vllm(setting.adapter, folder, model=setting.base.location, dtype="fp32")
    if not report.passed:
        errors = [found.found for found in report.preflight.findings if found.level == "error"]
        raise ExportError(f"the export refuses the adapter: {'; '.join(errors)}")
    return folder


def peft_in_torch(setting: Setting, running: Running) -> AbstractContextManager[Engine]:
    return engine_class("torch").start(setting)


def ours_in_torch(setting: Setting, running: Running) -> AbstractContextManager[Engine]:
    return engine_class("torch").start(replace(setting, adapters={ADAPTER: uniform(setting)}))


@contextmanager
def peft_in_onnx(setting: Setting, running: Running) -> Iterator[Engine]:
    """PEFT's folder, given to onnxruntime-genai's builder, which writes the adapter into the graph."""
    adapted = build_graph(setting.base.location, setting.scratch / "graph", setting.adapter)
    yield OnnxEngine("onnx", {BASE: OnnxArm(running.onnx(setting.base.location)), ADAPTER: OnnxArm(adapted)})


def build_graph(base: str, folder: Path, adapter: Path | None = None) -> Path:
    """Build a graph as onnxruntime-genai's documentation says, with `adapter_path`; returns `folder`."""
    with decoder.BuilderProcess() as builder:
        decoder.build_decoder(Path(base), folder, precision="fp32", device="cpu", adapter=adapter, builder=builder)
    return folder


def peft_in_vllm(setting: Setting, running: Running) -> AbstractContextManager[Engine]:
    return _served(setting, setting.adapter, running)


def ours_in_vllm(setting: Setting, running: Running) -> AbstractContextManager[Engine]:
    return _served(setting, uniform(setting), running)


@contextmanager
def _served(setting: Setting, adapter: Path, running: Running) -> Iterator[Engine]:
    """The running server, with an adapter loaded for the length of the block."""
    server, name = running.vllm(setting.base.location), setting.scratch.name
    load_adapter(server, name, adapter)
    try:
        yield VllmEngine(server, {BASE: setting.base.location, ADAPTER: name}, 120, setting.base)
    finally:
        with suppress(EngineError):
            unload_adapter(server, name)


@contextmanager
def peft_in_llamacpp(setting: Setting, running: Running) -> Iterator[Engine]:
    """The converted file, loaded without this package's check of the headers: llama.cpp itself refuses."""
    model = AutoModelForCausalLM.from_pretrained(setting.base.location)
    base = write_base(model, setting.scratch / "base.gguf")
    file = write_as_llamacpp_does(model, setting, setting.scratch / "converted.gguf")
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(llamacpp, "check_pair", lambda base, adapter: None)
            loaded = {BASE: LlamaCppModel(base, threads=1), ADAPTER: LlamaCppModel(base, file, threads=1)}
        yield LlamaCppEngine({arm: stack.enter_context(running) for arm, running in loaded.items()})


def write_as_llamacpp_does(model: Any, setting: Setting, path: Path) -> Path:
    """Write an adapter as llama.cpp's convert_lora_to_gguf.py does; returns `path`.

    A and B are renamed, B of the queries and keys reordered, and A of an embedding transposed, as for the base model.
    Of the configuration, only lora_alpha is written. Copies of base weights are left out.
    """
    family, layout = FAMILIES[type(model).__name__], read_adapter_dir(setting.adapter)
    architecture = next(kind for kind, known in gguf.MODEL_ARCH_NAMES.items() if known == family.name)
    names = gguf.get_tensor_name_map(architecture, model.config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, family.name)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(layout.config.lora_alpha))
    with open_tensors(layout.tensors_path) as file:
        for key, (adapted, side) in layout.matrices.items():
            module, matrix = adapted.path, file.read(key).float()
            if side == "B" and family.interleaved and module.endswith(("q_proj", "k_proj")):
                matrix = interleave(matrix, len(matrix) // model.config.head_dim)
            if side == "A" and adapted.is_embedding:
                matrix = matrix.mT
            target = names.get_name(module)
            assert target is not None, module
            writer.add_tensor(f"{target}.weight.lora_{side.lower()}", matrix.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@contextmanager
def ours_in_openvino(setting: Setting, running: Running) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OpenVinoEngine, "convert", running.openvino)
        with engine_class("openvino").start(setting) as engine:
            yield engine


@contextmanager
def peft_in_openvino(setting: Setting, running: Running) -> Iterator[Engine]:
    """PEFT's tensors, with the alpha that OpenVINO GenAI uses where the program names none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openvino, "export_uniform", lambda setting: setting.adapter)
        with ours_in_openvino(setting, running) as engine:
            yield engine


@contextmanager
def peft_in_mlx(setting: Setting, running: Running) -> Iterator[Engine]:
    """PEFT's folder, under the name that mlx-lm looks for."""

    def unchanged(source: Path, output: Path, *, model: str) -> Any:
        shutil.copytree(source, output)
        (output / TENSORS_FILE).rename(output / "adapters.safetensors")
        return SimpleNamespace(passed=True, lost_settings={})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlx, "export_mlx", unchanged)
        with engine_class("mlx").start(setting) as engine:
            yield engine


PEFT_FORM: dict[str, Presented] = {
    "torch": peft_in_torch,
    "onnx": peft_in_onnx,
    "vllm": peft_in_vllm,
    "llamacpp": peft_in_llamacpp,
    "openvino": peft_in_openvino,
    "mlx": peft_in_mlx,
}
"""What an engine's users give it if they have PEFT's files only."""

OUR_FORM: dict[str, Presented] = {
    "torch": ours_in_torch,
    "vllm": ours_in_vllm,
    "openvino": ours_in_openvino,
}
"""What this package writes, where verify's own start is not what the matrix takes."""

MATRIX_ENGINES = tuple(PEFT_FORM)


def skip_unless_installed(engine: str) -> None:
    """Skip the test where an engine is missing; vLLM is looked for when a server is started."""
    if engine != "vllm" and (how := engine_class(engine).lacking(VerifyRequest("adapter"))) is not None:
        pytest.skip(f"{engine} is not installed: {how}")


def present(engine: str, form: str, setting: Setting, running: Running) -> AbstractContextManager[Engine]:
    """Start an engine with the adapter in a form."""
    table = PEFT_FORM if form == PEFT else OUR_FORM
    return table[engine](setting, running) if engine in table else engine_class(engine).start(setting)
