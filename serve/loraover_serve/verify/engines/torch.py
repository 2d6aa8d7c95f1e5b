"""PyTorch with PEFT in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from typing import Any, final

from loraover.models.load import load_model
from loraover_serve.engines.sample import Request
from loraover_serve.engines.torch import TorchEngine, torch_engine
from loraover_serve.verify.answers import ADAPTER
from loraover_serve.verify.engines.base import LogitEngine, Setting, VerifyEngine


@final
class Torch(LogitEngine):
    """PEFT with the adapter's files, as a script with transformers uses them.

    Args:
        running: the models.
    """

    def __init__(self, running: TorchEngine) -> None:
        self._running = running
        self.version = version("peft")

    @classmethod
    def install(cls, vllm: str) -> str | None:
        return None  # a dependency of this package

    @classmethod
    @contextmanager
    def start(cls, setting: Setting) -> Iterator[VerifyEngine]:
        setting.request.report.line("loading the adapter with PEFT")
        load = partial(load_model, setting.base, device=setting.request.device)
        yield cls(torch_engine(load, {ADAPTER: setting.adapter}, None))

    def logits(self, arm: str, tokens: Sequence[int]) -> Any:
        return next(iter(self._running.logits(arm, [tokens])))

    def greedy(self, arm: str, prompts: Sequence[Sequence[int]], tokens: int) -> list[tuple[int, ...]]:
        answers = self._running.run(arm, 0, 0, [Request(tuple(prompt), tokens) for prompt in prompts])
        return [answer.token_ids for answer in answers]
