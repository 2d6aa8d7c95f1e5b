"""Print how often a study's intervals contain the true difference, in simulations of four seeds and 121 examples.

    .venv/bin/python docs/study/intervals.py

Beside the rule of `loraover_lab.study.analysis` stands one with S - 1 degrees of freedom for all of the error, which an
earlier rule had.
"""

from __future__ import annotations

import numpy as np
from scipy import stats

from loraover_lab.study.analysis import LEVEL, Spread

FREEDOM = (3, 120)
OF_SEEDS = (0.0, 0.1, 1.0, 10.0)
"""Variances of the seeds' means, where that of the examples' is 1."""
STUDIES = 20_000


def simulate(of_seeds: float) -> tuple[float, float, float]:
    """Return the coverage of the rule and of the other one, and the ratio of their mean widths."""
    draw = np.random.default_rng(5)
    true = np.array([of_seeds, 1.0])
    means = np.sqrt(true.sum()) * draw.standard_normal(STUDIES)
    found = np.stack([v * draw.chisquare(f, STUDIES) / f for v, f in zip(true, FREEDOM, strict=True)], axis=1)
    halves = np.array([Spread((float(s), float(e)), FREEDOM).half(LEVEL) for s, e in found])
    others = stats.t.isf(LEVEL / 2, FREEDOM[0]) * np.sqrt(found.sum(axis=1))
    covered, covered_by_others = (float((np.abs(means) <= half).mean()) for half in (halves, others))
    return covered, covered_by_others, float(halves.mean() / others.mean())


print(
    "| seeds' share of the variance | contains the true difference | the same with S - 1 degrees of freedom "
    "| width / width with these |"
)
print("| ---: | ---: | ---: | ---: |")
for of_seeds in OF_SEEDS:
    covered, covered_by_others, width = simulate(of_seeds)
    print(f"| {of_seeds / (1 + of_seeds):.0%} | {covered:.1%} | {covered_by_others:.1%} | {width:.2f} |")
