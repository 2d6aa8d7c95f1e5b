"""Rates of wrong verdicts in simulations, with Holm's correction and the control."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from loraover_serve.engines.sample import Sample
from loraover_serve.parity.judge.analysis import overall, results
from loraover_serve.parity.samples import CONTROL, FOLDED, VANILLA, Measurement

from support.speed import simulations

pytestmark = [pytest.mark.statistical, pytest.mark.usefixtures("few_resamples")]

EXPERIMENTS, BLOCKS, MARGIN, ALPHA = simulations(500), 12, 0.05, 0.05
BEYOND = math.log1p(MARGIN) * 1.001
MOST = stats.binom.ppf(0.999, EXPERIMENTS, ALPHA) / EXPERIMENTS
"""The largest share of wrong verdicts at a rate of alpha, with a probability of 99.9 %."""


def simulated(slower: dict[str, float], draw: np.random.Generator) -> Measurement:
    """Blocks of two answers an arm; the time to first token and the times per token vary by 3 % and 4 % each."""
    samples = []
    for block in range(BLOCKS):
        for arm in (VANILLA, CONTROL, FOLDED) * 2:
            first, per_token = np.exp(slower.get(arm, 0.0) + draw.normal(0, [0.03, 0.04]))
            samples.append(Sample(arm, block, block, 0.0, (first, first + 3 * per_token), (1, 2, 3, 4)))
    return Measurement("simulated", 1, BLOCKS, tuple(samples))


def rates(slower: dict[str, float], seed: int) -> dict[str, float]:
    draw = np.random.default_rng(seed)
    verdicts = [overall(results([simulated(slower, draw)], MARGIN, ALPHA))[0] for _ in range(EXPERIMENTS)]
    return {verdict: verdicts.count(verdict) / EXPERIMENTS for verdict in ("equivalent", "different", "inconclusive")}


def test_equal_arms_are_seldom_different_and_often_equivalent() -> None:
    found = rates({}, seed=1)
    assert found["different"] <= MOST
    assert found["equivalent"] > 0.5


def test_an_arm_just_beyond_the_margin_is_seldom_equivalent() -> None:
    assert rates({FOLDED: BEYOND}, seed=2)["equivalent"] <= MOST


def test_whatever_differs_where_copies_differ_too_is_no_difference() -> None:
    found = rates({CONTROL: BEYOND, FOLDED: math.log(1.2)}, seed=3)
    assert found["different"] <= MOST, "only where the control passed by chance"
    assert found["inconclusive"] >= 1 - MOST
