"""Derive the limits of verify's rules from recorded engines, and write the figure and the table of docs/verify.md.

    cd tests && ../.venv/bin/python -m benchmarks.verify_calibration

The answers are those that `benchmarks.verify_noise` recorded. A set of 32 prompts is drawn as
`support.recorded_noise` says.
"""

from __future__ import annotations

import math
from pathlib import Path

import click
import numpy as np
from scipy import stats

from loraover.reporting.figures import Band, FigureRow, Point, rows_figure
from loraover.reporting.svg import Axis
from loraover_serve.judge.limits import BY_CHANCE, FEW_AS_BASE, NUMBER_FORMATS
from loraover_serve.verify.request import RecordRequest

from oracles.prompt_estimates import log_ratios
from support.recorded_noise import Recorded

DOCS = Path(__file__).parents[2] / "docs"
START, END = "<!-- begin calibration -->", "<!-- end calibration -->"
SERVED = {"right": "adapter", "0.8 times": "weak", "1.2 times": "strong", "base": "again"}
PROMPTS, RUNS, WRONG_RUNS = 32, 40_000, 500
BATCH = 500
TOP = 20  # logprobs that most servers give
STEP = 0.01
"""Multiple to which a limit is rounded up."""


def least_excess(engines: list[Recorded]) -> float:
    """Excess, as a ratio, that a right adapter on an engine like these exceeds once in 10,000 engines."""
    return math.exp(predicted([float(log_ratios(each.excess("adapter")).value) for each in engines]))


def least_deviation(engines: list[Recorded]) -> float:
    """Deviation of the strength, beyond twice what PyTorch shows, that one engine in 10,000 like these exceeds."""
    beyond = []
    for each in engines:
        low, high = 2 * min(each.bias, 1.0) - 1, 2 * max(each.bias, 1.0) - 1
        value = float(each.strength("adapter").value)
        beyond.append(max(low - value, value - high, 0.0))
    return predicted(beyond)


def least_certain(engines: list[Recorded]) -> float:
    """Multiple of the noise that FEW_AS_BASE of PROMPTS prompts of one engine in 10,000 like these exceed.

    A prompt has as few positions as a reference by default, since more of them are closer to one another. For an engine
    it is the multiple that so many prompts exceed once in 10,000 checks, if the logarithms are normal.
    """
    share = float(stats.beta.ppf(BY_CHANCE, FEW_AS_BASE, PROMPTS - FEW_AS_BASE + 1))
    found = []
    for each in engines:
        asked = each.cut(RecordRequest.new_tokens, TOP)
        logs = np.log(asked.multiples("adapter", np.arange(len(asked.effect))))
        found.append(float(np.mean(logs) + stats.norm.isf(share) * np.std(logs, ddof=1)))
    return math.exp(predicted(found))


def predicted(values: list[float]) -> float:
    """The upper limit of one more value of a normal population, which chance exceeds once in 10,000 cases."""
    number, spread = len(values), float(np.std(values, ddof=1))
    quantile = float(stats.t.isf(BY_CHANCE, number - 1))
    return float(np.mean(values)) + quantile * spread * math.sqrt(1 + 1 / number)


def rounded_up(limit: float) -> float:
    """A limit as the code has it."""
    return round(math.ceil(limit / STEP) * STEP, 2)


def main() -> None:
    """Print the limits, and write the figure and the table."""
    engines = sorted(Recorded.all(), key=lambda each: NUMBER_FORMATS.index(each.number_format))
    excess, deviation = least_excess(engines), least_deviation(engines)
    click.echo(f"EXCESS: {excess:.3f}, rounded up {rounded_up(excess)}")
    click.echo(f"CERTAIN: {least_certain(engines):.3f}, rounded up to a whole number")
    click.echo(f"ROUNDED_STRENGTH: {deviation:.3f}, rounded up {rounded_up(deviation)}")
    heads = ["engine", "allowed", *SERVED, "passes"]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    rows = []
    for each in engines:
        lines.append(_line(each))
        click.echo(lines[-1])
        rows += [_row(each, served, arm) for served, arm in SERVED.items()]
    figure = rows_figure("verify-strength", "Strength by engine", rows, Axis.around("strength", [0.0, 1.25]))
    (DOCS / "figures" / f"{figure.name}.svg").write_text(figure.file(), encoding="utf-8")
    page = (DOCS / "verify.md").read_text(encoding="utf-8")
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    table = "\n".join(lines)
    (DOCS / "verify.md").write_text(f"{before}{START}\n\n{table}\n\n{END}{after}", encoding="utf-8")


def _row(engine: Recorded, served: str, arm: str) -> FigureRow:
    found = engine.strength(arm)
    value, low, high = (float(each) for each in (found.value, found.low, found.high))
    note = f"{value:.2f} [{low:.2f}, {high:.2f}]"
    return FigureRow(f"{engine.name}: {served}", note, [Point(value, "subject")], (low, high), [Band(*engine.allowed)])


def _line(engine: Recorded) -> str:
    """The line of the table: shares of sets of prompts that are called differing, or as trained."""
    draw, cells, narrow = np.random.default_rng(0), [], 0.0
    for arm in SERVED.values():
        runs = RUNS if arm == "adapter" else WRONG_RUNS
        found = [engine.judged(arm, draw, BATCH, PROMPTS) for _ in range(runs // BATCH)]
        differs = np.concatenate([each.differs for each in found])
        cells.append(f"{np.sum(differs)}" if arm == "adapter" else f"{np.mean(differs):.1%}")
        if arm == "adapter":
            narrow = float(np.mean(~differs & np.concatenate([each.narrow for each in found])))
    low, high = engine.allowed
    return f"| {engine.name} | {low:.2f}..{high:.2f} | {' | '.join(cells)} | {narrow:.1%} |"


if __name__ == "__main__":
    main()
