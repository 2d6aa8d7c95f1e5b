"""Judge engines on the weights that they have, beside float weights, and write the table of docs/verify.md.

    cd tests && ../.venv/bin/python -m benchmarks.served_weights

The answers are those that `benchmarks.verify_noise`, without and with --served, recorded. Sets of 32 prompts are drawn
as in `benchmarks.verify_calibration`.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
from scipy import stats

from loraover.common.atomic_output import publish_text

from benchmarks.page import replaced
from support.recorded_noise import NOISE, Recorded

PAGE = Path(__file__).parents[2] / "docs" / "verify.md"
PROMPTS, RUNS, WRONG_RUNS, BATCH = 32, 40_000, 500, 500
HEADS = ("engine", "weights", "base off by", "strength", "format", "right", "passes", "0.8 times", "1.2 times")


def line(engine: Recorded, weights: str) -> str:
    """Return the row of an engine: its own figures, and shares of drawn sets of prompts."""
    draw = np.random.default_rng(0)
    right = [engine.judged("adapter", draw, BATCH, PROMPTS) for _ in range(RUNS // BATCH)]
    differs, narrow = (np.concatenate([getattr(each, name) for each in right]) for name in ("differs", "narrow"))
    wrong = (engine.judged(arm, draw, WRONG_RUNS, PROMPTS).differs for arm in ("weak", "strong"))
    cells = [
        engine.name,
        weights,
        f"{engine.noise('base'):.3f}",
        f"{float(engine.strength('adapter').value):.3f}",
        engine.number_format,
        f"{np.sum(differs)}",
        f"{np.mean(~differs & narrow):.1%}",
        *(f"{np.mean(each):.1%}" for each in wrong),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table, and write it."""
    lines = [f"| {' | '.join(HEADS)} |", "| --- " * len(HEADS) + "|"]
    for engine in Recorded.on_served_weights():
        before = NOISE / f"{engine.name}.npz"
        if before.exists():
            lines.append(line(Recorded(before), "float"))
        lines.append(line(engine, "served"))
        click.echo("\n".join(lines[-2:]))
    most = 1 / float(stats.beta.ppf(0.95, 1, RUNS))
    click.echo(f"0 of {RUNS} is at most 1 in {most:.0f} (95 % confidence)")
    table = "\n".join(lines)
    publish_text(PAGE, replaced(PAGE.read_text(encoding="utf-8"), "served_weights", f"\n{table}\n", PAGE))


if __name__ == "__main__":
    main()
