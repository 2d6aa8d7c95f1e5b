"""`loraover study` on a tiny model: killed, resumed, reported."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from rich.console import Console

import loraover
from loraover.cli import cli
from loraover.common.command_line import run
from loraover.common.errors import ConfigError, LoraOverError
from loraover.overparam import config as config_module
from loraover.overparam.config import Budget
from loraover.overparam.decompositions import Mpo
from loraover.reporting.reporter import ConsoleReporter
from loraover.study import outcome as outcome_module
from loraover.study.grid import DEFAULT_METHODS, is_plain, make_grid, matched_rank, split_outside_brackets
from loraover.study.outcome import OUTCOME_FILE, Outcome, digest, execute
from loraover.study.report import StudyReport
from loraover.study.request import StudyRequest
from loraover.study.runner import Where, run_grid
from loraover.training.examples import load_examples
from loraover.training.failure import FAILURE_FILE, Failure
from loraover.training.recipe import Recipe, load_recipe
from loraover.training.run_result import read_run

from support.children import Child
from support.forked_training import ForkedTraining
from support.tiny_hub import save_llama, write_recipe

RATES = "1e-3,1e-2"

pytestmark = pytest.mark.process


@pytest.fixture(scope="module", autouse=True)
def forked() -> Iterator[None]:
    """Trainings are forks, but for those of the tests that ask for `as_users_have_it`."""
    forking = SimpleNamespace(Popen=ForkedTraining, DEVNULL=subprocess.DEVNULL)
    with patch("loraover.study.outcome.subprocess", forking):
        yield


@pytest.fixture
def as_users_have_it() -> Iterator[None]:
    with patch("loraover.study.outcome.subprocess", subprocess):
        yield


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    evaluation = {"examples": 12, "exact_match": False}
    return write_recipe(folder / "words.yaml", save_llama(folder / "llama"), evaluation=evaluation)


METHODS = ["--methods", "lora,lora-over"]


def words(recipe: Path, out: Path, *more: str) -> list[str]:
    sweep = [] if "--lr-sweep" in more else ["--lr-sweep", RATES]
    return ["study", str(recipe), *METHODS, "--seeds", "2", *sweep, "--jobs", "2", "-o", str(out), *more]


def report_of(out: Path) -> StudyReport:
    return StudyReport.model_validate_json((out / "study.json").read_text())


def outcomes_in(out: Path) -> list[Path]:
    """Finished outcomes; one that is being written lies in a hidden folder."""
    return [path for path in out.rglob(OUTCOME_FILE) if not path.parent.name.startswith(".")]


@pytest.fixture(scope="module")
def killed(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that was killed after its third run, and then finished."""
    out = tmp_path_factory.mktemp("killed") / "out"
    child = Child(lambda: run(cli, words(recipe, out)), prepare=os.setsid)
    deadline = time.monotonic() + 120
    while len(outcomes_in(out)) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGKILL)
    assert child.end().code == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in outcomes_in(out)}
    assert run(cli, words(recipe, out)) == 0
    assert all(path.stat().st_mtime_ns == written for path, written in before.items())
    return out


def test_a_study_that_was_killed_is_finished(killed: Path) -> None:
    report = report_of(killed)
    assert (report.is_whole, report.seeds, report.runs) == (True, 2, 8)
    (task,) = report.tasks
    assert (task.task, task.baseline, task.failures) == ("words", "lora", [])
    lora, over = task.methods
    assert (lora.method, lora.difference) == ("lora", None)
    assert over.difference is not None
    assert over.trained_parameters > lora.trained_parameters == over.served_parameters
    assert over.fold_error is not None
    assert 0 < over.fold_error < 1e-6
    assert over.step_norm is not None
    assert over.peak_bytes is not None
    assert over.peak_bytes > 2**27
    assert report.words[0].startswith("LoRA-Over ")
    assert report.words[1].startswith("words: lora-over ")


def test_a_killed_study_reports_what_an_uninterrupted_one_does(killed: Path, recipe: Path, tmp_path: Path) -> None:
    assert run(cli, words(recipe, tmp_path / "whole")) == 0
    whole, resumed = report_of(tmp_path / "whole"), report_of(killed)
    assert whole.words == resumed.words
    measured = {"methods": {"__all__": {"step_seconds", "peak_bytes"}}}
    for one, other in zip(whole.tasks, resumed.tasks, strict=True):
        assert one.model_dump(exclude=measured) == other.model_dump(exclude=measured)
    outcomes = [
        {path.relative_to(out): json.loads(path.read_text())["nats"] for path in out.rglob(OUTCOME_FILE)}
        for out in (tmp_path / "whole", killed)
    ]
    assert outcomes[0] == outcomes[1]


def test_the_report_can_be_made_again_and_is_the_same(killed: Path, recipe: Path) -> None:
    before = report_of(killed)
    assert run(cli, words(recipe, killed, "--report-only")) == 0
    assert report_of(killed).tasks == before.tasks
    table = (killed / "study.md").read_text()
    assert table.count("| lora") == 2
    page = (killed / "study.html").read_text()
    assert "<svg" in page
    assert "<script" not in page


def test_the_function_prints_nothing_and_returns_the_report(
    killed: Path, recipe: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    found = loraover.run_study([recipe], killed, methods=["lora", "lora-over"], lr_sweep=(1e-3, 1e-2), seeds=2)
    assert capfd.readouterr() == ("", "")
    assert found == report_of(killed)
    sweep = "--methods lora,lora-over --lr-sweep 0.001,0.01 --seeds 2"
    assert found.command == f"loraover study {recipe} {sweep} -o {killed}"
    with pytest.raises(ConfigError, match="expected 1 or more"):
        loraover.run_study([recipe], killed, seeds=0)
    with pytest.raises(ConfigError, match="--jobs is 0"):
        loraover.run_study([recipe], killed, jobs=0)


def test_another_recipe_is_not_mixed_in(killed: Path, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cli, words(recipe, killed, "--set", "lora.r=2")) == 2
    assert "another recipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--methods", "lora,galore"], "'galore' is none of"),
        (["--methods", "lora,lora-over:decomposition"], "expected key=value"),
        (["--methods", "lora,lora-over:decompositoin=svd"], "did you mean 'decomposition'"),
        (["--methods", "lora-over,dora"], "compares with plain LoRA"),
        (["--set", "evaluation.examples=1"], "4 held-out examples or more, found 1"),
        (["--set", "evaluation.examples=0"], "4 held-out examples or more, found 0"),
        (["--set", "data.test_examples=2"], "4 held-out examples or more, found 2"),
        (["--lr-sweep", "1e-3,1e-3"], "different positive numbers"),
        (["--lr-sweep", "fast"], "different positive numbers"),
        (["--lr-sweep", "dora=1e-3"], "'dora', which is none of --methods"),
        (["--lr-sweep", "1e-3,-1e-3"], "different positive numbers"),
        (["--lr-sweep", "lora=1e-3"], "no rates for 'lora-over'"),
        (["--lr-sweep", "1e-3", "--lr-sweep", "1e-2"], "two sweeps to one name, or two without a name"),
        (["--report-only"], "nothing to compare"),
    ],
)
def test_what_is_no_study_is_refused(
    more: list[str], message: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(cli, words(recipe, tmp_path / "out", *more)) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.rglob(OUTCOME_FILE))


def test_a_run_that_diverges_is_worse_than_any_other(recipe: Path, tmp_path: Path) -> None:
    more = ["--lr-sweep", "1e-3,1e30", "--seeds", "1"]
    assert run(cli, words(recipe, tmp_path / "out", *more)) == 0
    (task,) = report_of(tmp_path / "out").tasks
    assert [method.rate for method in task.methods] == [1e-3, 1e-3]
    assert [failure.endswith("training diverged") for failure in task.failures] == [True, True]


def test_recipes_of_one_name_would_share_folders(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / recipe.name
    shutil.copy(recipe, other)
    assert run(cli, [*words(recipe, tmp_path / "out"), str(other)]) == 2
    assert "give recipes different names" in capsys.readouterr().err


def test_every_seed_is_judged_on_the_same_examples(recipe: Path) -> None:
    grid = make_grid([str(recipe)], {"lora": [1e-3]}, 3, {})
    found = [load_examples(run.recipe, chat=False) for run in grid]
    tests = [one.test.rows for one in found if one.test is not None]
    assert tests[0] == tests[1] == tests[2] != []
    assert found[0].train.rows != found[1].train.rows


def one_run(recipe: Path, **settings: Any) -> Recipe:
    (found,) = make_grid([str(recipe)], {"lora": [1e-3]}, 1, {"training.max_steps": 2, **settings})
    return found.recipe


@pytest.fixture(scope="module")
def finished_run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one") / "run"
    execute(one_run(recipe), folder, threads=1)
    return folder


def copy_of(run: Path, folder: Path, *lost: str) -> Path:
    """The run beside the recipe that it was asked for, without its outcome and what else is lost."""
    shutil.copy(run.with_name("run.yaml"), folder.with_name("run.yaml"))
    return Path(shutil.copytree(run, folder, ignore=shutil.ignore_patterns(OUTCOME_FILE, *lost)))


@pytest.mark.parametrize("lost", [("run.json", "adapter", "recipe.yaml"), ("run.json",)])
def test_a_run_that_was_killed_at_its_edges_is_made_again(
    lost: tuple[str, ...], finished_run: Path, recipe: Path, tmp_path: Path
) -> None:
    """Before its recipe was kept; between its adapter and its result."""
    folder = copy_of(finished_run, tmp_path / "run", *lost)
    found = execute(one_run(recipe), folder, threads=1)
    before = Outcome.model_validate_json((finished_run / OUTCOME_FILE).read_text())
    assert (found.failure, found.nats) == (None, before.nats)


def test_a_run_without_its_outcome_is_not_trained_again(
    finished_run: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of(finished_run, tmp_path / "run")
    monkeypatch.setattr(outcome_module, "_train", lambda *_: pytest.fail("trained again"))
    found = execute(one_run(recipe), folder, threads=1)
    assert found.model_dump_json() + "\n" == (finished_run / OUTCOME_FILE).read_text()


@pytest.mark.parametrize("lost", [(), ("run.json", "adapter")])
def test_a_run_without_its_outcome_is_no_run_of_another_recipe(
    lost: tuple[str, ...], finished_run: Path, recipe: Path, tmp_path: Path
) -> None:
    """Finished, or to be resumed."""
    folder = copy_of(finished_run, tmp_path / "run", *lost)
    for _ in range(2):  # asking leaves no trace
        with pytest.raises(ConfigError, match="another recipe"):
            execute(one_run(recipe, **{"lora.r": 2}), folder, threads=1)
    assert not (folder / OUTCOME_FILE).exists()


@pytest.mark.usefixtures("as_users_have_it")
def test_a_run_goes_on_while_its_study_is_killed_and_is_waited_for(recipe: Path, tmp_path: Path) -> None:
    """Two processes never write one run: the second study gets what the first one's process makes."""
    folder = tmp_path / "run"
    asked = one_run(recipe, **{"training.max_steps": 40, "training.save_steps": 5, "evaluation.before": False})
    code = (
        "import sys\nfrom pathlib import Path\nfrom loraover.training.recipe import Recipe\n"
        "from loraover.study.outcome import execute\n"
        "execute(Recipe.model_validate_json(sys.argv[1]), Path(sys.argv[2]), threads=1)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, asked.model_dump_json(), str(folder)])
    deadline = time.monotonic() + 120
    while not (folder / "trainer" / "checkpoint-5" / "complete.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    assert not (folder / "run.json").exists()
    found = execute(asked, folder, threads=1)
    assert found.failure is None
    assert read_run(folder).timed_steps == 40  # in one process


def test_seconds_are_those_of_the_steps_that_were_timed(finished_run: Path, recipe: Path, tmp_path: Path) -> None:
    folder = copy_of(finished_run, tmp_path / "run")
    result = read_run(folder).model_copy(update={"steps": 100, "timed_steps": 4, "train_seconds": 2.0})
    (folder / "run.json").write_text(result.model_dump_json())
    assert execute(one_run(recipe), folder, threads=1).step_seconds == 0.5
    (folder / OUTCOME_FILE).unlink()
    (folder / "run.json").write_text(result.model_copy(update={"timed_steps": 0}).model_dump_json())
    assert execute(one_run(recipe), folder, threads=1).step_seconds is None


def test_a_loss_that_is_no_number_is_a_divergence(finished_run: Path, recipe: Path, tmp_path: Path) -> None:
    folder = copy_of(finished_run, tmp_path / "run")
    scored = json.loads((folder / "held_out.json").read_text())
    scored[0][0] = float("nan")
    (folder / "held_out.json").write_text(json.dumps(scored))
    for _ in range(2):  # the second time it is read
        assert execute(one_run(recipe), folder, threads=1).failure == "training diverged"


def test_a_run_that_was_killed_after_it_diverged_has_diverged(recipe: Path, tmp_path: Path) -> None:
    """Its cores, which are resumed from, are no numbers."""
    diverging = {"method": "lora-over", "training.learning_rate": 1e30, "training.save_steps": 1}
    asked = load_recipe(str(recipe), diverging | {"training.max_steps": 2, "evaluation.before": False})
    folder = tmp_path / "run"
    assert execute(asked, folder, threads=1).failure == "training diverged"
    (folder / OUTCOME_FILE).unlink()
    (folder / FAILURE_FILE).unlink()
    assert (folder / "trainer" / "checkpoint-2" / "complete.json").is_file()
    assert execute(asked, folder, threads=1).failure == "training diverged"


def test_a_run_that_does_not_fit_is_a_failure_of_its_own(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told from its file, without another try; of this recipe, and no other."""
    asked, folder = one_run(recipe, **{"lora.r": 2**52}), tmp_path / "run"
    found = execute(asked, folder, threads=1)
    assert found.failure == "out of memory"
    assert sorted(path.name for path in folder.iterdir()) == [FAILURE_FILE, OUTCOME_FILE]
    (folder / OUTCOME_FILE).unlink()
    monkeypatch.setattr(outcome_module, "_train", lambda *_: pytest.fail("trained again"))
    with pytest.raises(ConfigError, match="another recipe"):
        execute(one_run(recipe), folder, threads=1)
    assert execute(asked, folder, threads=1) == found


def ends_so(folder: Path, monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """Let lines of a shell script stand in for Python, and so for `loraover train ASKED -o FOLDER`, in FOLDER."""
    script = folder / "python"
    script.write_text("\n".join(["#!/bin/sh", 'mkdir -p "$6" && cd "$6"', *lines, ""]))
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(outcome_module, "subprocess", subprocess)


def leaving(kind: str, message: str) -> str:
    return f"echo '{Failure(kind=kind, message=message).model_dump_json()}' > {FAILURE_FILE}"


MISLEADING = (
    "training diverged: the run that wrote it had diverged; OutOfMemoryError, MemoryError: can not allocate memory"
)


@pytest.mark.parametrize(
    ("kind", "failure"),
    [("diverged", "training diverged"), ("out_of_memory", "out of memory"), ("refused", None), ("failed", None)],
)
def test_the_kind_of_a_failure_decides_whatever_is_said(
    kind: str, failure: str | None, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = "xyz" if failure else MISLEADING
    ends_so(tmp_path, monkeypatch, leaving(kind, message), f"echo '{MISLEADING}'", "exit 1")
    if failure is not None:
        assert execute(one_run(recipe), tmp_path / "run", threads=1).failure == failure
        return
    with pytest.raises(LoraOverError, match=MISLEADING):
        execute(one_run(recipe), tmp_path / "run", threads=1)
    assert not (tmp_path / "run" / OUTCOME_FILE).exists()


def test_a_run_that_leaves_nothing_has_its_last_line_shown(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends_so(tmp_path, monkeypatch, 'rmdir "$6"', f"echo '{MISLEADING}'", "echo error: no such model", "echo", "exit 2")
    with pytest.raises(LoraOverError, match=r"without a result: error: no such model$"):
        execute(one_run(recipe), tmp_path / "run", threads=1)
    assert not (tmp_path / "run").exists()


def test_a_run_that_was_killed_says_so(
    finished_run: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it had failed before, and was resumed."""
    folder = copy_of(finished_run, tmp_path / "run", "run.json", "adapter")
    (folder / FAILURE_FILE).write_text(Failure(kind="failed", message="a fault").model_dump_json())
    ends_so(tmp_path, monkeypatch, f"echo '{MISLEADING}'", "kill -9 $$")
    with pytest.raises(LoraOverError, match="the process was killed"):
        execute(one_run(recipe), folder, threads=1)
    assert not (folder / OUTCOME_FILE).exists()
    monkeypatch.undo()
    assert execute(one_run(recipe), folder, threads=1).failure is None


def test_another_default_of_a_decomposition_is_another_run(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    over, plain = (load_recipe(str(recipe), {"method": method}) for method in ("lora-over", "lora"))
    before = digest(over), digest(plain)
    monkeypatch.setattr(config_module, "make_decomposition", lambda name, options: Mpo(gauge="random"))
    assert digest(over) != before[0]
    assert digest(plain) == before[1]


def test_settings_of_a_method_may_be_lists_and_mappings(recipe: Path) -> None:
    text = "lora,lora-over:schedule=dynamic:budget={fraction: 0.25}:sites=['*.q_proj.*', '*.v_proj.*'],lora-over:"
    text += (
        "decomposition=chain:options={depth: 3, expansion: 1.5},lora-over:schedule=static:budget.sites=2:score=random"
    )
    methods = split_outside_brackets(text, ",")
    assert len(methods) == 4
    _, dynamic, chain, static = (
        found.recipe.over for found in make_grid([str(recipe)], dict.fromkeys(methods, (1e-3,)), 1, {})
    )
    assert (dynamic.schedule, dynamic.budget) == ("dynamic", Budget(fraction=0.25))
    assert dynamic.sites == ["*.q_proj.*", "*.v_proj.*"]
    assert (chain.decomposition, chain.options) == ("chain", {"depth": 3, "expansion": 1.5})
    assert (static.schedule, static.budget, static.score) == ("static", Budget(sites=2), "random")


def test_what_is_compared_by_default(recipe: Path) -> None:
    grid = make_grid([str(recipe)], dict.fromkeys(DEFAULT_METHODS, (1e-3,)), 1, {})
    lora, matched, over, fisher, chance = (found.recipe for found in grid)
    assert matched.lora.r > lora.lora.r
    assert over.over.schedule == "all"
    assert [found.over.budget for found in (fisher, chance)] == [Budget(fraction=0.25)] * 2
    assert [found.over.score for found in (fisher, chance)] == ["fisher", "random"]


def test_a_matched_rank_counts_what_the_schedule_can_inject(recipe: Path) -> None:
    def rank(**over: Any) -> int:
        return matched_rank(load_recipe(str(recipe), {f"over.{key}": value for key, value in over.items()}))

    wide = {"expansion": 3.0}
    everything = rank(options=wide)
    assert everything >= 12  # 4 times 3
    assert (
        4 < rank(options=wide, sites=["*.q_proj.*"]) < rank(options=wide, schedule="dynamic", budget={"fraction": 0.5})
    )
    assert rank(options=wide, schedule="dynamic", budget={"fraction": 1.0}) == everything
    assert rank(options=wide, schedule="static", budget={"fraction": 0.5}) < everything


def test_lora_matched_takes_no_rank(recipe: Path) -> None:
    with pytest.raises(ConfigError, match="lora:r=N"):
        make_grid([str(recipe)], {"lora-matched:r=64": [1e-3]}, 1, {})


def test_every_method_makes_a_recipe(recipe: Path) -> None:
    methods = ["lora", "rslora", "dora", "pissa", "lora+", "lora-matched", "full", "lora-over:decomposition=svd"]
    grid = make_grid([str(recipe)], {method: [1e-3] for method in methods}, 1, {})
    by_method = {found.method: found.recipe for found in grid}
    assert by_method["dora"].lora.use_dora
    assert by_method["lora+"].training.loraplus_lr_ratio == 16
    assert by_method["lora-over:decomposition=svd"].over.decomposition == "svd"
    assert by_method["lora-matched"].lora.r == matched_rank(load_recipe(str(recipe))) > 4
    assert len({found.folder for found in grid}) == len(methods)


def test_a_setting_may_be_any_key_of_a_recipe(recipe: Path) -> None:
    over = "lora-over:decomposition=svd:options={}:training.loraplus_lr_ratio=4:lora.lora_alpha=4"
    plain = "lora:r=2:training.optim=adamw_torch:data.train_examples=8"
    plus = "lora+:training.weight_decay=0.1"
    one, other, third = (
        found.recipe for found in make_grid([str(recipe)], {m: [1e-3] for m in (over, plain, plus)}, 1, {})
    )
    assert (one.method, one.over.decomposition, one.training.loraplus_lr_ratio) == ("lora-over", "svd", 4)
    assert (one.lora.r, one.lora.lora_alpha) == (4, 4)
    assert (other.method, other.lora.r, other.training.optim) == ("lora", 2, "adamw_torch")
    assert other.data.train_examples == 8
    assert (third.training.loraplus_lr_ratio, third.training.weight_decay) == (16, 0.1)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("lora:training.learning_rate=1", "training.learning_rate, which a study varies; use --lr-sweep"),
        ("lora:training.seed=1", "training.seed, which a study varies; use --seeds"),
        ("lora:training.loraplus_ratio=4", "did you mean 'loraplus_lr_ratio'"),
        ("lora-matched:lora.r=4", "lora-matched chooses its rank"),
    ],
)
def test_a_setting_that_a_study_cannot_take_is_refused(method: str, message: str, recipe: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        make_grid([str(recipe)], {method: [1e-3]}, 1, {})


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        *((method, True) for method in ("lora", "lora+", "lora-matched", "lora:r=64", "lora:lora.r=64")),
        *((method, True) for method in ("lora:training.loraplus_lr_ratio=4", "lora+:training.min_lr_rate=0.1")),
        *((method, False) for method in ("rslora", "dora", "pissa", "full", "lora-over")),
        *((method, False) for method in ("lora:use_dora=true", "lora+:lora.init_lora_weights=pissa")),
        ("lora-over:training.loraplus_lr_ratio=4", False),
        ("lora:training.optim=soap", False),
    ],
)
def test_what_counts_as_a_baseline(method: str, expected: bool) -> None:
    assert is_plain(method) == expected


def test_a_matched_rank_is_that_of_the_methods_own_settings(recipe: Path) -> None:
    methods = ("lora-matched", "lora-matched:over.options={expansion: 3.0}")
    plain, wide = (found.recipe.lora.r for found in make_grid([str(recipe)], dict.fromkeys(methods, (1e-3,)), 1, {}))
    assert wide > plain


def test_a_study_with_tuning_seeds_and_a_ruler_trains(recipe: Path, tmp_path: Path) -> None:
    out, more = tmp_path / "out", ["--tuning-seeds", "1", "--ruler", "lora:r=2", "--set", "training.max_steps=2"]
    assert run(cli, words(recipe, out, *more)) == 0
    report = report_of(out)
    assert (report.is_whole, report.seeds, report.tuning_seeds, report.runs) == (True, 2, 1, 9)
    (task,) = report.tasks
    assert (task.baseline, task.rulers) == ("lora", ["lora:r=2"])
    before = {path: path.stat().st_mtime_ns for path in outcomes_in(out)}
    assert run(cli, words(recipe, out, *more)) == 0
    assert {path: path.stat().st_mtime_ns for path in outcomes_in(out)} == before
    assert report_of(out).tasks == report.tasks


def test_seeds_come_one_after_the_other(recipe: Path) -> None:
    seeds = [found.seed for found in make_grid([str(recipe)], {"lora": [1e-3, 1e-2], "lora-over": [1e-4]}, 3, {})]
    assert seeds == sorted(seeds)


def asked(methods: Sequence[str], recipes: Sequence[str], **lr_sweep: tuple[float, ...]) -> StudyRequest:
    sweep = {"" if name == "others" else name: rates for name, rates in lr_sweep.items()}
    return StudyRequest(tuple(recipes), tuple(methods), sweep)


def test_a_method_may_have_a_sweep_of_its_own() -> None:
    svd = "lora-over:decomposition=svd"
    found = asked(["lora", svd], ["gsm8k"], others=(1e-3, 1e-2), **{svd: (1e-4, 3e-4)})
    assert found.rates == {"lora": (1e-3, 1e-2), svd: (1e-4, 3e-4)}
    assert found.task_rates == {}
    with pytest.raises(ConfigError, match="no rates for 'lora'"):
        asked(["lora", svd], ["gsm8k"], **{svd: (1e-4,)})


def test_a_name_of_a_method_and_a_recipe_is_ambiguous() -> None:
    with pytest.raises(ConfigError, match="a method and a recipe"):
        asked(["lora", "lora-over"], ["lora"], others=(1e-3,), lora=(1e-4,))


@pytest.mark.parametrize("place", ["{recipe}", "{recipe}/below"])
def test_a_study_without_a_place_is_refused(
    place: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = recipe.read_bytes()
    assert run(cli, words(recipe, Path(place.format(recipe=recipe)))) == 2
    assert "cannot be made" in capsys.readouterr().err
    assert recipe.read_bytes() == before


def test_a_long_method_has_a_folder_that_a_file_system_takes(recipe: Path) -> None:
    methods = [f"lora-over:sites={[name * 60]}" for name in ("*.layers.0.*a", "*.layers.0.*b")]
    grid = make_grid([str(recipe)], dict.fromkeys(("lora", *methods), (1e-3,)), 1, {})
    assert len({found.folder for found in grid}) == 3
    assert all(len(part) < 200 for found in grid for part in found.folder.parts)


def test_a_recipe_that_leads_out_of_the_study_is_refused(recipe: Path, tmp_path: Path) -> None:
    odd = tmp_path / "...yaml"
    odd.write_bytes(recipe.read_bytes())
    with pytest.raises(ConfigError, match="give it another name"):
        make_grid([str(odd)], {"lora": [1e-3]}, 1, {})


def test_a_task_may_have_a_sweep_of_its_own(recipe: Path) -> None:
    found = asked(["lora", "lora-over"], [str(recipe)], **{recipe.stem: (1e-4, 3e-4)})
    runs = make_grid([str(recipe)], found.rates, 1, {}, found.task_rates)
    assert [(run.method, run.rate) for run in runs] == [
        (method, rate) for method in ("lora", "lora-over") for rate in (1e-4, 3e-4)
    ]
    with pytest.raises(ConfigError, match="no rates for 'lora'"):
        asked(["lora", "lora-over"], [str(recipe), "other"], **{recipe.stem: (1e-4,)})
    found = asked(["lora"], [str(recipe), "other"], lora=(1e-3,), **{recipe.stem: (1e-4,)})
    assert (found.rates, found.task_rates) == ({"lora": (1e-3,)}, {recipe.stem: (1e-4,)})


@pytest.mark.parametrize("method", ["dora", "pissa", "lora+", "full"])
def test_the_other_methods_train(method: str, recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    _, found = make_grid(
        [str(recipe)], {"lora": [1e-3], method: [1e-3]}, 1, {"training.max_steps": 2, "diagnostics": True}
    )
    settings = tmp_path / "recipe.yaml"
    settings.write_text(json.dumps(found.recipe.model_dump(mode="json")))
    assert run(cli, ["train", str(settings), "-o", str(folder)]) == 0
    card = (folder / ("model" if method == "full" else "adapter") / "README.md").read_text()
    said = {"dora": "A DoRA adapter of", "full": "A fine-tuned copy of"}
    assert said.get(method, "A plain LoRA adapter of") in card
    assert f"library_name: {'transformers' if method == 'full' else 'peft'}" in card
    norm, logged = read_run(folder).update_norm, (folder / "metrics.jsonl").read_text()
    if method in ("dora", "full"):  # which train more than B A
        assert norm is None
        assert "step_norm" not in logged
    else:
        assert norm is not None
        assert 0 < norm < (0.2 if method == "pissa" else 2)  # of two steps, without the B A that PiSSA begins with
        assert "step_norm" in logged


@pytest.mark.parametrize(("resources", "gpus"), [({"CPU": 2.0}, 0), ({"CPU": 2.0, "GPU": 1.0}, 1)])
def test_a_run_reserves_a_gpu_where_a_cluster_has_any(
    resources: dict[str, float], gpus: int, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a cluster that only notes what it is asked for."""
    reserved: list[dict[str, int]] = []
    outcome = Outcome(recipe="", nats=[1.0], tokens=[1]).model_dump_json()

    def remote(**options: int) -> Callable[[object], SimpleNamespace]:
        reserved.append(options)
        return lambda work: SimpleNamespace(remote=lambda recipe: object())

    cluster = SimpleNamespace(
        init=lambda **_: None,
        shutdown=lambda: None,
        cluster_resources=lambda: resources,
        remote=remote,
        wait=lambda waiting, num_returns: (waiting[:1], waiting[1:]),
        get=lambda done: outcome,
    )
    monkeypatch.setitem(sys.modules, "ray", cluster)
    grid = make_grid([str(recipe)], {"lora": [1e-3, 1e-2]}, 1, {})
    found = run_grid(grid, tmp_path, Where(ray="local"), ConsoleReporter(Console()))
    assert len(found) == 2
    assert reserved == [{"num_cpus": 1, "num_gpus": gpus}]


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two workers take two cores")
def test_two_workers_of_ray_run_a_study(recipe: Path, tmp_path: Path) -> None:
    more = ["--ray", "local", "--lr-sweep", "1e-2", "--seeds", "1"]
    assert run(cli, words(recipe, tmp_path / "out", *more)) == 0
    assert report_of(tmp_path / "out").runs == 2
    outcomes = [Outcome.model_validate_json(path.read_text()) for path in tmp_path.rglob(OUTCOME_FILE)]
    assert None not in {found.worker for found in outcomes}
    assert len({found.worker for found in outcomes}) == 2
