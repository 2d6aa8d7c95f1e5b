"""Sampled tokens with their logprobs by the engine and by known models, checked once."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

Logprobs = Sequence[float]
"""Logprobs in nats of the sampled tokens, one for each; any sequence of numbers, such as a list or a flat array."""

STALE_BY = "stale by {}"
"""Name of an earlier adapter, by the number of steps that it is behind."""


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
        """At most about so many tokens, spread evenly over all rows."""
        every = slice(None, None, max(1, math.ceil(len(self.engine) / tokens)))
        models = {name: values[every] for name, values in self.models.items()}
        engine, right, base = (each[every] for each in (self.engine, self.right, self.base))
        return SampledTokens(engine, right, base, self.prompts[every], self.rows[every], models, self.factors)


def read_tokens(
    e: Logprobs,
    a: Logprobs,
    b: Logprobs,
    prompt_ids: Sequence[Hashable],
    rows: Sequence[Hashable] | None,
    positions: Sequence[int] | None,
    earlier: Sequence[Logprobs],
    faults: Mapping[str, Logprobs | float],
) -> SampledTokens | str:
    """Check arrays of tokens; arrays that show nothing give a sentence that says why. Arguments: `judge_rollouts`."""
    models: dict[str, Any] = {STALE_BY.format(steps): each for steps, each in enumerate(earlier, start=1)}
    models |= {name: each for name, each in faults.items() if not isinstance(each, Real)}
    factors = {name: float(each) for name, each in faults.items() if isinstance(each, Real)}
    given = {"e": e, "a": a, "b": b, "prompt_ids": prompt_ids, "rows": rows, "positions": positions} | models
    arrays = {name: _plain(each) for name, each in given.items() if each is not None}
    lengths = {name: len(each) for name, each in arrays.items()}
    if len({*lengths.values()}) > 1:
        told = ", ".join(f"{name} {length}" for name, length in lengths.items())
        return f"the arrays have other lengths ({told}), expected one value for each sampled token in all of them"
    if not lengths["e"]:
        return "there are no tokens, expected the sampled tokens of a step; is the mask of the answers empty?"
    try:
        values = {name: [float(value) for value in arrays[name]] for name in ("e", "a", "b", *models)}
    except (TypeError, ValueError) as error:
        return f"a logprob is not a number ({error}), expected flat arrays of logprobs in nats"
    for name, mine in values.items():
        if odd := sum(not -math.inf < value <= EPSILON for value in mine):
            return (
                f"{odd} of {len(mine)} logprobs in {name} are NaN, infinite or above 0, expected logprobs in nats: "
                "leave out the tokens that the trainer masks"
            )
    if odd_factors := [name for name, factor in factors.items() if not math.isfinite(factor)]:
        return f"the factor {odd_factors[0]} is not a finite number"
    prompts = arrays["prompt_ids"]
    if len({*prompts}) < 2:
        return "all tokens follow one prompt, expected two or more: nothing shows how far prompts differ"
    known = {name: values[name] for name in models}
    found = SampledTokens(values["e"], values["a"], values["b"], prompts, arrays.get("rows", prompts), known, factors)
    return _twice(found, arrays["positions"] if {"rows", "positions"} <= arrays.keys() else None) or found


def _plain(values: Any) -> list[Any]:
    """The values of an array or a tensor as Python's own, by which equal ones are one; token ids become a tuple."""
    listed = values.tolist() if hasattr(values, "tolist") else values
    return [tuple(each) if isinstance(each, list) else each for each in listed]


EPSILON = 1e-3
"""Nats above 0 that rounding gives the logprob of a token that is certain."""


def _twice(tokens: SampledTokens, positions: Sequence[int] | None) -> str | None:
    """Say which row has two prompts, or twice the same position, as gathered replicas that repeat rows have."""
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
