"""Training loops that sample from an engine, made up: a random model whose logits are linear in the adapter.

Everything is NumPy in float64, and imports nothing of ours. The logits of a token's place are z + t M v, with t the
adapter's strength and v a direction that grows and turns from step to step. Rounding is to a grid, with one offset for
the engine and another one for the trainer, so that a change which is smaller than the grid is mostly swallowed, as in
bfloat16: the same offset rounds a and b.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
VOCABULARY, PARTS = 24, 12
EXACT, ROUNDED = 1e-5, 0.1
"""Grid of the logits in nats: that of float32, and one of bfloat16, whose logprobs are off by 0.025 nats in RMS."""


@dataclass
class Step:
    """Arrays of a step, flat: one value for each sampled token."""

    e: list[float]
    a: list[float]
    b: list[float]
    prompt_ids: list[int]
    rows: list[int]
    positions: list[int]
    earlier: list[list[float]]
    faults: dict[str, Any] = field(default_factory=dict)

    @property
    def given(self) -> dict[str, Any]:
        """The arguments of the judge."""
        return dict(vars(self))


@dataclass
class Loop:
    """A loop of which each step moves the adapter.

    Args:
        seed: Seed of the model, the adapter and the tokens.
        grid: Grid to which logits are rounded, in nats.
        rate: RMS change of the logits by the adapter at each step, in nats.
        fault: Fault of the engine: base, stale by N, times C, another, attention, temperature, template, kept, or
            mixed stale and mixed base for the first half of the rows.
        since: Step at which the fault begins.
        prompts: Prompts of a step.
        answers: Answers to each prompt.
        tokens: Tokens of each answer.
        snapshots: Number of earlier adapters whose logprobs the trainer computes.
    """

    seed: int
    grid: float = EXACT
    rate: float = 0.03
    fault: str = ""
    since: int = 0
    prompts: int = 8
    answers: int = 2
    tokens: int = 16
    snapshots: int = 2

    def steps(self, number: int) -> Iterator[Step]:
        """The steps, of which the first one has a zero adapter."""
        draw = np.random.default_rng(self.seed)
        adapters = [np.zeros(PARTS)]
        turn = draw.normal(size=PARTS)
        other = draw.normal(size=PARTS)
        for index in range(number):
            yield self._step(draw, adapters, other, index)
            turn = 0.8 * turn + 0.6 * draw.normal(size=PARTS)
            adapters.append(adapters[-1] + self.rate * turn / np.sqrt(PARTS))

    def _step(self, draw: np.random.Generator, adapters: list[Floats], other: Floats, index: int) -> Step:
        rows = self.prompts * self.answers
        shape = (rows * self.tokens, VOCABULARY)
        z = 2.0 * draw.normal(size=shape)
        way = draw.normal(size=(*shape, PARTS))
        offsets = {side: self.grid * draw.random(size=shape) for side in ("engine", "trainer", "prompt")}
        elsewhere = 0.5 * draw.normal(size=shape)  # what another template, or kept keys and values, change

        def logprobs(side: str, adapter: Floats, temperature: float = 1.0, more: Floats | float = 0.0) -> Floats:
            logits = np.round((z + way @ adapter + more + offsets[side]) / self.grid) * self.grid - offsets[side]
            logits = logits / temperature
            return np.asarray(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))

        now = adapters[-1]
        before = [adapters[max(len(adapters) - 1 - k, 0)] for k in range(1, 8)]
        half = np.where(np.arange(PARTS) < PARTS // 2, now, 0.0)
        another = other * np.linalg.norm(now) / np.linalg.norm(other)
        kept = way @ (before[0] - now) * 0.5
        known: dict[str, tuple[Any, ...]] = {
            "base": (0 * now,),
            "another": (another,),
            "attention": (half,),
            "temperature": (now, 0.9),
            "template": (now, 1.0, elsewhere),
            "kept": (now, 1.0, kept),
            **{f"stale by {k}": (before[k - 1],) for k in (1, 2, 5)},
            **{f"times {c:g}": (c * now,) for c in (0.25, 0.5, 0.8, 2.0, 4.0)},
        }
        right = logprobs("engine", now)
        name = self.fault if index >= self.since else ""
        found = logprobs("engine", *known[name.removeprefix("mixed ")]) if name else right.copy()
        if name.startswith("mixed "):
            found[shape[0] // 2 :] = right[shape[0] // 2 :]
        keys = (found + draw.gumbel(size=shape)).argmax(-1)
        each = np.arange(shape[0])
        given = ("base", "another", "attention", "temperature", "template", "kept")
        mine = {key: logprobs("trainer", *known[key])[each, keys].tolist() for key in given}
        prompts = np.repeat(np.arange(self.prompts), self.answers * self.tokens) + index * self.prompts
        return Step(
            e=found[each, keys].tolist(),
            a=logprobs("trainer", now)[each, keys].tolist(),
            b=mine["base"],
            prompt_ids=prompts.tolist(),
            rows=np.repeat(np.arange(rows), self.tokens).tolist(),
            positions=np.tile(np.arange(self.tokens), rows).tolist(),
            earlier=[logprobs("trainer", one)[each, keys].tolist() for one in before[: self.snapshots]],
            faults={name: mine[name] for name in given[1:]},
        )
