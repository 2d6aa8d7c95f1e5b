"""The strength's interval: false alarms and power, by simulation and on recorded noise of real engines."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from loraover_serve.judge.case import allowed_strength, split_base
from loraover_serve.judge.estimates import Interval, share_found
from loraover_serve.judge.evidence import Change
from loraover_serve.judge.limits import CERTAIN, EXCESS, FEW_AS_BASE, ROUNDED_STRENGTH
from loraover_serve.judge.rules import is_narrow
from loraover_serve.verify.request import RecordRequest

from benchmarks import family_limits
from benchmarks.page import PAGE
from benchmarks.reference_check import ENGINES, FAULT, RATIO, TOPS, engines, row
from benchmarks.verify_calibration import least_certain, least_deviation, least_excess, rounded_up
from oracles.prompt_estimates import Estimate as Estimates
from oracles.prompt_estimates import Projections, strength
from support.recorded_noise import IN_USE, NOISE, Recorded

pytestmark = pytest.mark.statistical

Floats = NDArray[np.float64]
RUNS, PROMPTS, POSITIONS = 4000, 16, 8
ALLOWED = allowed_strength("bf16", 1.0)


def shared(draw: np.random.Generator, noise: Floats) -> Floats:
    """Noise of which half is one and the same in a prompt."""
    found: Floats = np.sqrt(0.5) * (noise + draw.normal(size=(*noise.shape[:2], 1)))
    return found


def sized(draw: np.random.Generator, noise: Floats) -> Floats:
    """Noise of one size for each prompt."""
    return noise * np.exp(draw.normal(size=(*noise.shape[:2], 1)))


def heavy(draw: np.random.Generator, noise: Floats) -> Floats:
    """One in 200 positions is 100 times as noisy: its tokens went to another expert."""
    return np.where(draw.random(noise.shape) < 1 / 200, 100 * noise, noise)


@pytest.mark.parametrize("change", [shared, sized, heavy])
def test_the_interval_holds_the_strength_of_noisy_engines(change: Any) -> None:
    """Of 4,000 sound engines at most 4: with 1 in 10,000, more are seen once in 10^4 such tests."""
    draw = np.random.default_rng(1)
    size = np.exp(draw.normal(0, 0.5, (RUNS, PROMPTS, POSITIONS)))
    noise = change(draw, draw.normal(size=size.shape))
    found = strength(Projections(size + 0.3 * np.sqrt(size) * noise, size, size))
    assert np.sum(np.abs(found.value - 1) > found.half) <= 4
    assert np.median(found.half) < 1, "an interval that says something"


def recorded(engine: str, arm: str, runs: int, prompts: int, louder: float) -> Estimates:
    """Strengths in drawn sets of prompts of an engine whose noise is that much louder."""
    found, factor = Recorded(NOISE / f"{engine}.npz"), {"adapter": 1.0, "weak": 0.8, "strong": 1.2}[arm]
    effect = found.effect
    change = factor * effect + louder * (found.change("adapter") - effect)
    draw = np.random.default_rng(2)
    chosen = np.array([draw.choice(len(effect), prompts, replace=False) for _ in range(runs)])
    sums = (change * effect).sum(-1), np.square(effect).sum(-1), np.square(change).sum(-1)
    return strength(Projections(*(each[chosen] for each in sums)))


@pytest.mark.parametrize("louder", [1.0, 3.8])
def test_32_prompts_decide_on_vllm_in_bf16(louder: float) -> None:
    """Also with an adapter of 0.29 nats beside noise of 0.08, which is 3.8 times what was recorded for this effect."""
    for arm in ("adapter", "weak", "strong"):
        found = recorded("vllm-bf16", arm, 500, 32, louder)
        beyond = (found.low > ALLOWED[1]) | (found.high < ALLOWED[0])
        narrow = np.array([is_narrow(Interval(0.0, -half, half), ALLOWED) for half in found.half])
        right = ~beyond & narrow if arm == "adapter" else beyond
        assert np.mean(right) >= 0.95, (arm, np.mean(right), np.median(found.value), np.median(found.half))


@pytest.mark.parametrize("engine", Recorded.all(), ids=lambda engine: engine.name)
def test_right_adapters_on_real_engines_pass_and_wrong_ones_do_not(engine: Recorded) -> None:
    """Of 2,000 sets of 32 prompts of the right adapter none differs; the base model's answers differ in all."""
    draw = np.random.default_rng(3)
    right = [engine.judged("adapter", draw, 500, 32) for _ in range(4)]
    assert not any(found.differs.any() for found in right)
    assert engine.judged("again", draw, 100, 32).differs.all()
    if engine.number_format in ("fp32", "bf16", "int8"):
        assert np.mean([found.narrow.mean() for found in right]) >= 0.95
        for arm in ("weak", "strong"):
            assert np.mean(engine.judged(arm, draw, 200, 32).differs) >= 0.95, arm


def test_the_limits_are_derived_from_recorded_noise() -> None:
    engines = Recorded.all()
    assert rounded_up(least_excess(engines)) == EXCESS
    assert rounded_up(least_deviation(engines)) == ROUNDED_STRENGTH
    assert math.ceil(least_certain(engines)) == CERTAIN


def test_the_limits_hold_for_right_adapters_of_every_family() -> None:
    """Of some 40,000 drawn sets at most 8: with 1 in 10,000, more are seen once in 30 such tests."""
    draw = np.random.default_rng(0)
    right = [each.without_chance() for all_ in Recorded.of_families().values() for each in all_]
    drawn = [each.drawn("adapter", draw, 50, 32) for each in right]
    assert len(drawn) >= 800
    assert sum(int(each.by(IN_USE).differs.sum()) for each in drawn) <= 8
    derived = family_limits.derived(drawn)
    assert derived.excess < EXCESS
    assert derived.certain < CERTAIN
    assert derived.nearer < EXCESS


def test_an_answer_is_the_base_models_only_where_the_adapters_own_noise_cannot_hide_it() -> None:
    lost = Change(0, 4, along=0.1, size=4.0, total=0.1, rest=3.9)
    there = [Change(prompt, 4, along=4.0, size=4.0, total=4.1, rest=0.1) for prompt in range(1, 9)]
    assert split_base([lost, *there], noise=0.1) == ([lost], there)
    assert split_base([lost, *there], noise=0.3) == ([], [])


@pytest.mark.parametrize("engine", ["onnx-fp32", "vllm-bf16", "llamacpp-q8"])
def test_a_negated_adapter_on_a_fifth_of_the_prompts_is_found(engine: str) -> None:
    """Of 48 prompts 10 are wrong; a drawn set of 32 has fewer than three of them in 2 % of the cases."""
    served, draw = Recorded(NOISE / f"{engine}.npz").partly(10, -1.0), np.random.default_rng(4)
    assert np.mean(served.judged("adapter", draw, 500, 32).differs) >= 0.95


@pytest.mark.parametrize("answers", [6, 60, 838])
def test_so_many_answers_show_a_share_without_the_adapter(answers: int) -> None:
    """Chance hides it in 1 of 100 runs, by the binomial distribution."""
    assert stats.binom.sf(FEW_AS_BASE - 1, answers, share_found(answers)) == pytest.approx(0.99, abs=1e-6)


@pytest.mark.parametrize("positions", [RecordRequest.new_tokens, POSITIONS])
@pytest.mark.parametrize("percent", [-FAULT, FAULT])
def test_a_scaling_5_percent_off_can_have_a_right_strength_without_any_chance(percent: int, positions: int) -> None:
    """More questions make the interval narrower, but not what an int4 base takes from the adapter's effect."""
    served = Recorded(NOISE / "mlx-int4.npz").cut(positions, TOPS[-1]).served(RATIO, 1 + percent / 100)
    low, high = served.allowed
    assert low + 0.01 < served.strength("adapter").value < high - 0.01


@pytest.mark.matrix
def test_the_page_of_results_has_what_checks_by_references_decide() -> None:
    """One row of the table, made anew; no right server of any row differs."""
    assert f"| {' | '.join(row(engines()[0], TOPS[0]))} |" in PAGE.read_text(encoding="utf-8")
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    counts = [line.split(" | ")[2] for line in lines if line.startswith(tuple(f"| {name} | " for name in ENGINES))]
    assert counts == ["0"] * (len(ENGINES) * len(TOPS))
