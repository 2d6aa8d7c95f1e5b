"""Answers of right servers, drawn from a reference and noise as warm answers, or answers in company, have it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from loraover.client.speaker import Response
from loraover_serve.judge.caches import judge_warm
from loraover_serve.judge.churn import Meanwhile, judge_churn
from loraover_serve.judge.limits import ADAPTER, BASE
from loraover_serve.judge.models import Model, Row, Rows
from loraover_serve.judge.names import STALE
from loraover_serve.judge.owners import Said
from loraover_serve.judge.reference import Reference
from loraover_serve.judge.results import Caches, Churn
from loraover_serve.judge.warm_probe import Asked, Reloaded

NAMES = {BASE: "base", ADAPTER: "shop"}
TOP = 20


@dataclass
class RightServer:
    """A server whose answers are right but for noise.

    Args:
        long: Long questions.
        rms: RMS noise in nats, half of its square of the keys and values that all questions share.
        draw: Source of the noise.
    """

    long: Reference
    rms: float
    draw: random.Random

    def __post_init__(self) -> None:
        self._models: Mapping[str, Model] = {BASE: self.long.base, ADAPTER: self.long.adapter}
        (self._earlier,) = (each for each in self.long.recorded(ADAPTER) if each.fault == STALE)
        self._tokens = sorted({i for row in self.long.base.rows for i in row})

    def asked(
        self, arm: str, after: str = "", shared: dict[int, float] | None = None, model: Model | None = None
    ) -> Asked:
        shared = self.shared() if shared is None else shared
        rows = {
            place: row
            for index in range(len(self.long.questions))
            for place, row in self._rows(arm, index, shared, model)
        }
        return Asked(arm, after, rows, None)

    def shared(self) -> dict[int, float]:
        """Noise of each token that keys and values of the beginning bring into all questions."""
        return {i: self.draw.gauss(0, self.rms / 2**0.5) for i in self._tokens}

    def _rows(
        self, arm: str, index: int, shared: Mapping[int, float], model: Model | None
    ) -> Iterator[tuple[int, Row]]:
        for place, (question, _) in enumerate(self.long.places):
            if question == index:
                right = (model or self._models[arm]).rows[place]
                likeliest = sorted(right, key=lambda i: -right[i])[:TOP]
                yield place, {i: right[i] + shared[i] + self.draw.gauss(0, self.rms / 2**0.5) for i in likeliest}

    def caches(self, *, with_reload: bool) -> Caches:
        """The judge's result on answers on kept keys and values."""
        cold = {arm: self.asked(arm)._replace(cached=0) for arm in NAMES}
        noise = self.asked(BASE, "after its own answers")
        warm = [self.asked(arm, "") for arm in (ADAPTER, BASE, ADAPTER, BASE, ADAPTER)]
        before = self.asked(ADAPTER, model=self._earlier)
        reloaded = Reloaded("reload", 1.0, (None, None), before, True) if with_reload else None
        return judge_warm(self.long, cold, noise, warm, 1000, reloaded)

    def churn(self, answers: int) -> Churn:
        """The judge's result on answers in churn, each third of the adapter's by its earlier version."""
        cold, noise = {arm: self.asked(arm) for arm in NAMES}, self.asked(BASE)
        kept = {arm: self.shared() for arm in (*NAMES, STALE)}
        said = []
        for turn in range(answers):
            arm, question = self.draw.choice([*NAMES]), self.draw.randrange(len(self.long.questions))
            version = STALE if arm == ADAPTER and self.draw.random() < 1 / 3 else arm
            if self.draw.random() < 0.05:  # a reload, after which the beginning is read anew
                kept[version] = self.shared()
            rows: Rows = dict(self._rows(arm, question, kept[version], self._earlier if version == STALE else None))
            place = self.long.first(question)
            said.append(Said(arm, place, rows, 0.1, Response(NAMES[arm], place, {"id": str(turn)}, True)))
        begun = Churn("inconclusive", "", None, 60.0, None, 4)
        return judge_churn(begun, self.long, NAMES, cold, noise, Meanwhile(said, {}))
