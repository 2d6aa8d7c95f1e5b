"""Tuning on one half of the examples, differences on the other, and how wide their intervals are."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from loraover.study.analysis import Halves, Losses, difference, mean_loss, sensitivity


def made_up(
    draw: np.random.Generator, true: float, seeds: int = 5, examples: int = 60, of_seeds: float = 0.01
) -> tuple[Losses, Losses, Losses]:
    """Losses of two methods with effects of seeds, of examples and of both together; tokens."""
    tokens = draw.integers(20, 80, examples).astype(float)
    gap = true + of_seeds * draw.standard_normal((seeds, 1)) + 0.02 * draw.standard_normal(examples)
    gap = gap + 0.02 * draw.standard_normal((seeds, examples))
    baseline = tokens * (1.5 + 0.3 * draw.standard_normal(examples)) * np.ones((seeds, 1))
    return baseline + gap * tokens, baseline, tokens


@pytest.mark.statistical
def test_intervals_cover_over_seeds_and_examples_together() -> None:
    draw = np.random.default_rng(0)
    experiments, covered = 300, 0
    for _ in range(experiments):
        low, high = difference(*made_up(draw, 0.03)).interval
        covered += low <= 0.03 <= high
    assert covered >= stats.binom.ppf(1e-3, experiments, 0.95)


@pytest.mark.statistical
@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("of_seeds", [0.01, 0.3])
def test_no_difference_is_seldom_called_one(seeds: int, of_seeds: float) -> None:
    """Also where little but the seed makes a difference, and there are few."""
    draw = np.random.default_rng(1)
    experiments = 1000
    called = sum(difference(*made_up(draw, 0.0, seeds, 12, of_seeds)).p <= 0.05 for _ in range(experiments))
    assert called <= stats.binom.ppf(1 - 1e-3, experiments, 0.05)


def test_a_large_difference_is_found_with_its_sign() -> None:
    found = difference(*made_up(np.random.default_rng(2), -0.2))
    assert found.p < 0.01
    assert found.interval[1] < 0


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_an_interval_excludes_zero_where_p_is_below_a_twentieth(seeds: int) -> None:
    """Both are of a t distribution with one degree of freedom less than there are seeds, whatever the examples."""
    found = difference(*made_up(np.random.default_rng(4), 0.01, seeds))
    low, high = found.interval
    t = 2 * found.mean / (high - low) * stats.t.ppf(0.975, seeds - 1)
    assert found.p == pytest.approx(2 * stats.t.sf(t, seeds - 1), rel=1e-9)
    assert low + high == pytest.approx(2 * found.mean)


def test_equal_methods_differ_by_nothing() -> None:
    _, baseline, tokens = made_up(np.random.default_rng(3), 0.0)
    found = difference(baseline, baseline, tokens)
    assert (found.mean, found.interval, found.p) == (0.0, (0.0, 0.0), 1.0)


def test_the_mean_counts_tokens() -> None:
    losses, tokens = np.array([[2.0, 30.0], [4.0, 50.0]]), np.array([1.0, 20.0])
    assert mean_loss(losses, tokens) == pytest.approx((2 + 30 + 4 + 50) / (2 * 21))


@given(st.integers(2, 50))
def test_no_example_both_chooses_and_judges(count: int) -> None:
    halves, examples = Halves(count), list(range(count))
    validation, test = examples[halves.validation], examples[halves.test]
    assert sorted(validation + test) == examples
    assert abs(len(validation) - len(test)) <= 1


def test_a_bracketed_basin_is_interpolated() -> None:
    found = sensitivity({1e-4: 2.0, 1e-3: 1.0, 1e-2: 1.02})
    assert (found.best_rate, found.is_bracketed, found.is_basin_cut) == (1e-3, True, False)
    assert found.basin_decades == pytest.approx(0.01 + 0.5)
    assert found.regret == pytest.approx((1.0 + 0.0 + 0.02) / 3)


def test_a_basin_that_goes_on_beyond_the_sweep_says_so() -> None:
    found = sensitivity({1e-3: 1.0, 1e-2: 1.005})
    assert (found.is_bracketed, found.is_basin_cut) == (False, True)
    assert found.basin_decades == pytest.approx(1.0)


def test_a_rate_that_diverged_is_worse_than_any_other() -> None:
    found = sensitivity({1e-3: 1.0, 1e-2: math.inf})
    assert found.best_rate == 1e-3
    assert found.losses == {"0.001": 1.0}
    assert found.basin_decades == 0.0
    assert (found.regret, found.diverged) == (None, 1)


def test_a_loss_of_zero_is_no_divisor() -> None:
    found = sensitivity({1e-4: 0.1, 1e-3: 0.0, 1e-2: 0.2})
    assert (found.best_rate, found.regret, found.diverged) == (1e-3, None, 0)
