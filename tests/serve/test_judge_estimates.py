"""The judge's estimates, in plain Python, beside NumPy's and SciPy's on random cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from loraover_serve.judge.estimates import (
    Interval,
    fit_strength,
    incomplete_beta,
    log_ratio,
    root_mean,
    share_found,
    t_quantile,
)
from loraover_serve.judge.limits import BY_CHANCE, CONFIDENCE, FEW_AS_BASE

from oracles import prompt_estimates as oracle

EQUAL = 1e-9
"""Relative error of sums of at most 10,000 numbers in float64, 10,000 * 1.1e-16, with three digits for what follows."""

seeds = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("probability", [BY_CHANCE / 2, BY_CHANCE, 0.01, 0.3])
@pytest.mark.parametrize("freedom", [*np.linspace(1, 200, 40), 1.0001, 999.5, 1e6])
def test_students_quantile_is_that_of_scipy(freedom: float, probability: float) -> None:
    assert t_quantile(float(freedom), probability) == pytest.approx(stats.t.isf(probability, freedom), rel=EQUAL)


@given(st.floats(0.5, 500), st.floats(0.5, 500), st.floats(0, 1))
def test_the_incomplete_beta_function_is_that_of_scipy(a: float, b: float, x: float) -> None:
    assert incomplete_beta(a, b, x, 1 - x) == pytest.approx(special.betainc(a, b, x), rel=1e-8, abs=1e-14)


@pytest.mark.parametrize("answers", [4, 5, 9, 64, 838, 20_000])
def test_the_share_that_is_found_is_the_quantile_of_the_beta_distribution(answers: int) -> None:
    expected = stats.beta.ppf(CONFIDENCE, FEW_AS_BASE, answers - FEW_AS_BASE + 1)
    assert share_found(answers) == pytest.approx(expected, rel=EQUAL)
    assert share_found(FEW_AS_BASE) == 1


@given(seeds, st.integers(1, 40), st.integers(1, 9), st.floats(0, 2), st.sampled_from([0.0, 1e-3, 0.3, 30.0]))
def test_a_strength_is_that_of_numpy(seed: int, prompts: int, positions: int, factor: float, noise: float) -> None:
    """Prompts of different sizes, heavy tails, and positions that are missing or show nothing."""
    draw = np.random.default_rng(seed)
    w = draw.gamma(0.5, size=(prompts, positions)) * np.exp(draw.normal(size=(prompts, 1)))
    w[draw.random(w.shape) < 0.2] = 0
    x = factor * w + noise * np.sqrt(w) * (draw.standard_t(2, size=w.shape) + draw.normal(size=(prompts, 1)))
    expected = oracle.strength(oracle.Projections(x, w, w))
    found = fit_strength(
        [(q, float(x[q, k]), float(w[q, k])) for q in range(prompts) for k in range(positions)]
    ).interval
    assert found.value == pytest.approx(float(expected.value), rel=EQUAL, abs=EQUAL)
    assert found.half == pytest.approx(float(expected.half), rel=EQUAL, abs=EQUAL)


def test_a_position_that_is_far_off_hardly_counts() -> None:
    """Its weight is bounded: as far off as it likes, it moves the factor by the same."""
    near = [(prompt, 1 + 0.01 * (-1) ** prompt, 1.0) for prompt in range(20)]
    once, again = (fit_strength([*near, (20, far, 1.0)]).interval for far in (100.0, 1e6))
    assert once.value == pytest.approx(again.value, rel=EQUAL)
    assert abs(once.value - 1) < 0.003


def test_nothing_is_known_of_no_position_and_no_error_of_a_single_prompt() -> None:
    assert fit_strength([]).interval == fit_strength([(0, 1.0, 0.0)]).interval == Interval(0.0, -math.inf, math.inf)
    assert fit_strength([(0, 2.0, 1.0), (0, 4.0, 2.0)]).interval == Interval(2.0, -math.inf, math.inf)
    assert str(fit_strength([(0, 2.0, 1.0)]).interval) == "2"


@given(seeds, st.integers(2, 8), st.floats(0, 3), st.floats(1e-3, 10))
def test_noise_moves_a_strength_no_further_than_its_squares_allow(
    seed: int, prompts: int, spread: float, noise: float
) -> None:
    """Changes y = d + n of one token each, whose sizes and noise differ from token to token by orders of magnitude."""
    draw = np.random.default_rng(seed)
    d, n = (np.exp(spread * draw.normal(size=(prompts, 6))) * draw.normal(size=(prompts, 6)) for _ in range(2))
    n *= noise
    points = [(q, float((d + n)[q, k] * d[q, k]), float(d[q, k] ** 2)) for q in range(prompts) for k in range(6)]
    fit, most = fit_strength(points), float(np.sqrt(np.square(n).sum()))
    assert abs(fit.interval.value - 1) <= fit.certain(most) * (1 + 1e-9)
    assert fit.within(most).half <= fit.certain(most) * (1 + 1e-9)


def test_tokens_with_a_bounded_weight_bound_no_error() -> None:
    """One token has nearly all of the effect, and others have all of the noise: the robust strength is theirs."""
    noise, w = [0.5 + 0.01 * (-1) ** k for k in range(1500)], 1.3e-5
    points = [(0, 1.0, 1.0), *((1 + k % 9, (1 + n) * w, w) for k, n in enumerate(noise))]
    fit, most = fit_strength(points), math.sqrt(sum(n * n * w for n in noise))
    error = fit.interval.value - 1
    assert error > 0.4
    assert 5 * most / math.sqrt(sum(w for _, _, w in points)) < error, (
        "the bound of least squares, with five times the noise"
    )
    assert error <= fit.certain(most)
    assert str(Interval(1.0, 0.75, 1.25)) == "1 [0.75, 1.25]"


@given(seeds, st.integers(1, 60))
def test_a_mean_of_log_ratios_is_that_of_numpy(seed: int, prompts: int) -> None:
    one, other = np.exp(np.random.default_rng(seed).normal(size=(2, prompts)))
    expected = oracle.log_ratios(np.log(one / other))
    found = log_ratio(one.tolist(), other.tolist())
    assert found.value == pytest.approx(float(expected.value), rel=EQUAL, abs=EQUAL)
    assert found.half == pytest.approx(float(expected.half), rel=EQUAL, abs=EQUAL)
    assert log_ratio([], []) == Interval(0.0, -math.inf, math.inf)


@given(seeds, st.integers(2, 500))
def test_a_root_mean_square_has_numpys_error(seed: int, number: int) -> None:
    squares = np.random.default_rng(seed).gamma(0.5, size=number)
    rms, error = root_mean(squares.tolist())
    assert rms == pytest.approx(math.sqrt(squares.mean()), rel=EQUAL)
    assert error == pytest.approx(squares.std(ddof=1) / math.sqrt(number) / (2 * rms), rel=EQUAL)
