"""The judge of a training loop: it judges steps together, and learns the noise while the adapter is zero."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Unpack

from loraover.common.errors import CheckpointError, ConfigError
from loraover_serve.judge.names import SCALED
from loraover_serve.rollouts.tokens import Logprobs, SampledTokens, TokenFacts
from loraover_serve.rollouts.verdict import Finding, judge_tokens, read_step

MOST = 1_000_000
"""Largest window, in steps."""

MOST_LEARNED = 0.08
"""Largest RMS difference of a right engine in bfloat16 from the trainer, in nats; recorded runs have 0.05 to 0.07."""

SCHEMA = 1
"""Version of what `state_dict` returns."""


class RolloutJudge:
    """Judge of a training loop that samples from an engine, step by step.

    Each step is judged alone, and together with the 1, 3, 7, ... steps before it, up to the window. The shortest of
    these spans that shows a fault decides, unless a shorter one excludes the fault. So a large fault is named at once,
    a small one when enough steps show it, and a fault that has ended is not named again. While the adapter is zero, a
    and b are equal, and the engine's distance from them is its noise.

    Args:
        window: Largest number of steps that are judged together.
        tokens: Number of tokens of a step that are compared, spread over its rows; some rows are drawn if there are
            many.
        noise: RMS difference of e from a where the adapter is zero, in nats; None learns it from the steps where it is.
    """

    def __init__(self, window: int = 8, *, tokens: int = 512, noise: float | None = None) -> None:
        if not (1 <= window <= MOST and tokens >= 1):
            raise ConfigError(f"window is {window}, expected 1 to {MOST}; tokens {tokens}, expected 1 or more.")
        self.window, self.tokens, self.given_noise = window, tokens, noise
        self._steps = deque[SampledTokens](maxlen=window)
        self._square, self._learned = 0.0, 0

    @property
    def noise(self) -> float | None:
        """RMS difference of a right engine from the trainer, in nats, as given or learned; None if it is not known."""
        if self.given_noise is not None or not self._learned:
            return self.given_noise
        return math.sqrt(self._square / self._learned)

    def step(
        self,
        e: Logprobs,
        a: Logprobs,
        b: Logprobs,
        prompt_ids: Sequence[Hashable],
        *,
        again: bool = False,
        **facts: Unpack[TokenFacts],
    ) -> Finding:
        """Judge a step, by the arrays that `judge_rollouts` takes; `earlier` and `faults` may be missing in some steps.

        Args:
            again: Whether the step takes the place of the last one, with logprobs of more models after an alarm.

        Returns:
            The finding. A step that cannot be judged is left out of the window.
        """
        tokens = read_step(e, a, b, prompt_ids, facts)
        if isinstance(tokens, Finding):
            return tokens
        if tokens.right == tokens.base:
            found = judge_tokens(tokens.thinned(self.tokens), self.noise)
            if found.verdict is None:
                self._square += math.fsum((e - a) ** 2 for e, a in zip(tokens.engine, tokens.right, strict=True))
                self._learned += len(tokens.engine)
            return found
        if again and self._steps:
            self._steps.pop()
        self._steps.append(tokens.thinned(self.tokens))
        return self._judged()

    def _judged(self) -> Finding:
        found: list[Finding] = []
        for length in sorted({min(2**power, len(self._steps)) for power in range(self.window.bit_length() + 1)}):
            each = judge_tokens(SampledTokens.pooled([*self._steps][-length:]), self.noise)
            if each.verdict == "differs":
                return found[-1] if any(_is_over(each, newer) for newer in found) else each
            found.append(each)
        return self._with_doubt(found[-1])

    def _with_doubt(self, found: Finding) -> Finding:
        """Withhold *as trained* if the learned noise is larger than rounding makes it, since a fault may cause it."""
        if self.given_noise is not None or found.verdict != "as trained" or found.noise <= MOST_LEARNED:
            return found
        reason = (
            "the adapter is applied, but the learned noise is larger than rounding to bfloat16 explains, and may hide "
            "another base model, template or temperature: give the noise if you know it"
        )
        return replace(found, verdict="applied, scale not known yet", reason=reason)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed loop needs, as plain JSON."""
        steps = [
            {
                "engine": one.engine,
                "right": one.right,
                "base": one.base,
                "prompts": [_to_json(each) for each in one.prompts],
                "rows": [_to_json(each) for each in one.rows],
                "models": {name: [v if v == v else None for v in each] for name, each in one.models.items()},
                "factors": one.factors,
            }
            for one in self._steps
        ]
        return {"schema": SCHEMA, "noise": {"square": self._square, "tokens": self._learned}, "steps": steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the state that `state_dict` returned.

        Args:
            state: The state, which may have been written as JSON and read again.

        Raises:
            CheckpointError: Another schema, or contents that `state_dict` does not write.
        """
        if not isinstance(state, Mapping) or state.get("schema") != SCHEMA:
            found = state.get("schema") if isinstance(state, Mapping) else type(state).__name__
            raise CheckpointError(f"state of RolloutJudge: found schema {found!r}, expected {SCHEMA}; begin anew.")
        try:
            square, learned = float(state["noise"]["square"]), int(state["noise"]["tokens"])
            steps = [_read_step(step) for step in state["steps"]]
            if not (math.isfinite(square) and square >= 0 and learned >= 0):
                raise ValueError(f"the noise is {square} of {learned} tokens")
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise CheckpointError(
                f"state of RolloutJudge: not as state_dict writes it ({error!r}); take an older one, or begin anew."
            ) from error
        self._square, self._learned = square, learned
        self._steps = deque(steps, maxlen=self.window)


def _is_over(older: Finding, newer: Finding) -> bool:
    """Whether newer steps exclude a fault that was found in them together with older steps."""
    if older.share is not None:
        return newer.verdict == "as trained" and older.share > newer.visible_share
    named = older.suspects[0].detail if older.fault not in (None, SCALED) else None
    return newer.verdict == "as trained" if named is None else named in newer.excluded


def _to_json(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_to_json(each) for each in value]
    return value if value is None or type(value) in (int, str, bool) else repr(value)


def _from_json(value: Any) -> Hashable:
    if isinstance(value, list):
        return tuple(_from_json(each) for each in value)
    if value is None or isinstance(value, int | str):
        return value
    raise ValueError(f"{value!r} is neither a prompt nor a row")


def _read_step(step: Mapping[str, Any]) -> SampledTokens:
    engine, right, base = ([_finite(value) for value in step[name]] for name in ("engine", "right", "base"))
    prompts, rows = ([_from_json(value) for value in step[name]] for name in ("prompts", "rows"))
    models = {
        str(name): [math.nan if value is None else _finite(value) for value in each]
        for name, each in step["models"].items()
    }
    factors = {str(name): _finite(value) for name, value in step["factors"].items()}
    lengths = {len(engine), len(right), len(base), len(prompts), len(rows), *map(len, models.values())}
    if len(lengths) != 1 or not engine:
        raise ValueError(f"arrays of the lengths {sorted(lengths)}")
    return SampledTokens(engine, right, base, prompts, rows, models, factors)


def _finite(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a finite number")
    return float(value)
