"""What a study could see, told before its first run, and the intervals by which it judges."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats

from loraover.cli import cli
from loraover.common.command_line import run
from loraover.common.errors import CheckpointError, ConfigError, LoraOverError
from loraover_lab.study.analysis import Halves, Losses, Spread, difference, mean_loss, sensitivity
from loraover_lab.study.forecast import MOST, PowerReport, measured_spreads, predict_power
from loraover_lab.study.grid import slug
from loraover_lab.study.outcome import KEPT_FILE, KeptRun

from support.speed import simulations

SEEDS, ROWS = 4, 60
NEW = "lora-over:budget={fraction: 0.25}"
TOKENS = np.random.default_rng(0).integers(5, 40, ROWS).astype(np.float64)


def nats(seed: int, level: float) -> Losses:
    draw = np.random.default_rng(seed)
    return TOKENS * (level + draw.normal(0, 0.01, (SEEDS, 1)) + draw.normal(0, 0.05, ROWS))


def kept(method: str, losses: Losses, task: str = "demo", rate: str = "lr-0.001") -> list[KeptRun]:
    name = f"{task}/{slug(method)}/{rate}/seed-"
    tokens = TOKENS.astype(int).tolist()
    return [KeptRun(run=f"{name}{i}", recipe="", nats=row.tolist(), tokens=tokens) for i, row in enumerate(losses)]


OLD, OVER = nats(1, 1.0), nats(2, 0.99)
RUNS = [
    *kept("lora", OLD),
    *kept("lora", OLD + 10, rate="lr-0.1"),  # a worse rate
    *kept("lora", OLD[:1] / 2, rate="lr-0.01"),  # a better one, with one seed
    *kept("lora:r=2", OLD + 1),  # a worse baseline
    *kept(NEW, OVER),
    *kept("dora", OLD, task="lonely"),  # a task without plain LoRA
    KeptRun(run=f"demo/{slug(NEW)}/lr-1/seed-0", recipe="", failure="training diverged"),
]


@pytest.fixture
def pilot(tmp_path: Path) -> Path:
    folder = tmp_path / "pilot"
    folder.mkdir()
    (folder / KEPT_FILE).write_text("".join(one.model_dump_json(exclude_defaults=True) + "\n" for one in RUNS))
    return folder


def test_the_same_study_sees_what_it_says_of_itself() -> None:
    worse, found = measured_spreads(RUNS, {name: name for name in ("lora", "lora:r=2", NEW, "dora")})
    assert [(one.task, one.method, one.baseline) for one in (worse, found)] == [
        ("demo", "lora:r=2", "lora"),
        ("demo", NEW, "lora"),
    ]
    itself = 100 * difference(OVER, OLD, TOKENS).detectable / mean_loss(OLD, TOKENS)
    assert found.smallest(ROWS, SEEDS) == pytest.approx(itself, rel=1e-12)


def test_the_command_tells_what_halves_the_difference(
    pilot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["study", "demo", "--methods", f"lora,{NEW}", "--seeds", "6", "-o", str(tmp_path / "out")]
    assert run(cli, [*words, "--power", str(pilot), "--json"]) == 0
    printed = capsys.readouterr()
    assert "half:" in printed.err
    assert not (tmp_path / "out").exists()
    (task,) = PowerReport.model_validate_json(printed.out).tasks
    (spread,) = measured_spreads(RUNS, {"lora": "lora", NEW: NEW})
    assert (task.seeds, task.measured_on, task.smallest) == (6, "demo", spread.smallest(task.rows, 6))
    both = round(6 * task.factor_to_halve)
    rows = [spread.smallest(n, 6) for n in around(task.rows_to_halve)]
    seeds = [spread.smallest(task.rows, n) for n in around(task.seeds_to_halve)]
    together = [spread.smallest(task.rows * n // 6, n) for n in around(both)]
    for count, (before, at) in ((task.rows_to_halve, rows), (task.seeds_to_halve, seeds), (both, together)):
        assert before > task.smallest / 2
        assert (at <= task.smallest / 2) == (count is not None)


def test_methods_with_short_names_are_found(pilot: Path, tmp_path: Path) -> None:
    names = {"plain": "lora", "over": NEW}
    (task,) = predict_power(["demo"], tmp_path, methods=["plain", "over"], names=names, power=pilot).tasks
    assert (task.method, task.baseline) == ("over", "plain")
    named = [one.model_copy(update={"run": one.run.replace(slug(NEW), "over")}) for one in RUNS]
    assert len(measured_spreads(named, {"lora": "plain", NEW: "over"})) == 1


def test_what_a_pilot_cannot_tell_is_said(pilot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["study", "demo", "--methods", f"lora,dora,pissa,{NEW}", "-o", str(tmp_path / "out"), "--power", str(pilot)]
    assert run(cli, words) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "not compared, since the pilot lacks two seeds of them beside a plain LoRA: dora, pissa" in told
    assert "measured with" not in told
    few = [one for one in RUNS if one.run.endswith(("seed-0", "seed-1"))]
    elsewhere = [one.model_copy(update={"run": one.run.replace("demo", "other")}) for one in few]
    here = [one for one in few if slug(NEW) not in one.run]
    lines = (one.model_dump_json(exclude_defaults=True) + "\n" for one in (*here, *elsewhere))
    (tmp_path / KEPT_FILE).write_text("".join(lines))
    assert run(cli, [*words[:3], f"lora,lora:r=2,{NEW}", *words[4:-1], str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "a spread was measured with 2 seeds only" in " ".join(shown.split())
    assert [line.split()[1] for line in shown.splitlines() if line.split()[:1] == ["demo"]] == ["demo,", "other,"]


def around(count: int | None) -> tuple[int, int]:
    """The last number that is too small, and the first that is not; of two that are not, if none suffices."""
    return (count or MOST) - 1, count or MOST


def test_a_spread_that_is_not_there_is_refused(pilot: Path, tmp_path: Path) -> None:
    methods = ["lora", "pissa"]
    with pytest.raises(ConfigError, match=r"expected a runs\.jsonl with two seeds of a plain LoRA and of another"):
        predict_power(["demo"], tmp_path / "out", methods=methods, power=pilot)
    (tmp_path / KEPT_FILE).write_text('{"run": "demo/lora", "recipe": ""}\n')
    with pytest.raises(CheckpointError, match=r"line 1.* run"):
        predict_power(["demo"], tmp_path / "out", methods=methods, power=tmp_path)
    with pytest.raises(ConfigError, match="power needs two seeds or more, found seeds=1"):
        predict_power(["demo"], tmp_path / "out", methods=methods, seeds=1, power=pilot)
    fewer = [one.model_copy(update={"nats": one.nats[1:], "tokens": one.tokens[1:]}) for one in kept(NEW, OVER)]
    with pytest.raises(LoraOverError, match="evaluated on different held-out examples"):
        measured_spreads([*kept("lora", OLD), *fewer], {"lora": "lora", NEW: NEW})
    with pytest.raises(ConfigError, match="power is missing"):
        predict_power(["demo"], tmp_path / "out", methods=methods)


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
@pytest.mark.parametrize(("seeds", "of_seeds"), [(2, 0.3), (3, 0.01), (5, 0.01)])
def test_no_difference_is_seldom_called_one(seeds: int, of_seeds: float) -> None:
    """Also where little but the seed makes a difference, and there are few."""
    draw = np.random.default_rng(1)
    experiments = simulations(200)
    called = sum(difference(*made_up(draw, 0.0, seeds, 12, of_seeds)).p <= 0.05 for _ in range(experiments))
    assert called <= stats.binom.ppf(1 - 1e-3, experiments, 0.05)


FREEDOM = (3, 99)


def spreads(draw: np.random.Generator, variances: tuple[float, float], count: int) -> list[Spread]:
    """Spreads as four seeds and a hundred examples of known variances give them."""
    found = [v * draw.chisquare(f, count) / f for v, f in zip(variances, FREEDOM, strict=True)]
    return [
        Spread((float(of_seeds), float(of_examples)), FREEDOM) for of_seeds, of_examples in zip(*found, strict=True)
    ]


@pytest.mark.statistical
@pytest.mark.parametrize("variances", [(0.0, 1.0), (0.1, 1.0), (1.0, 1.0), (10.0, 1.0), (1.0, 0.0)])
def test_intervals_are_hardly_wider_than_they_must_be(variances: tuple[float, float]) -> None:
    """Few seeds widen an interval only as far as it is seeds that make the difference."""
    draw, experiments = np.random.default_rng(5), simulations(1000)
    means = np.sqrt(sum(variances)) * draw.standard_normal(experiments)
    halves = [spread.half(0.05) for spread in spreads(draw, variances, experiments)]
    missed = int((np.abs(means) > halves).sum())
    assert stats.binom.ppf(1e-3, experiments, 0.02) <= missed <= stats.binom.ppf(1 - 1e-3, experiments, 0.05)


@pytest.mark.statistical
@pytest.mark.parametrize("variances", [(0.0, 1.0), (1.0, 1.0), (1.0, 0.0)])
def test_a_difference_that_a_study_could_see_is_found_in_four_of_five(variances: tuple[float, float]) -> None:
    draw, experiments = np.random.default_rng(6), simulations(1000)
    shift = Spread(variances, FREEDOM).detectable()
    means = shift + np.sqrt(sum(variances)) * draw.standard_normal(experiments)
    halves = [spread.half(0.05) for spread in spreads(draw, variances, experiments)]
    assert (means > halves).mean() == pytest.approx(0.8, abs=0.03)


def test_so_many_answers_that_the_normal_distribution_is_theirs() -> None:
    """With two degrees of freedom that no float64 quantile tells from one more."""
    found = Spread((0.0, 1.2547730424937133e-05), (9_999_999, 437_142_856)).detectable()
    quantiles = stats.norm.isf(0.025) - stats.norm.isf(0.8)
    assert found == pytest.approx(quantiles * math.sqrt(1.2547730424937133e-05), rel=1e-5)


def test_variances_are_those_of_seeds_and_of_a_ratio_over_examples() -> None:
    """The jackknife over examples, and Student's interval where all examples differ alike."""
    method, baseline, tokens = made_up(np.random.default_rng(7), 0.01, seeds=4, examples=40, of_seeds=0.0)
    gaps = method - baseline
    left_out = [mean_loss(np.delete(gaps, i, 1), np.delete(tokens, i)) for i in range(40)]
    of_examples = 39 * np.var(left_out)
    of_seeds = np.var([mean_loss(row[None], tokens) for row in gaps], ddof=1) / 4
    wide = sum(stats.t.ppf(0.975, f) ** 2 * v for f, v in ((3, of_seeds), (39, of_examples)))
    low, high = difference(method, baseline, tokens).interval
    assert high - low == pytest.approx(2 * math.sqrt(wide), rel=0.02)
    alike = np.array([[0.1], [0.2], [0.4]]) * tokens
    student = stats.ttest_1samp([0.1, 0.2, 0.4], 0.0)
    found = difference(alike, np.zeros_like(alike), tokens)
    assert found.p == pytest.approx(student.pvalue, rel=1e-6)
    assert found.interval == pytest.approx(tuple(student.confidence_interval(0.95)))


def test_a_large_difference_is_found_with_its_sign() -> None:
    found = difference(*made_up(np.random.default_rng(2), -0.2))
    assert found.p < 0.01
    assert found.interval[1] < 0


@example(mean=1e-6, of_seeds=62.0, of_examples=2.0, seeds=4, examples=1)
@given(st.floats(1e-6, 1e3), st.floats(0, 1e3), st.floats(0, 1e3), st.integers(1, 9), st.integers(1, 200))
def test_an_interval_of_level_p_ends_at_zero(
    mean: float, of_seeds: float, of_examples: float, seeds: int, examples: int
) -> None:
    spread = Spread((of_seeds, of_examples), (seeds, examples))
    p = spread.p(mean)
    assert p == spread.p(-mean)
    if p:
        error = math.sqrt(of_seeds + of_examples)
        assert spread.half(p) == pytest.approx(mean, rel=1e-6, abs=1e-7 * error), "quantiles near 0 are less accurate"
    else:
        assert spread.half(1e-30) <= mean


def test_equal_methods_differ_by_nothing() -> None:
    _, baseline, tokens = made_up(np.random.default_rng(3), 0.0)
    found = difference(baseline, baseline, tokens)
    assert (found.mean, found.interval, found.p, found.detectable) == (0.0, (0.0, 0.0), 1.0, 0.0)


def test_the_mean_counts_tokens() -> None:
    losses, tokens = np.array([[2.0, 30.0], [4.0, 50.0]]), np.array([1.0, 20.0])
    assert mean_loss(losses, tokens) == pytest.approx((2 + 30 + 4 + 50) / (2 * 21))


@given(st.integers(2, 50))
def test_no_example_both_chooses_and_compares(count: int) -> None:
    halves, examples = Halves(count), list(range(count))
    validation, test = examples[halves.validation], examples[halves.test]
    assert sorted(validation + test) == examples
    assert abs(len(validation) - len(test)) <= 1


@pytest.mark.parametrize(
    ("losses", "is_bracketed", "is_cut", "decades", "regret", "diverged"),
    [
        ({1e-4: 2.0, 1e-3: 1.0, 1e-2: 1.02}, True, False, 0.01 + 0.5, (1.0 + 0.0 + 0.02) / 3, 0),
        ({1e-3: 1.0, 1e-2: 1.005}, False, True, 1.0, 0.005 / 2, 0),
        ({1e-3: 1.0, 1e-2: math.inf}, False, True, 0.0, None, 1),
        ({1e-4: 0.1, 1e-3: 0.0, 1e-2: 0.2}, True, False, 0.0, None, 0),
    ],
    ids=["interpolated", "beyond the sweep", "worse than any other", "no divisor"],
)
def test_a_basin_is_measured_around_the_best_rate(
    losses: dict[float, float], is_bracketed: bool, is_cut: bool, decades: float, regret: float | None, diverged: int
) -> None:
    found = sensitivity(losses, {})
    assert (found.best_rate, found.is_bracketed, found.is_basin_cut) == (1e-3, is_bracketed, is_cut)
    assert found.basin_decades == pytest.approx(decades)
    assert (found.regret, found.diverged) == (regret if regret is None else pytest.approx(regret), diverged)
    assert found.losses == {f"{rate:g}": loss for rate, loss in losses.items() if math.isfinite(loss)}
