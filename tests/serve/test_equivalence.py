"""The tests of equivalence and difference: against scipy and statsmodels; their rates of error in simulations."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import ttost_paired

from loraover.common.errors import ParityError
from loraover.common.multiple_testing import holm
from loraover_serve.parity import equivalence
from loraover_serve.parity.equivalence import (
    ALPHA,
    Comparison,
    blocks_needed,
    compare,
    decide,
    holm_levels,
    quantile_intervals,
    quantile_of,
    studentised,
)
from loraover_serve.parity.request import MIN_BLOCKS

from support.speed import simulations

pytestmark = pytest.mark.usefixtures("few_resamples")

MARGIN = 0.05
LIMIT = math.log(1.05)
EXPERIMENTS, BLOCKS = simulations(500), 12
SPREAD = 0.06  # of d: some of 12 blocks' experiments are decided, some are not

# Sleep gained by ten patients with two drugs: Student 1908, The Probable Error of a Mean, section IX.
STUDENT_1 = np.array([0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0])
STUDENT_2 = np.array([1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4])


def resampled_p(found: Comparison, limit: float) -> float:
    """The bootstrap's share of t beyond the margin's ends, the observed one counted in."""
    mean = math.log(found.ratio)
    beyond = max(
        np.sum(found.draws <= (mean - limit) / found.error), np.sum(found.draws >= (mean + limit) / found.error)
    )
    return float((beyond + 1) / (equivalence.RESAMPLES + 1))


def test_students_sleep_data_as_statsmodels_judges_them() -> None:
    found = compare(list(STUDENT_2 - STUDENT_1), margin=math.expm1(3.0))
    expected, _, _ = ttost_paired(STUDENT_2, STUDENT_1, -3.0, 3.0)
    assert found.equivalence_p == pytest.approx(max(expected, resampled_p(found, 3.0)), rel=1e-12)
    assert math.log(found.ratio) == pytest.approx(1.58, rel=1e-12)  # Student's own figure


def test_the_bootstrap_of_students_data_is_that_of_one_resample_after_another() -> None:
    d = STUDENT_2 - STUDENT_1
    draw = np.random.default_rng(0)
    expected = []
    for _ in range(equivalence.RESAMPLES):
        resample = d[draw.integers(10, size=10)]
        expected.append((resample.mean() - d.mean()) / stats.sem(resample))
    assert studentised(d) == pytest.approx(np.sort(expected), rel=1e-6)
    low, high = np.quantile(expected, [0.025, 0.975])
    interval = 1.58 - high * stats.sem(d), 1.58 - low * stats.sem(d)
    found = compare(list(d), margin=MARGIN).interval(0.95)
    assert np.log(found) == pytest.approx(interval, abs=0.02)


@given(st.integers(0, 2**32), st.integers(MIN_BLOCKS, 60), st.floats(0.01, 0.3), st.floats(-0.2, 0.2))
def test_the_p_value_of_equivalence_is_that_of_scipy_or_of_the_bootstrap(
    seed: int, blocks: int, margin: float, mean: float
) -> None:
    d = np.random.default_rng(seed).normal(mean, 0.1, blocks)
    found, limit = compare(list(d), margin=margin), math.log1p(margin)
    above = stats.ttest_1samp(d, limit, alternative="greater").pvalue
    below = stats.ttest_1samp(d, -limit, alternative="less").pvalue
    expected = max(1 - above, 1 - below, resampled_p(found, limit))
    assert found.equivalence_p == pytest.approx(expected, rel=1e-6, abs=1e-12)


@given(st.lists(st.floats(-0.1, 0.25), min_size=1, max_size=6), st.integers(0, 2**32))
def test_verdicts_are_those_of_the_adjusted_intervals(means: list[float], seed: int) -> None:
    draw = np.random.default_rng(seed)
    made = {str(i): compare(list(draw.normal(mean, 0.05, 12)), margin=MARGIN) for i, mean in enumerate(means)}
    for found in decide(made).values():
        low, high = np.log(found.interval(found.confidence))
        assert (found.verdict == "different") == (low > LIMIT or high < -LIMIT) == (found.difference_p <= ALPHA)


def test_holms_levels_rise_until_one_is_not_rejected() -> None:
    assert holm_levels([0.01, 0.04, 0.9, 0.001]) == [0.05 / 3, 0.05 / 2, 0.05 / 2, 0.05 / 4]


@given(st.integers(0, 2**32), st.floats(-0.2, 0.2))
def test_equivalence_is_both_90_percent_intervals_inside_the_margin(seed: int, mean: float) -> None:
    d = np.random.default_rng(seed).normal(mean, 0.05, 20)
    found = decide({"d": compare(list(d), margin=MARGIN)})["d"]
    ends = [*stats.ttest_1samp(d, 0).confidence_interval(1 - 2 * ALPHA), *np.log(found.interval(1 - 2 * ALPHA))]
    assert (found.equivalence_p <= ALPHA) == (max(np.abs(ends)) < LIMIT)


@pytest.mark.parametrize("count", [1, 2, 3, 12])
def test_holms_correction_is_that_of_statsmodels(count: int) -> None:
    p_values = list(np.random.default_rng(count).uniform(0, 0.2, count))
    assert holm(p_values) == pytest.approx(list(multipletests(p_values, method="holm")[1]), rel=1e-12)


def experiments(mean: float, seed: int) -> list[Comparison]:
    """Simulated comparisons with verdicts, each decided by itself."""
    draws = np.random.default_rng(seed).normal(mean, SPREAD, (EXPERIMENTS, BLOCKS))
    return [decide({"d": compare(list(d), margin=MARGIN)})["d"] for d in draws]


def most(rate: float) -> float:
    """The largest share of EXPERIMENTS that an event of this rate has with a probability of 99.9 %."""
    return float(stats.binom.ppf(0.999, EXPERIMENTS, rate)) / EXPERIMENTS


@pytest.mark.statistical
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("size", "seldom", "seed"), [(1.001, "equivalent", 2), (0.999, "different", 3)])
def test_arms_at_the_margin_are_seldom_called_what_they_are_not(size: float, seldom: str, seed: int, sign: int) -> None:
    assert np.mean([c.verdict == seldom for c in experiments(sign * LIMIT * size, seed)]) <= most(ALPHA)


@pytest.mark.statistical
@pytest.mark.parametrize("mean", [0.0, 0.12])
def test_intervals_cover_at_their_rate(mean: float) -> None:
    intervals = [c.interval(0.95) for c in experiments(mean, seed=4)]
    covered = np.mean([low <= math.exp(mean) <= high for low, high in intervals])
    assert 1 - covered <= most(0.05)
    assert covered <= most(0.95)


@pytest.mark.statistical
def test_the_number_of_blocks_that_would_do_does() -> None:
    needed = blocks_needed(SPREAD, margin=MARGIN)
    assert needed is not None
    draws = np.random.default_rng(6).normal(0.0, SPREAD, (EXPERIMENTS, needed))
    power = np.mean([compare(list(d), margin=MARGIN).equivalence_p <= ALPHA for d in draws])
    assert 0.9 - (most(0.9) - 0.9) - 0.01 <= power <= 0.93  # the central t is an approximation


def test_no_number_of_blocks_would_do() -> None:
    assert blocks_needed(100.0, margin=1e-4) is None


@pytest.mark.parametrize("values", [[0.1] * (MIN_BLOCKS - 1), [0.0] * 9 + [math.nan], [0.0] * 9 + [math.inf], []])
def test_too_few_or_broken_values_are_refused(values: list[float]) -> None:
    with pytest.raises(ParityError, match="finite differences"):
        compare(values, margin=MARGIN)


def test_values_without_spread_are_decided() -> None:
    same, other = ([shift] * MIN_BLOCKS for shift in (0.0, 0.1))
    found = decide({"same": compare(same, margin=MARGIN), "other": compare(other, margin=MARGIN)})
    assert [found[name].verdict for name in found] == ["equivalent", "different"]


@pytest.mark.statistical
@pytest.mark.parametrize("blocks", [MIN_BLOCKS, 40])
def test_intervals_of_skewed_ratios_cover_better_than_students(blocks: int) -> None:
    """Where pauses make some blocks much slower, t intervals are too short at one end."""
    draw = np.random.default_rng(8)
    draws = np.exp(0.8 * draw.normal(size=(500, blocks))) - math.exp(0.32)  # of mean 0
    intervals = np.log([compare(list(0.01 * d), margin=MARGIN).interval(0.95) for d in draws])
    student = stats.ttest_1samp(draws, 0, axis=1).pvalue > 0.05
    covered = np.mean((intervals[:, 0] <= 0) & (intervals[:, 1] >= 0))
    assert covered > student.mean() + 0.01


@pytest.mark.statistical
def test_skewed_ratios_beyond_the_margin_are_less_often_called_equivalent_than_by_student() -> None:
    """With 12 blocks the rate still exceeds alpha, because a sample may lack the rare long pauses."""
    draw = np.random.default_rng(9)
    d = 0.02 * (np.exp(draw.normal(size=(EXPERIMENTS, BLOCKS))) - math.exp(0.5)) + LIMIT * 1.001
    student = np.mean(stats.ttest_1samp(d, LIMIT, axis=1, alternative="less").pvalue <= ALPHA)
    found = np.mean([decide({"d": compare(list(row), margin=MARGIN)})["d"].verdict == "equivalent" for row in d])
    assert found <= 0.14 < 0.16 <= student


@pytest.mark.statistical
@pytest.mark.parametrize("share", [0.0, 0.7])
def test_intervals_of_quantiles_cover_whatever_times_in_a_block_share(share: float) -> None:
    """Two copies of a value carry no more information than one; resampled singly, they make intervals too short."""
    quantiles, datasets = [0.5, 0.9], 60
    truth = stats.norm.ppf(quantiles)
    draw = np.random.default_rng(7)
    own, common = draw.normal(size=(datasets, 80, 6)), draw.normal(size=(datasets, 80, 1))
    values = math.sqrt(1 - share) * own + math.sqrt(share) * common
    intervals = np.array([quantile_intervals(list(blocks), quantiles) for blocks in values])
    held = ((intervals[..., 0] <= truth) & (truth <= intervals[..., 1])).sum(axis=0)
    assert (held >= stats.binom.ppf(0.001, datasets, 0.93)).all()
    assert (intervals[..., 1] - intervals[..., 0] < 1.5).all()


def test_a_quantile_of_unequal_blocks_is_that_of_all_their_values() -> None:
    assert quantile_of([[1.0, 2.0, 3.0], [4.0], []], [0.5, 0.9]) == [2.0, 4.0]
    assert quantile_intervals([[2.0, 2.0], [2.0]], [0.5]) == [(2.0, 2.0)]


@pytest.mark.statistical
def test_the_bootstrap_of_a_large_run_fits_in_memory() -> None:
    draw = np.random.default_rng(0)
    tracemalloc.start()
    quantile_intervals(list(draw.normal(size=(500, 62))), [0.5, 0.99])
    studentised(draw.normal(size=5000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100e6, "a jackknife of the pooled values would take 8 GB"
