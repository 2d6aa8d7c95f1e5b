"""onnxruntime-genai in this process, on graphs that are exported for the comparison."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from loraover.common.errors import EngineError
from loraover.reporting.reporter import SILENT
from loraover_export.numerics.delta import other_tensors
from loraover_serve.engines.distributions import ONNX_GENAI, installed_version
from loraover_serve.parity.measure.arms import make_idle
from loraover_serve.verify.answers import ADAPTER, BASE
from loraover_serve.verify.engines.base import LogitEngine, Setting, VerifyEngine

if TYPE_CHECKING:
    from loraover_serve.engines.onnx import OnnxEngine


@final
class Onnx(LogitEngine):
    """ONNX Runtime on one swappable graph, or on two merged graphs where a swappable one cannot hold the adapter.

    Args:
        running: the loaded graphs.
    """

    def __init__(self, running: OnnxEngine) -> None:
        self._running = running
        self.version = installed_version(ONNX_GENAI)

    @classmethod
    def install(cls, vllm: str) -> str | None:
        lacking = installed_version(ONNX_GENAI) is None or installed_version(["onnx"]) is None
        return "pip install 'loraover[export]'" if lacking else None

    @classmethod
    @contextmanager
    def start(cls, setting: Setting) -> Iterator[VerifyEngine]:
        from loraover_serve.engines.onnx import OnnxArm, OnnxEngine

        if _fits_swappable(setting):
            graph = _export(setting, setting.adapter, "swappable")
            arms = {BASE: OnnxArm(graph), ADAPTER: OnnxArm(graph, graph / f"{ADAPTER}.onnx_adapter")}
        else:
            idle = make_idle(setting.layout, setting.scratch / "idle")  # merges into the base model
            folders = {BASE: idle, ADAPTER: setting.adapter}
            arms = {arm: OnnxArm(_export(setting, folder, "merged")) for arm, folder in folders.items()}
        yield cls(OnnxEngine("onnx", arms))

    def logits(self, arm: str, tokens: Sequence[int]) -> Any:
        return self._running.logits(arm, tokens)

    def greedy(self, arm: str, prompts: Sequence[Sequence[int]], tokens: int) -> list[tuple[int, ...]]:
        return [self._running.greedy(arm, prompt, tokens) for prompt in prompts]


def _fits_swappable(setting: Setting) -> bool:
    """Whether a swappable graph holds the adapter: it takes A and B of linear layers, and nothing else."""
    embeddings = any(name.rpartition(".")[2].startswith("lora_embedding") for name in setting.layout.sites)
    return not embeddings and not other_tensors(setting.layout)


def _export(setting: Setting, source: Path, mode: str) -> Path:
    """Export a graph, without the export's own comparison with PyTorch, and return its folder."""
    from loraover_export.onnx.run import export_onnx

    setting.report.line(f"building the {mode} ONNX graph of {source.name}")
    output = setting.scratch / f"{mode}-{source.name}"
    model = setting.base.location
    found = export_onnx(source, output, mode=mode, model=model, names=(ADAPTER,), check=False, report=SILENT)
    if found.verdict == "failed":
        raise EngineError(f"onnx: a matrix of the {mode} export is not within its error bound.")
    return output
