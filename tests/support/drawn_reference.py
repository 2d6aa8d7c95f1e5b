"""A reference of drawn numbers, and servers that answer with noise: what the judge decides, without any model."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from typing import Any

from loraover_serve.judge.evidence import Evidence
from loraover_serve.judge.limits import REPEATS
from loraover_serve.judge.models import Answers, AskedOnce, Greedy, Row
from loraover_serve.judge.reference import Reference
from loraover_serve.judge.rules import judge

PROMPTS, POSITIONS, KEPT, VOCABULARY = 32, 4, 20, 200
NOISE, UNIT = 0.02, 1e-4
"""Nats of the noise of each logprob, and of one unit of the reference."""
EFFECT = 4000
"""Standard deviation of what the adapter changes, in units; 20 times the noise."""
FORMATS = {"fp16": 4e-3, "bf16": 2e-2, "int8": 5e-2, "fp8": 0.1, "int4": 0.5}

Fault = Callable[[random.Random, float, float], float]
"""A wrong logprob, of the base model's and the right adapter's."""
Change = Callable[[dict[int, Row]], dict[int, Row]]
"""Rows of other answers to the same questions."""


def drawn_reference(draw: random.Random) -> Reference:
    """A reference whose likeliest token is always far more likely than the others."""
    questions, positions = [], []
    for _ in range(PROMPTS):
        answer = []
        for _ in range(POSITIONS):
            ids = draw.sample(range(VOCABULARY), KEPT)
            base = [draw.randint(500, 5000), *sorted(draw.randint(25_000, 90_000) for _ in ids[1:])]
            adapter = [max(0, value + round(draw.gauss(0, EFFECT))) for value in base]
            floors = {"base": max(base), "adapter": max(adapter)}
            positions.append({"ids": ids, "base": base, "adapter": adapter, "floors": floors})
            answer.append(ids[adapter.index(min(adapter))])
        questions.append({"prompt": [1, 2], "answer": answer, "texts": [None] * POSITIONS, "message": None})
    factors = {"of": "adapter", "fault": "wrong scaling", "questions": PROMPTS, "unit": 0.0}
    levels = "0" * KEPT * POSITIONS * PROMPTS
    content: dict[str, Any] = {
        "schema_version": 1,
        "adapter": "shop",
        "base_model": "base",
        "questions": questions,
        "positions": positions,
        "formats": {name: {"distance": distance, "strength": 1.0} for name, distance in FORMATS.items()},
        "sensitivity": 1.0,
        "vocabulary": VOCABULARY,
        "variants": [factors | {"detail": str(factor), "factor": factor, "levels": levels} for factor in (0.5, 2.0)],
        "texts": {},
        "ends": [],
    }
    return Reference(content)


class DrawnServer:
    """A server whose answers have noise, and of which those for the adapter may be wrong on some prompts."""

    def __init__(
        self, reference: Reference, draw: random.Random, wrong: Collection[int] = (), fault: Fault | None = None
    ) -> None:
        self._reference, self._draw = reference, draw
        right = zip(reference.base.rows, reference.adapter.rows, strict=True)
        self._adapter = [
            {i: fault(draw, base[i], value) for i, value in row.items()}
            if fault is not None and reference.places[place][0] in wrong
            else row
            for place, (base, row) in enumerate(right)
        ]

    def base(self) -> dict[int, Row]:
        """Answers of the base model."""
        return self._noisy(self._reference.base.rows)

    def adapter(self) -> dict[int, Row]:
        """Answers of the adapter."""
        return self._noisy(self._adapter)

    def _noisy(self, rows: Sequence[Row]) -> dict[int, Row]:
        return {p: {i: v + self._draw.gauss(0, NOISE) for i, v in row.items()} for p, row in enumerate(rows)}

    @staticmethod
    def odd(rows: dict[int, Row], places: Collection[int], nats: float = 0.4) -> dict[int, Row]:
        """The rows with some places at which every logprob is that far off, as if tokens went to another expert."""
        moved = {p: {i: v + (nats if i % 2 else -nats) for i, v in rows[p].items()} for p in places}
        return rows | moved

    def judged(
        self, *, places: Collection[int] = (), base: Change | None = None, adapter: Change | None = None
    ) -> dict[str, Any]:
        """What the judge says of the answers; greedy ones are the right tokens.

        Args:
            places: Places at which the adapter's answers are odd.
            base: What a mixed batch makes of the base model's answers; None for nothing.
            adapter: What it makes of the adapter's.
        """
        rounds = [self.odd(self.adapter(), places) for _ in range(REPEATS)]
        answers = [question.answer for question in self._reference.questions]
        greedy = [Greedy(q, answer, len(answer), {}) for q, answer in enumerate(answers)]
        told: dict[int, dict[str, str]] = {place: {} for place in rounds[0]}
        asked = [AskedOnce(rows, told) for rows in rounds]
        alone = {"base": self.base(), "adapter": rounds[0]}
        changes = {"base": base, "adapter": adapter}
        mixed = {name: rows if (change := changes[name]) is None else change(rows) for name, rows in alone.items()}
        found = Answers(alone["base"], alone["adapter"], greedy, mixed, rounds=asked)
        return judge(Evidence(self._reference, found))
