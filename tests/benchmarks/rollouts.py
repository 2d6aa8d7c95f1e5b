"""False alarms of the judge of rollouts, and the step at which it names faults, beside two rules by one number.

    cd tests && ../.venv/bin/python -m benchmarks.rollouts
    cd tests && ../.venv/bin/python -m benchmarks.rollouts --write

With `--write`, only the table of `docs/rollouts.md` is made, and written into the page.

Right engines are judged in drawn runs: those of SmolLM2 that `benchmarks.rollout_noise` recorded, whose prompts are
drawn with replacement at each step, and in made-up windows, whose noise has heavy tails and is partly shared by a and
c. Faults are planted in the recorded runs (`support.recorded_rollouts`). The rules by one number, the mean of |e - a|
and that of e - a (KL), get the best threshold of each run without a false alarm: the largest value that a right engine
had at any step, which nobody knows beforehand. They are shown as well with what somebody can know: a multiple of the
value at the step where B = 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from loraover.common.atomic_output import publish_text
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
from loraover_serve.rollouts.case import ALARM, HALF_WAY, RELIABLE

from benchmarks.page import ROOT, replaced
from benchmarks.rollout_noise import NEW_TOKENS
from benchmarks.shown import console, table_of, to_markdown
from oracles.prompt_estimates import Projections, strength
from support.recorded_rollouts import PLANTED, planted, recorded

PAGE = ROOT / "docs" / "rollouts.md"
RUNS, BATCH, RUN_BATCH = 10_000, 500, 100
RATIOS, NOISE = (0.5, 1.0, 2.0, 5.0, 20.0), 0.03
WINDOWS = (1, 2, 4, 8)
MULTIPLES = (1.5, 2.0, 3.0)
"""Multiples of a number's value at B = 0 from which on it may count as an alarm."""

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def differs(
    e: Floats, a: Floats, models: Sequence[Floats], noise: float | Floats, distinct: NDArray[np.intp] | None = None
) -> Bools:
    """Whether the judge finds a fault in each of many windows; arrays of shape (runs, prompts, tokens).

    Args:
        e: Logprobs of the engine.
        a: Logprobs of the right model.
        models: Logprobs of the others, the base model first.
        noise: The noise, which is known: that of all windows, or of each.
        distinct: Number of distinct prompts of each window, which are what the judge counts; None if all are.
    """
    noise = np.broadcast_to(noise, len(e))
    prompts = np.full(len(e), e.shape[1]) if distinct is None else distinct
    found = np.zeros(len(e), bool)
    for index, c in enumerate(models):
        effect = np.sqrt(np.square(a - c).mean((1, 2)))
        kept = 1 - 2 * noise**2 / effect**2
        x, w = (e - c) * (a - c), np.square(a - c)
        along = strength(Projections(x, w, w))
        half = np.where(prompts >= FEW_PROMPTS, along.half, np.inf)
        certain = CERTAIN * (noise + FLOOR) * np.sqrt(e[0].size / along.weight)
        certain = np.where(noise <= EXACT, certain, np.inf)
        alarm = np.where(half <= kept / 2, half, ALARM * half)
        found |= along.value + np.minimum(alarm, certain) < HALF_WAY
        size = w.sum(-1)
        part, clear = x.sum(-1) / size, size > (2 * CERTAIN * (noise + FLOOR))[:, None] ** 2
        bad = (clear & (np.abs(part) <= ROUNDED_WAY)).sum(-1)
        good = (clear & (np.abs(part - 1) <= ROUNDED_WAY)).sum(-1)
        found |= (
            (kept >= RELIABLE) & (bad >= FEW_AS_BASE) & (good >= FEW_AS_BASE) & (bad + good >= NEARLY * clear.sum(-1))
        )
        if index == 0:
            low = np.where(noise > EXACT, np.maximum(kept, 0) - ROUNDED_STRENGTH, 1 - EXACT_STRENGTH)
            high = np.where(noise > EXACT, 1 + ROUNDED_STRENGTH, 1 + EXACT_STRENGTH)
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


def drawn_runs(kept: dict[str, Floats], draw: np.random.Generator, runs: int) -> Bools:
    """Whether any step of whole runs of a right engine differs, in any window; each step's prompts are drawn anew."""
    steps, prompts, _ = kept["right"].shape
    chosen = draw.integers(prompts, size=(steps, runs, prompts))
    e, a, b, c = (np.stack([kept[n][k][chosen[k]] for k in range(steps)]) for n in RIGHT)
    noise, found = np.sqrt(np.square(e[0] - a[0]).mean((1, 2))), np.zeros(runs, bool)
    distinct = 1 + (np.diff(np.sort(chosen), axis=-1) > 0).sum(-1)  # (steps, runs)
    for last in range(1, steps):
        for window in sorted({min(last, each) for each in WINDOWS}):
            steps_of = slice(last + 1 - window, last + 1)
            joined = [np.concatenate(list(each[steps_of]), axis=1) for each in (e, a, b, c)]
            found |= differs(joined[0], joined[1], joined[2:], noise, distinct[steps_of].sum(0))
    return found


RIGHT = ("sampled", "right", "base", "stale by 1")


def false_alarms(runs: int) -> Iterator[tuple[str, int, int]]:
    """Yield windows and runs of right engines in words, their number, and how many of them differ."""
    for ratio in RATIOS:
        for prompts in (8, 32):
            draw = np.random.default_rng(0)
            drawn = (made_up(draw, ratio, prompts) for _ in range(RUNS // BATCH))
            yield (
                f"windows made up, {prompts} prompts, effect {ratio:g} x noise",
                RUNS,
                sum(int(differs(*each, NOISE).sum()) for each in drawn),
            )
    for number_format in ("bf16", "fp32"):
        kept, draw = recorded(number_format), np.random.default_rng(0)
        found = sum(int(drawn_runs(kept, draw, RUN_BATCH).sum()) for _ in range(max(1, runs // RUN_BATCH)))
        yield f"runs of {len(kept['right'])} steps, SmolLM2 in {number_format}", runs, found


def first_above(values: Sequence[float], threshold: float) -> int | None:
    """The first step whose value is above a threshold."""
    return next((step for step, value in enumerate(values) if value > threshold), None)


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


def seen_at(number_format: str) -> Iterator[tuple[str, ...]]:
    """Yield each fault, and the steps at which the judge and the rules by one number see it."""
    kept = recorded(number_format)
    right = scalars(planted(kept))
    for fault, words in {"": "none", **PLANTED}.items():
        steps = planted(kept, fault, scales=True)
        at, named = named_at(steps)
        rules = []
        for mine, its in zip(scalars(steps), right, strict=True):
            rules.append(first_above(mine, max(its)))
        known = [first_above(scalars(steps)[0], factor * right[0][0]) for factor in MULTIPLES]
        cells = ["never" if each is None else str(each) for each in (at, *rules, *known)]
        yield words, cells[0], named, *cells[1:]


def measure(runs: int) -> Iterator[Table]:
    """Yield the tables."""
    for number_format in ("bf16", "fp32"):
        heads = [f"{factor:g} times B = 0" for factor in MULTIPLES]
        title = f"Step at which a fault is seen: SmolLM2 in {number_format}"
        table = table_of(title, "fault", "judge", "it names", "mean of |e - a|", "KL", *heads)
        for cells in seen_at(number_format):
            table.add_row(*cells)
        table.caption = "Steps are counted from 0, where B = 0."
        yield table
    table = table_of("Right engines that the judge of rollouts calls differing", "what", "drawn", "differ")
    for name, drawn, found in false_alarms(runs):
        table.add_row(name, f"{drawn:,}", str(found))
    yield table


def table_of_page() -> Table:
    """The table of the documentation, whose safe threshold is the largest of `MULTIPLES`."""
    heads = ("bfloat16: judge", "best", "safe", "KL, best", "float32: judge", "best", "KL, best")
    table = table_of("", "fault", *heads)
    for rounded, exact in zip(seen_at("bf16"), seen_at("fp32"), strict=True):
        words, judge, _, best, divergence, *_, safe = rounded
        table.add_row(words, judge, best, safe, divergence, exact[1], *exact[3:5])
    return table


@click.command()
@click.option("--runs", default=RUNS, help="Number of whole runs that are drawn.")
@click.option("--write", is_flag=True, help="Write the table of the recorded runs into the documentation.")
def main(runs: int, write: bool) -> None:
    """Show the tables."""
    if write:
        table = to_markdown(table_of_page())
        publish_text(PAGE, replaced(PAGE.read_text(encoding="utf-8"), "rollouts", f"\n{table}\n", PAGE))
        return
    for each in measure(runs):
        console().print(each)


if __name__ == "__main__":
    main()
