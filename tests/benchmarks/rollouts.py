"""False alarms of the judge of rollouts, and the step at which it names faults, beside two rules by one number.

    cd tests && ../.venv/bin/python -m benchmarks.rollouts

Right engines are judged in drawn windows: prompts of the recorded loop of SmolLM2 (`benchmarks.rollout_noise`), drawn
with replacement, and made-up ones, whose noise has heavy tails and is partly shared by a and c. Faults are planted in
made-up loops (`support.rollout_loop`) and in the recorded one, where the noise of sampling is added to the fault's
logprobs. The rules by one number, the mean of |e - a| and that of e - a (KL), get the best threshold of each loop
without a false alarm: the largest value that a right engine had at any step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from loraover_serve import RolloutJudge
from loraover_serve.judge.case import sure_errors
from loraover_serve.judge.limits import (
    CERTAIN,
    EXACT,
    EXACT_STRENGTH,
    FEW_AS_BASE,
    FEW_PROMPTS,
    FLOOR,
    ROUNDED_STRENGTH,
)
from loraover_serve.judge.search import NEARLY, ROUNDED_WAY
from loraover_serve.rollouts.verdict import ALARM, HALF_WAY, RELIABLE

from benchmarks.rollout_noise import KEPT, NEW_TOKENS, PROMPTS
from benchmarks.shown import console, table_of
from oracles.prompt_estimates import Projections, strength
from support.rollout_loop import EXACT as FINE
from support.rollout_loop import ROUNDED, Loop

RUNS, BATCH = 10_000, 500
RATIOS, NOISE = (0.5, 1.0, 2.0, 5.0, 20.0), 0.03
STEPS = 16
FAULTS = ("base", "stale by 1", "times 0.5", "times 2", "another", "attention", "temperature", "mixed base")

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def differs(e: Floats, a: Floats, models: Sequence[Floats], noise: float) -> Bools:
    """Whether the judge finds a fault in each of many windows; arrays of shape (runs, prompts, tokens).

    Args:
        e: Logprobs of the engine.
        a: Logprobs of the right model.
        models: Logprobs of the others, the base model first.
        noise: The noise, which is known.
    """
    found = np.zeros(len(e), bool)
    for index, c in enumerate(models):
        effect = np.sqrt(np.square(a - c).mean((1, 2)))
        kept = 1 - 2 * noise**2 / effect**2
        x, w = (e - c) * (a - c), np.square(a - c)
        along = strength(Projections(x, w, w))
        half = along.half if e.shape[1] >= FEW_PROMPTS else np.full(len(e), np.inf)
        certain = CERTAIN * np.sqrt(2) * (noise + FLOOR) / effect if noise <= EXACT else np.inf
        alarm = np.where(half <= kept / 2, half, ALARM * half)
        found |= along.value + np.minimum(alarm, certain) < HALF_WAY
        size = w.sum(-1)
        part, clear = x.sum(-1) / size, size > (2 * CERTAIN * (noise + FLOOR)) ** 2
        bad = (clear & (np.abs(part) <= ROUNDED_WAY)).sum(-1)
        good = (clear & (np.abs(part - 1) <= ROUNDED_WAY)).sum(-1)
        found |= (
            (kept >= RELIABLE) & (bad >= FEW_AS_BASE) & (good >= FEW_AS_BASE) & (bad + good >= NEARLY * clear.sum(-1))
        )
        if index == 0:
            low, high = (1 - EXACT_STRENGTH, 1 + EXACT_STRENGTH)
            if noise > EXACT:
                low, high = np.maximum(kept, 0) - ROUNDED_STRENGTH, 1 + ROUNDED_STRENGTH
            half = np.minimum(ALARM * half, certain)
            found |= (kept >= RELIABLE) & ((along.value + half < low) | (along.value - half > high))
    squares = np.square(e - a).mean(-1)
    rms = np.sqrt(squares.mean(-1))
    error = squares.std(-1, ddof=1) / np.sqrt(squares.shape[1]) / (2 * rms)
    return np.asarray(found | (rms - sure_errors(squares.shape[1]) * error > CERTAIN * (noise + FLOOR)))


def made_up(
    draw: np.random.Generator, ratio: float, prompts: int, runs: int = BATCH
) -> tuple[Floats, Floats, list[Floats]]:
    """Windows of a right engine: logprobs of the engine, the right model, the base model and an earlier adapter."""
    shape = (runs, prompts, NEW_TOKENS)
    size = np.exp(draw.normal(size=shape)) * np.exp(0.5 * draw.normal(size=(runs, prompts, 1)))
    size *= NOISE / np.sqrt(np.exp(2.0) * np.exp(0.5))

    def rounding() -> Floats:
        return np.asarray(size * draw.standard_t(4, size=shape) / 2)

    shared, change = rounding(), ratio * size * draw.normal(size=shape)
    before = change * 0.8 + 0.2 * ratio * size * draw.normal(size=shape)
    a, b, c = (each + np.sqrt(0.5) * (shared + rounding()) for each in (change, 0 * change, before))
    return change + rounding(), a, [b, c]


def recorded() -> dict[str, Floats]:
    """The recorded loop: arrays of shape (steps, prompts, tokens)."""
    with np.load(KEPT) as file:
        return {name: file[name].astype(np.float64) for name in file.files}


def resampled(
    kept: dict[str, Floats], draw: np.random.Generator, step: int, runs: int = BATCH
) -> tuple[Floats, Floats, list[Floats]]:
    """Windows of 16 prompts of a step of the recorded loop, or of all its steps with an adapter if the step is 0."""
    arrays = [kept[n][1:] if step == 0 else kept[n][step] for n in ("sampled", "right", "base", "stale")]
    flat = [each.reshape(-1, NEW_TOKENS) for each in arrays]
    chosen = draw.integers(len(flat[0]), size=(runs, 2 * PROMPTS))
    e, a, *models = (each[chosen] for each in flat)
    return e, a, models


def false_alarms() -> Iterator[tuple[str, int, int]]:
    """Yield windows of right engines in words, their number, and how many of them differ."""
    for ratio in RATIOS:
        for prompts in (8, 32):
            draw = np.random.default_rng(0)
            drawn = (made_up(draw, ratio, prompts) for _ in range(RUNS // BATCH))
            yield (
                f"made up, {prompts} prompts, effect {ratio:g} x noise",
                RUNS,
                sum(int(differs(*each, NOISE).sum()) for each in drawn),
            )
    kept = recorded()
    noise = float(np.sqrt(np.square(kept["sampled"][0] - kept["right"][0]).mean()))
    for step in range(len(kept["sampled"])):
        draw = np.random.default_rng(step)
        drawn = (resampled(kept, draw, step) for _ in range(RUNS // BATCH))
        name = "all steps" if step == 0 else f"step {step}"
        yield (
            f"SmolLM2 in bfloat16, 16 prompts of {name}",
            RUNS,
            sum(int(differs(*each, noise).sum()) for each in drawn),
        )


def first_above(values: Sequence[float], threshold: float) -> int | None:
    """The first step whose value is above a threshold."""
    return next((step for step, value in enumerate(values) if value > threshold), None)


def loop_arrays(grid: float, fault: str, seed: int) -> list[dict[str, Any]]:
    """Arguments of the judge at each step of a made-up loop."""
    return [step.given for step in Loop(seed, grid, 0.03, fault).steps(STEPS)]


def recorded_arrays(kept: dict[str, Floats], fault: str) -> list[dict[str, Any]]:
    """Arguments of the judge at each step of the recorded loop."""
    names = {"": "right", "base": "base", "stale by 1": "stale", "times 0.5": "half"}
    ids, found = np.repeat(np.arange(PROMPTS), NEW_TOKENS), []
    for step in range(len(kept["sampled"])):
        mine = {name: values[step].ravel() for name, values in kept.items()}
        noise = mine["sampled"] - mine["right"]
        served = mine["right"].copy() if fault == "mixed base" else mine[names.get(fault, fault)]
        if fault == "mixed base":
            served[: len(ids) // 2] = mine["base"][: len(ids) // 2]
        faults = {name: mine[name] for name in ("attention", "temperature", "template")}
        more = {"earlier": [mine["stale"]], "faults": faults, "rows": ids, "prompt_ids": ids + step * PROMPTS}
        found.append({"e": np.minimum(served + noise, 0), "a": mine["right"], "b": mine["base"], **more})
    return found


def named_at(steps: Sequence[dict[str, Any]]) -> tuple[int | None, str]:
    """The first step at which a loop differs, and the fault that the judge then names."""
    judge = RolloutJudge()
    for index, step in enumerate(steps):
        found = judge.step(**step)
        if found.verdict == "differs":
            return index, found.suspects[0].detail if found.suspects else str(found.fault)
    return None, ""


def scalars(steps: Sequence[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Mean of |e - a|, and of e - a, at each step."""
    off = [np.asarray(step["e"]) - np.asarray(step["a"]) for step in steps]
    return [float(np.abs(each).mean()) for each in off], [float(each.mean()) for each in off]


def measure() -> Iterator[Table]:
    """Yield the tables."""
    table = table_of("Right engines that the judge of rollouts calls differing", "windows", "drawn", "differ")
    for name, drawn, found in false_alarms():
        table.add_row(name, f"{drawn:,}", str(found))
    yield table
    kept = recorded()
    table = table_of("Step at which a fault is seen", "loop", "fault", "judge", "it names", "mean of |e - a|", "KL")
    loops: list[tuple[str, Sequence[str], Callable[[str], list[dict[str, Any]]]]] = [
        ("made up, float32", FAULTS, lambda fault: loop_arrays(FINE, fault, 1)),
        ("made up, bfloat16", FAULTS, lambda fault: loop_arrays(ROUNDED, fault, 1)),
        (
            "SmolLM2, bfloat16",
            [each for each in FAULTS if each not in ("times 2", "another")],
            lambda fault: recorded_arrays(kept, fault),
        ),
    ]
    for name, faults, arrays in loops:
        limits = [max(each) for each in scalars(arrays(""))]
        for fault in ("", *faults):
            steps = arrays(fault)
            at, named = named_at(steps)
            by_rule = [first_above(each, limit) for each, limit in zip(scalars(steps), limits, strict=True)]
            cells = ["never" if each is None else str(each) for each in (at, *by_rule)]
            table.add_row(name, fault or "none", cells[0], named, *cells[1:])
    table.caption = (
        "Steps are counted from 0, where B = 0. Each rule by one number has the best threshold without a false alarm "
        "in its loop, which nobody knows beforehand; neither names a fault."
    )
    yield table


if __name__ == "__main__":
    for each in measure():
        console().print(each)
