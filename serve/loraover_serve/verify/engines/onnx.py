"""onnxruntime-genai in this process, on graphs that are built for the comparison or on an earlier export's graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, final

from loraover_serve.comparison.adapters import make_idle
from loraover_serve.engines.distributions import ONNX_GENAI, installed_version
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
        from loraover_serve.engines.onnx_graphs import merged_arm, swappable_arms

        name, scratch = setting.adapter.name, setting.scratch
        if setting.request.graph is not None or _fits_swappable(setting):
            place = (
                "building the swappable ONNX graph of"
                if setting.request.graph is None
                else f"using {setting.request.graph} for"
            )
            setting.request.report.line(f"{place} {name}")
            arms = swappable_arms(
                {ADAPTER: setting.adapter}, scratch / "swappable", setting.base, setting.request.graph
            )
            arms[BASE] = OnnxArm(arms[ADAPTER].graph)
        else:
            setting.request.report.line(f"building the merged ONNX graphs of {name} and of the base model")
            idle = make_idle(setting.layout, scratch / "idle")  # merges into the base model
            folders = {BASE: idle, ADAPTER: setting.adapter}
            arms = {arm: merged_arm(folder, scratch / f"merged-{arm}", setting.base) for arm, folder in folders.items()}
        yield cls(OnnxEngine("onnx", arms))

    def logits(self, arm: str, tokens: Sequence[int]) -> Any:
        return self._running.logits(arm, tokens)

    def greedy(self, arm: str, prompts: Sequence[Sequence[int]], tokens: int) -> list[tuple[int, ...]]:
        return [self._running.greedy(arm, prompt, tokens) for prompt in prompts]


def _fits_swappable(setting: Setting) -> bool:
    """Whether a swappable graph holds the adapter: it takes A and B of linear layers, and nothing else."""
    embeddings = any(module.is_embedding for module in setting.layout.modules.values())
    return not embeddings and not setting.layout.others
