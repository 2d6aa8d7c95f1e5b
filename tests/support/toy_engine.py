"""An engine that a test adds to the tables: its class for `loraover_serve`, and its rules for `loraover_export`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from loraover_export.check.engines.base import command, note, react
from loraover_export.check.engines.vllm import UniformRules
from loraover_export.check.report import EngineFinding
from loraover_export.check.subject import Subject
from loraover_serve.engines.base import LogitEngine, Sample, Setting, TimedEngine, TokenRequest
from loraover_serve.engines.torch import TorchEngine


class ToyEngine(LogitEngine, TimedEngine):
    """PyTorch under another name."""

    name = "toy"
    distributions = ("torch",)
    hint = "pip install toy"

    def __init__(self, running: TorchEngine) -> None:
        self.arms, self._running = running.arms, running

    @classmethod
    @contextmanager
    def start(cls, setting: Setting) -> Iterator[ToyEngine]:
        with TorchEngine.start(setting) as running:
            yield cls(running)

    @classmethod
    @contextmanager
    def start_arms(cls, setting: Setting) -> Iterator[Sequence[ToyEngine]]:
        with cls.start(setting) as engine:
            yield [engine]

    def logits(self, arm: str, sequences: Iterable[Sequence[int]]) -> Iterator[Any]:
        return self._running.logits(arm, sequences)

    def generate(self, arm: str, prompts: Sequence[Sequence[int]], tokens: int) -> list[tuple[int, ...]]:
        return self._running.generate(arm, prompts, tokens)

    def run(self, arm: str, block: int, first: int, requests: Sequence[TokenRequest]) -> list[Sample]:
        return self._running.run(arm, block, first, requests)


class ToyRules(UniformRules):
    reader = "Toy 1.0"

    def as_it_is(self, subject: Subject) -> Iterator[EngineFinding]:
        yield from react(subject, {"rsLoRA": note("Toy computes it")})

    def exported(self, subject: Subject) -> Iterator[EngineFinding]:
        yield from self.as_it_is(subject)

    def export(self, subject: Subject) -> str:
        return command(subject, "fold", ending="-toy")
