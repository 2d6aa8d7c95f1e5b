"""What a server's answers show: strength, noise and excess, as verify/evidence.py weighs them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean, median, stdev
from typing import Any, NamedTuple

from .estimates import BY_CHANCE, Distance, Estimate, distance, dot, strength, t_quantile
from .reference import ADAPTER, BASE, FORMATS, CheckError, Model, Reference, Rows

PLAIN = ("fp32", "fp16", "bf16")
FLOOR, EXACT, CERTAIN, EXCESS = 1e-4, 1e-3, 5.0, 1.49  # see verify/evidence.py
FEW_PROMPTS, CLEAR, AS_BASE = 6, 4.0, 4.0
EXACT_STRENGTH, ROUNDED_STRENGTH, SEEN, SURE = 0.002, 0.06, 0.2, 5  # see verify/rules.py
COARSER, FEW = 2, 3  # see verify/judge.py and verify/decoded.py


class Greedy(NamedTuple):
    """A greedy answer: its tokens up to the first unknown one, its length, and its logprobs."""

    question: int
    tokens: Sequence[int]
    length: int
    rows: Rows


@dataclass
class Answers:
    """What a server answered: rows of both arms, greedy answers, and rows of each arm asked beside the other."""

    base: Rows
    adapter: Rows
    greedy: Sequence[Greedy] = ()
    mixed: Mapping[str, Rows] = field(default_factory=dict)
    sources: Mapping[int, str] = field(default_factory=dict)
    is_one_model: bool = False


Pair = tuple[int, list[int], list[float]]
"""A place, tokens that both arms have, and what the adapter changes in their logprobs."""


class Case:
    """A server's answers beside a reference, judged as verify/judge.py does."""

    def __init__(self, reference: Reference, answers: Answers, served_format: str = "bf16") -> None:
        self.reference, self.answers, self.served_format = reference, answers, served_format
        self.base, self.adapter, self.suspects = reference.base, reference.adapter, list[dict[str, Any]]()
        self.pairs = self.paired(answers.adapter, answers.base) or self.paired(
            answers.adapter, dict(enumerate(self.base.rows))
        )
        if not self.pairs:
            raise CheckError("the server answers with none of the recorded tokens; it serves another base model.")
        exact = dict(enumerate(self.base.rows))
        self.noise = (
            self.off(answers.adapter, self.adapter)
            if answers.is_one_model
            else self.off(answers.base or exact, self.base)
        )
        self.effect = math.sqrt(fmean(fmean(d * d for d in each) for each in self.directions(self.adapter)))
        self.format = self.format_of(self.noise.rms)
        if self.format == "fp32":
            self.allowed = (1 - EXACT_STRENGTH, 1 + EXACT_STRENGTH)
        else:
            bias = reference.formats["bf16" if self.format in (None, *PLAIN) else self.format]["strength"] or 1.0
            self.allowed = (2 * min(bias, 1) - 1 - ROUNDED_STRENGTH, 2 * max(bias, 1) - 1 + ROUNDED_STRENGTH)
        self.found, self.excess, self.strength = self.weighed(self.adapter, self.pairs)
        self.prompts = len({self.prompt(place) for place, *_ in self.pairs})
        relative = self.noise.error / self.noise.rms if self.noise.rms else 0.0
        sure = max(SURE, t_quantile(max(self.noise.prompts - 1, 1), BY_CHANCE))
        self.limit = reference.sensitivity * self.noise.rms * (1 + sure * math.sqrt(2) * relative) + FLOOR

    def format_of(self, noise: float) -> str | None:
        """The finest number format that has such noise; None if none has."""
        return next((name for name in FORMATS if noise <= self.noise_of(name)), None)

    def prompt(self, place: int) -> int:
        return self.reference.places[place][0]

    def noise_of(self, name: str) -> float:
        """Question to which a place belongs."""
        return EXACT if name == "fp32" else COARSER * float(self.reference.formats[name]["distance"])

    def paired(self, adapter: Rows, base: Rows) -> list[Pair]:
        """Largest noise of a number format, in nats."""
        ids = {
            p: [i for i in row if i in base.get(p, {}) and i in self.base.rows[p]] for p, row in sorted(adapter.items())
        }
        return [(p, mine, [adapter[p][i] - base[p][i] for i in mine]) for p, mine in ids.items() if mine]

    def directions(self, to: Model, of: Model | None = None) -> list[list[float]]:
        """Places and tokens that two sets of rows share, with what sets their logprobs apart."""
        start = (of or self.base).rows
        return [[to.rows[p][i] - start[p][i] for i in ids] for p, ids, _ in self.pairs if p < len(to.rows)]

    def off(self, rows: Rows, model: Model) -> Distance:
        """What one model changes in another one's logprobs, for each pair."""
        mine = {place: row for place, row in rows.items() if place < len(model.rows)}
        return distance([self.prompt(p) for p in mine], [model.off(p, row) for p, row in mine.items()])

    def weighed(self, model: Model, pairs: Sequence[Pair]) -> tuple[Distance, Estimate, Estimate]:
        """Distance of the adapter's answers from a model, their excess, and the strength of the model in them."""
        here, there = self.by_prompt(self.answers.adapter, model), self.by_prompt(self.answers.base, self.base)
        logs = [
            math.log((here[q] + FLOOR) / (self.reference.sensitivity * there[q] + FLOOR)) for q in here if q in there
        ]
        spread = t_quantile(len(logs) - 1) * stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else math.inf
        excess = Estimate(fmean(logs) if logs else 0.0, spread)
        certain = CERTAIN * math.sqrt(2) * (self.noise.rms + FLOOR) / self.effect if self.effect > 0 else math.inf
        found = self.along([y for _, _, y in pairs], self.directions(model), pairs)
        return self.off(self.answers.adapter, model), excess, found._replace(half=min(found.half, certain))

    def along(
        self, changes: Sequence[Sequence[float]], ways: Sequence[Sequence[float]], pairs: Sequence[Pair]
    ) -> Estimate:
        """Distance of rows from a model."""
        return strength(
            [(self.prompt(p[0]), dot(y, d), dot(d, d)) for p, y, d in zip(pairs, changes, ways, strict=False)]
        )

    def by_prompt(self, rows: Rows, model: Model) -> dict[int, float]:
        """Strength of directions in changes."""
        found = defaultdict[int, list[float]](list)
        for place, row in rows.items():
            if place < len(model.rows):
                found[self.prompt(place)].append(fmean(d * d for d in model.off(place, row)))
        return {prompt: math.sqrt(fmean(each)) for prompt, each in found.items()}

    def is_further(self, found: Distance, excess: Estimate, prompts: int) -> bool:
        """Distance of each prompt's rows from a model."""
        if prompts < FEW_PROMPTS:
            return found.rms > CERTAIN * (self.reference.sensitivity * self.noise.rms + FLOOR)
        return excess.value - excess.half > math.log(EXCESS)

    def apart(self, model: Model, places: int) -> float:
        """Whether the adapter is off by more than the noise of the base model explains."""
        ways = self.directions(model)
        squares = [
            fmean((a - b) ** 2 for a, b in zip(y, d, strict=True))
            for (place, _, y), d in zip(self.pairs, ways, strict=False)
            if place < places
        ]
        return math.sqrt(fmean(squares)) if squares else math.inf

    def count_base(self, pairs: Sequence[Pair], largest: float = math.inf) -> tuple[list[int], int]:
        """Places at which the adapter's answer is clearly the base model's, and number of places where that is seen.

        Args:
            pairs: What the server changes at each place.
            largest: Largest RMS change, in nats, that is taken for noise.
        """
        points = []
        for place, ids, y in pairs:
            d = [self.adapter.rows[place][i] - self.base.rows[place][i] for i in ids]
            points.append((place, math.hypot(*y), math.dist(y, d), math.hypot(*d), largest * math.sqrt(len(y))))
        limit = CLEAR * median(min(there, here) for _, there, here, _, _ in points) if points else 0.0
        clear = [point for point in points if point[3] > limit]
        return [place for place, there, here, _, most in clear if there <= min(here / AS_BASE, most)], len(clear)

    def mixed_distances(self) -> dict[str, Distance]:
        """Distances between answers that were asked for beside those of another model, and alone."""
        found = {}
        for name, rows in self.answers.mixed.items():
            apart = self.answers.base if name == BASE else self.answers.adapter
            off = {p: [row[i] - apart[p][i] for i in row if i in apart[p]] for p, row in rows.items() if p in apart}
            off = {p: each or [max(rows[p].values()) - min(apart[p].values())] for p, each in off.items()}
            if off:
                found[name] = distance([self.prompt(p) for p in off], list(off.values()))
        return found

    def figures(self) -> dict[str, Any]:
        """What was measured, as verify.json has it."""
        value, half = self.strength
        shown = {"value": value, "low": value - half, "high": value + half} if math.isfinite(half) else None
        mixed = {name: found._asdict() for name, found in self.mixed_distances().items()}
        return {
            "compared": "top tokens",
            "strength": shown if self.effect > 0 else None,
            "allowed_strength": self.allowed,
            "base": self.noise._asdict(),
            "number_format": self.format,
            "adapter": self.found._asdict(),
            "effect": self.effect,
            "allowed": self.limit,
            "greedy": self.greedy,
            "mixed": mixed if {BASE, ADAPTER} <= mixed.keys() else None,
            "suspects": self.suspects,
        }

    @cached_property
    def greedy(self) -> dict[str, float] | None:
        """Greedy answers beside PyTorch's; None if the server hides its tokens."""
        gaps, equal, early, as_base = list[float](), 0, 0, 0
        allowed = 2 * self.reference.sensitivity * self.noise.largest + FLOOR
        for question, tokens, length, _ in self.answers.greedy:
            first, ends = self.reference.places.index((question, 0)), self.reference.content["ends"]
            expected = self.reference.questions[question]["answer"]
            parted = next((k for k, (a, b) in enumerate(zip(expected, tokens, strict=False)) if a != b), None)
            if parted is not None:
                row, floor = self.adapter.rows[first + parted], self.adapter.floors[first + parted]
                gaps.append(row.get(expected[parted], floor) - row.get(tokens[parted], floor))
                base = self.base.rows[first + parted]
                as_base += gaps[-1] > allowed and tokens[parted] == max(base, key=base.__getitem__)
            elif tokens:
                gaps.append(0.0)
                is_end = length >= len(expected) or tokens[-1] in ends or expected[len(tokens)] in ends
                equal, early = equal + is_end, early + (not is_end)
        if not gaps:
            return None
        shares = {"equal": equal / len(gaps), "early": early / len(gaps), "as_base": as_base}
        return shares | {"gap": max(gaps), "allowed": allowed}
