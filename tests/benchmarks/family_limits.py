"""Derive limits of verify from all families of models but one, judge that one by them, and write the table.

    cd tests && ../.venv/bin/python -m benchmarks.family_limits

The answers are those that `benchmarks.families` recorded. Sets of 32 prompts are drawn as `support.recorded_noise`
says, and a strength whose interval holds 1 is taken for 1. A limit is the largest value that any drawn set of the other
families has with a right adapter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np

from loraover.common.atomic_output import publish_text
from loraover_serve.judge.limits import NUMBER_FORMATS

from benchmarks.page import replaced
from support.recorded_noise import IN_USE, DrawnSets, Limits, Recorded

PAGE = Path(__file__).parents[2] / "docs" / "verify.md"
PROMPTS, RUNS, WRONG_RUNS = 32, 200, 50
VISIBLE = 4.0
"""Multiple of the noise that an adapter's effect has, of which 0.8 and 1.2 times are asked to be found."""

HEADS = (
    "left out",
    "adapters on engines",
    "excess",
    "far",
    "base further",
    "strength",
    "alarms",
    "by limits in use",
    "passes",
    "0.8 times",
    "1.2 times",
    "base",
)
NOT_RECORDED = (
    "Not recorded: Gemma on OpenVINO, which optimum-intel does not export; Phi3 on ONNX Runtime, whose swappable graph "
    "has no place for its fused layers; Qwen3Moe on ONNX Runtime, OpenVINO, MLX and vLLM, which cannot build or run "
    "the tiny model; tiny models on vLLM in bfloat16, which ends with an illegal instruction here."
)
Families = dict[tuple[str, str], list[DrawnSets]]


def derived(drawn: Sequence[DrawnSets]) -> Limits:
    """The limits that none of drawn sets of right adapters exceeds."""
    rounded = [each for each in drawn if each.engine.number_format != NUMBER_FORMATS[0]]
    return Limits(
        excess=math.exp(max(each.excess.max() for each in drawn)),
        certain=max(each.far.max() for each in drawn),
        deviation=max(0.0, *(each.deviation.max() for each in rounded)),
        nearer=math.exp(max(each.nearer.max() for each in drawn)),
    )


def line(family: str, drawn: Families) -> str:
    """The row of a family that is left out: limits of the others, and shares of its drawn sets of prompts."""
    limits = derived([each for (name, _), all_ in drawn.items() if name != family for each in all_])
    mine = {engine: all_ for (name, engine), all_ in drawn.items() if name == family}
    right, number = [each for all_ in mine.values() for each in all_], len(next(iter(mine.values())))
    known = [each.engine for each in right]
    visible = [each for each in known if np.sqrt(np.square(each.effect).mean()) > VISIBLE * each.noise("base")]
    verdicts, in_use = [each.by(limits) for each in right], [each.by(IN_USE) for each in right]
    cells = [
        family,
        f"{number} on {len(mine)}",
        f"{limits.excess:.2f}",
        f"{limits.certain:.2f}",
        f"{limits.nearer:.2f}",
        f"{limits.deviation:.3f}",
        f"{sum(int(each.differs.sum()) for each in verdicts)} of {len(right) * RUNS:,}",
        f"{sum(int(each.differs.sum()) for each in in_use)} of {len(right) * RUNS:,}",
        f"{np.mean([np.mean(~each.differs & each.narrow) for each in in_use]):.1%}",
        *(f"{_found(visible, factor):.1%}" for factor in (0.8, 1.2, 0.0)),
    ]
    return f"| {' | '.join(cells)} |"


def _found(engines: Sequence[Recorded], factor: float) -> float:
    """Share of drawn sets that differ, by the limits in use, where a part of the adapter is served."""
    served, draw = (each.partly(len(each.effect), factor) for each in engines), np.random.default_rng(1)
    return float(np.mean([each.judged("adapter", draw, WRONG_RUNS, PROMPTS).differs for each in served]))


def main() -> None:
    """Print the table, and write it."""
    draw = np.random.default_rng(0)
    drawn = {
        name: [each.without_chance().drawn("adapter", draw, RUNS, PROMPTS) for each in engines]
        for name, engines in Recorded.of_families().items()
    }
    lines = [f"| {' | '.join(HEADS)} |", "| --- " * len(HEADS) + "|"]
    for family in dict.fromkeys(name for name, _ in drawn):
        lines.append(line(family, drawn))
        click.echo(lines[-1])
    whole = derived([each for all_ in drawn.values() for each in all_])
    click.echo(f"of all: {whole}")
    table = "\n".join([*lines, "", NOT_RECORDED])
    publish_text(PAGE, replaced(PAGE.read_text(encoding="utf-8"), "family_limits", f"\n{table}\n", PAGE))


if __name__ == "__main__":
    main()
