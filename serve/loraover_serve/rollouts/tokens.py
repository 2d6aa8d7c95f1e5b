"""Sampled tokens with their logprobs by the engine and by known models, checked once."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypedDict
from zlib import crc32

from loraover_serve.judge.names import NOT_APPLIED

Logprobs = Sequence[float]
"""Logprobs in nats of the sampled tokens, one for each; any sequence of numbers, such as a list or a flat array."""

Candidate = Sequence[float | None]
"""Logprobs in nats by a model that the engine could have; None at tokens for which they were not computed."""

OF_A_ROW = 8
"""Number of tokens of a row that are enough to see a fault that only some rows have."""

STALE_BY = "stale by {}"
"""Name of an earlier adapter, by its age in steps."""


@dataclass(frozen=True)
class SampledTokens:
    """Sampled tokens with their logprobs, in nats.

    Args:
        engine: Logprobs with which the engine has sampled the tokens.
        right: The trainer's logprobs with the adapter as it is.
        base: The trainer's logprobs without the adapter.
        prompts: Prompt of each token.
        rows: Row of each token: the answer that it belongs to.
        models: Logprobs of models that an engine could have by mistake, by name; NaN where one was not computed.
        factors: Factors that an engine could put on delta_W by mistake, by name.
    """

    engine: list[float]
    right: list[float]
    base: list[float]
    prompts: list[Hashable]
    rows: list[Hashable]
    models: dict[str, list[float]]
    factors: dict[str, float]

    @classmethod
    def pooled(cls, steps: Sequence[SampledTokens]) -> SampledTokens:
        """The tokens of several steps; rows of two steps are never the same."""
        return cls(
            [value for one in steps for value in one.engine],
            [value for one in steps for value in one.right],
            [value for one in steps for value in one.base],
            [prompt for one in steps for prompt in one.prompts],
            [(index, row) for index, one in enumerate(steps) for row in one.rows],
            {
                name: [value for one in steps for value in one.models.get(name) or [math.nan] * len(one.engine)]
                for name in dict.fromkeys(name for one in steps for name in one.models)
            },
            {name: factor for one in steps for name, factor in one.factors.items()},
        )

    def thinned(self, tokens: int) -> SampledTokens:
        """At most about so many tokens, at least OF_A_ROW of each row; of too many rows, some are drawn at random."""
        if len(self.engine) <= tokens:
            return self
        places = defaultdict[Hashable, list[int]](list)
        for index, row in enumerate(self.rows):
            places[row].append(index)
        drawn = sorted(places, key=lambda row: crc32(repr(row).encode()))[: max(1, tokens // OF_A_ROW)]
        each = max(1, tokens // len(drawn))
        kept = sorted(index for row in drawn for index in places[row][:: math.ceil(len(places[row]) / each)])

        def of(values: Sequence[Any]) -> list[Any]:
            return [values[index] for index in kept]

        models = {name: of(values) for name, values in self.models.items()}
        engine, right, base = of(self.engine), of(self.right), of(self.base)
        return SampledTokens(engine, right, base, of(self.prompts), of(self.rows), models, self.factors)


class TokenFacts(TypedDict, total=False):
    """Further facts of sampled tokens, which `judge_rollouts` and `RolloutJudge.step` take by name."""

    rows: Sequence[Hashable] | None
    """Row of each token, that is, the answer that it belongs to; by it, faults of some answers are found"""
    positions: Sequence[int] | None
    """Position of each token in its row; by it, rows that are there twice are found"""
    earlier: Sequence[Logprobs]
    """The trainer's logprobs with the adapter of one step before, of two steps before, and so on"""
    faults: Mapping[str, Candidate | float]
    """Logprobs of other models that the engine could have, with None at tokens for which they were not computed, or
    factors on delta_W, by name; see `scale_faults`. Half and twice are always compared"""
    engine_prompt_ids: Sequence[Hashable] | None
    """Prompt of each token as the engine has read it; None if it does not tell"""


def read_tokens(
    e: Logprobs, a: Logprobs, b: Logprobs, prompt_ids: Sequence[Hashable], facts: TokenFacts
) -> SampledTokens | str:
    """Check arrays of tokens; arrays that show nothing give a sentence that says why. Arguments: `judge_rollouts`."""
    rows, positions = facts.get("rows"), facts.get("positions")
    earlier, faults = facts.get("earlier", ()), facts.get("faults", {})
    if odd_names := [name for name in faults if not is_name(name)]:
        return (
            f"the fault {odd_names[0]!r} cannot be told apart by its name, expected 1 to 80 printable characters "
            "that do not name the base model"
        )
    models: dict[str, Any] = {STALE_BY.format(steps): each for steps, each in enumerate(earlier, start=1)}
    models |= {name: each for name, each in faults.items() if not isinstance(each, Real)}
    factors = {name: float(each) for name, each in faults.items() if isinstance(each, Real)}
    given = {"e": e, "a": a, "b": b, "prompt_ids": prompt_ids, "rows": rows, "positions": positions}
    arrays = {name: _plain(each) for name, each in given.items() if each is not None}
    others = {name: _plain(each) for name, each in models.items()}
    lengths = [(name, len(each)) for name, each in (*arrays.items(), *others.items())]
    if len({length for _, length in lengths}) > 1:
        told = ", ".join(f"{name} {length}" for name, length in lengths)
        return f"the arrays have different lengths ({told}), expected one value for each sampled token in all of them"
    if not arrays["e"]:
        return "there are no tokens, expected the sampled tokens of a step; is the mask of the answers empty?"
    try:
        values = {name: [float(value) for value in arrays[name]] for name in ("e", "a", "b")}
        known = {name: [math.nan if v is None else float(v) for v in each] for name, each in others.items()}
    except (TypeError, ValueError) as error:
        return f"a logprob is not a number ({error}), expected flat arrays of logprobs in nats"
    computed = [(name, [v for v in each if v is not None]) for name, each in others.items()]
    for name, mine in (*values.items(), *computed):
        if odd := sum(not is_logprob(value) for value in mine):
            return (
                f"{odd} of {len(mine)} logprobs in {name} are NaN, infinite or above 0, expected logprobs in nats: "
                "leave out the tokens that the trainer masks"
            )
    if odd_factors := [name for name, factor in factors.items() if not math.isfinite(factor)]:
        return f"the factor {odd_factors[0]} is not a finite number"
    prompts = arrays["prompt_ids"]
    if len({*prompts}) < 2:
        return "all tokens follow one prompt, expected two or more prompts, which show how far prompts differ"
    found = SampledTokens(values["e"], values["a"], values["b"], prompts, arrays.get("rows", prompts), known, factors)
    return _twice(found, arrays["positions"] if {"rows", "positions"} <= arrays.keys() else None) or found


def _plain(values: Any) -> list[Any]:
    """Values of an array or a tensor as Python objects that can be compared and hashed; a list becomes a tuple."""
    listed = values.tolist() if hasattr(values, "tolist") else values
    return [tuple(each) if isinstance(each, list) else each for each in listed]


LEAST, EPSILON = -1e4, 1e-3
"""Smallest logprob of a token in nats, and largest one: rounding may lift that of a certain token above 0."""


def is_logprob(value: float) -> bool:
    """Whether a number is a logprob in nats."""
    return LEAST <= value <= EPSILON


def is_name(name: str) -> bool:
    """Whether a text can name a model: some printable characters, and not the name of the base model."""
    return 0 < len(name) <= 80 and name.isprintable() and name != NOT_APPLIED


def _twice(tokens: SampledTokens, positions: Sequence[int] | None) -> str | None:
    """Say which row has two prompts, or one position twice, as if rows of replicas were gathered with equal numbers."""
    prompt_of: dict[Hashable, Hashable] = {}
    at: dict[tuple[Hashable, int], tuple[float, float]] = {}
    for index, (row, prompt) in enumerate(zip(tokens.rows, tokens.prompts, strict=True)):
        if prompt_of.setdefault(row, prompt) != prompt:
            return f"row {row!r} has tokens of two prompts, expected one prompt for each row"
        if positions is not None:
            place, mine = (row, int(positions[index])), (tokens.engine[index], tokens.right[index])
            first = at.setdefault(place, mine)
            if len(at) <= index:
                how = "with equal logprobs" if first == mine else f"and disagrees: {first} and {mine} nats for e and a"
                return (
                    f"position {place[1]} of row {row!r} is there twice, {how}; number the rows of all replicas anew, "
                    "and give each token once"
                )
    return None
