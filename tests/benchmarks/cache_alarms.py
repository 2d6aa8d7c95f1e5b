"""Count the false alarms of verify's checks of caches, reloads and churn on right servers that are drawn.

    cd tests && ../.venv/bin/python -m benchmarks.cache_alarms [--runs 10000]

The questions are those of a tiny model's reference. The noise is that of float32, as rounding to bfloat16 moves
the base model, and a sixth and a third of what the earlier version's keys and values change, as on SmolLM2 in Q8_0 and
in bfloat16. Half of its square is common to all questions, as that of keys and values of one beginning is.
"""

from __future__ import annotations

import math
import random
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import click

from loraover_serve.judge.limits import ADAPTER
from loraover_serve.judge.names import STALE_OF_EARLIER

from support.long_questions import make_long_case
from support.resampled_caches import RightServer

FLOAT32 = 2e-5
"""Noise, in nats, of which vLLM in float32 has less between warm and cold answers."""

ANSWERS = 60  # in a churn
CHECKS = ("--caches", "--reload", "--churn")
NOISES = ("float32", "bf16", "a sixth of the effect", "a third of the effect")


@click.command()
@click.option("--runs", default=10_000, help="Number of servers of each kind.")
@click.option("--first", default=0, help="First of their seeds, to draw so many in parts.")
@click.option("--check", "checks", multiple=True, default=CHECKS, type=click.Choice(CHECKS), help="Kind of the checks.")
@click.option(
    "--noise", "noises", multiple=True, default=NOISES, type=click.Choice(NOISES), help="Noise of the servers."
)
def main(runs: int, first: int, checks: Sequence[str], noises: Sequence[str]) -> None:
    """Print the verdicts on right servers."""
    with tempfile.TemporaryDirectory() as scratch:
        long = make_long_case(Path(scratch)).caches
    stale = next(each for each in long.recorded(ADAPTER) if each.fault == STALE_OF_EARLIER)
    pairs = zip(stale.rows, long.adapter.rows, strict=True)
    effect = math.sqrt(fmean((row[i] - right[i]) ** 2 for row, right in pairs for i in row))
    known = dict(zip(NOISES, (FLOAT32, long.rounding("bf16"), effect / 6, effect / 3), strict=True))
    for name, rms in ((name, known[name]) for name in noises):
        for check in checks:
            found = Counter[str]()
            for seed in range(first, first + runs):
                server = RightServer(long, rms, random.Random(seed))
                result = server.churn(ANSWERS) if check == "--churn" else server.caches(with_reload=check == "--reload")
                found[f"{result.verdict} {result.fault or ''}".strip()] += 1
            click.echo(f"{name} ({rms:.2g} nats) {check}: {dict(found.most_common())}")


if __name__ == "__main__":
    main()
