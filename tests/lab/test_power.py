"""What a study could see, told before its first run, against what it says of itself afterwards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from loraover.cli import cli
from loraover.common.command_line import run
from loraover.common.errors import CheckpointError, ConfigError, LoraOverError
from loraover_lab.study.analysis import Losses, difference, mean_loss
from loraover_lab.study.forecast import MOST, PowerReport, measured_spreads, predict_power
from loraover_lab.study.grid import slug
from loraover_lab.study.outcome import KEPT_FILE, KeptRun

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
