"""One run of a study: made again where it was killed, and its failures told apart."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from loraover.common.errors import ConfigError, DataError, LoraOverError
from loraover.overparam import config as config_module
from loraover.overparam.decompositions import Mpo
from loraover.training.recipe import Recipe, load_recipe
from loraover.training.run.failure import FAILURE_FILE, Failure
from loraover.training.run_result import read_run
from loraover_lab.study import outcome as outcome_module
from loraover_lab.study.outcome import RunOutcome, check_held_out, digest, execute

from support.study_grid import make_grid
from support.train_command import data_file

pytestmark = pytest.mark.process


def one_run(recipe: Path, **settings: Any) -> Recipe:
    (found,) = make_grid([str(recipe)], {"lora": [1e-3]}, 1, {"training.max_steps": 2, **settings})
    return found.recipe


@pytest.fixture(scope="module")
def outcome(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunOutcome]:
    folder = tmp_path_factory.mktemp("one") / "run"
    return folder, execute(one_run(recipe), folder, threads=1)


@pytest.fixture(scope="module")
def finished_run(outcome: tuple[Path, RunOutcome]) -> Path:
    return outcome[0]


def copy_of(run: Path, folder: Path, *lost: str) -> Path:
    """The run beside the recipe that it was asked for, without what is lost."""
    shutil.copy(run.with_name("run.yaml"), folder.with_name("run.yaml"))
    return Path(shutil.copytree(run, folder, ignore=shutil.ignore_patterns(*lost)))


@pytest.mark.parametrize("lost", [("run.json", "adapter", "recipe.yaml"), ("run.json",)])
def test_a_run_that_was_killed_at_its_edges_is_made_again(
    lost: tuple[str, ...], outcome: tuple[Path, RunOutcome], recipe: Path, tmp_path: Path
) -> None:
    """Before its recipe was kept; between its adapter and its result."""
    folder = copy_of(outcome[0], tmp_path / "run", *lost)
    found = execute(one_run(recipe), folder, threads=1)
    assert (found.failure, found.nats) == (None, outcome[1].nats)


def times(folder: Path) -> dict[str, int]:
    """When each file of a run was last written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_run_that_has_ended_is_not_trained_again(
    outcome: tuple[Path, RunOutcome], recipe: Path, tmp_path: Path
) -> None:
    folder = copy_of(outcome[0], tmp_path / "run")
    before = times(folder)
    assert execute(one_run(recipe), folder, threads=1) == outcome[1]
    assert times(folder) == before


@pytest.mark.parametrize("lost", [(), ("run.json", "adapter")])
def test_a_run_is_no_run_of_another_recipe(
    lost: tuple[str, ...], finished_run: Path, recipe: Path, tmp_path: Path
) -> None:
    """Finished, or to be resumed."""
    folder = copy_of(finished_run, tmp_path / "run", *lost)
    for _ in range(2):  # asking leaves no trace
        with pytest.raises(ConfigError, match="another recipe"):
            execute(one_run(recipe, **{"lora.r": 2}), folder, threads=1)


@pytest.mark.usefixtures("as_users_have_it")
def test_a_run_goes_on_while_its_study_is_killed_and_is_waited_for(recipe: Path, tmp_path: Path) -> None:
    """Two processes never write one run: the second study gets what the first one's process makes."""
    folder = tmp_path / "run"
    asked = one_run(recipe, **{"training.max_steps": 200, "training.save_steps": 10, "evaluation.before": False})
    code = (
        "import sys\nfrom pathlib import Path\nfrom loraover.training.recipe import Recipe\n"
        "from loraover_lab.study.outcome import execute\n"
        "execute(Recipe.model_validate_json(sys.argv[1]), Path(sys.argv[2]), threads=1)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, asked.model_dump_json(), str(folder)])
    deadline = time.monotonic() + 300
    first = folder / "trainer" / "checkpoint-10" / "complete.json"
    while not first.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    assert first.exists()
    assert not (folder / "run.json").exists()
    found = execute(asked, folder, threads=1)
    assert found.failure is None
    assert read_run(folder).timed_steps == 200  # in one process


def test_seconds_are_those_of_the_steps_that_were_timed(finished_run: Path, recipe: Path, tmp_path: Path) -> None:
    folder = copy_of(finished_run, tmp_path / "run")
    result = read_run(folder).model_copy(update={"steps": 100, "timed_steps": 4, "train_seconds": 2.0})
    (folder / "run.json").write_text(result.model_dump_json())
    assert execute(one_run(recipe), folder, threads=1).step_seconds == 0.5
    (folder / "run.json").write_text(result.model_copy(update={"timed_steps": 0}).model_dump_json())
    assert execute(one_run(recipe), folder, threads=1).step_seconds is None


def test_the_commit_of_a_model_is_the_one_that_the_run_pinned(finished_run: Path, recipe: Path, tmp_path: Path) -> None:
    folder = copy_of(finished_run, tmp_path / "run")
    assert execute(one_run(recipe), folder, threads=1).model_revision is None
    pinned = load_recipe(str(folder / "recipe.yaml"), {"model_revision": "c0ffee"})
    (folder / "recipe.yaml").write_text(pinned.model_dump_json())
    assert execute(one_run(recipe), folder, threads=1).model_revision == "c0ffee"


def test_a_loss_that_is_no_number_is_a_divergence(finished_run: Path, recipe: Path, tmp_path: Path) -> None:
    folder = copy_of(finished_run, tmp_path / "run")
    scored = json.loads((folder / "held_out.json").read_text())
    scored[0][0] = float("nan")
    (folder / "held_out.json").write_text(json.dumps(scored))
    assert execute(one_run(recipe), folder, threads=1).failure == "training diverged"


def test_a_run_that_was_killed_after_it_diverged_has_diverged(recipe: Path, tmp_path: Path) -> None:
    """Its cores, which are resumed from, are no numbers."""
    diverging = {"method": "lora-over", "training.learning_rate": 1e30, "training.save_steps": 1}
    asked = load_recipe(str(recipe), diverging | {"training.max_steps": 2, "evaluation.before": False})
    folder = tmp_path / "run"
    assert execute(asked, folder, threads=1).failure == "training diverged"
    (folder / FAILURE_FILE).unlink()
    assert (folder / "trainer" / "checkpoint-2" / "complete.json").is_file()
    assert execute(asked, folder, threads=1).failure == "training diverged"


def test_a_run_that_does_not_fit_is_a_failure_of_its_own(recipe: Path, tmp_path: Path) -> None:
    """It is told from its file, without another try; of this recipe, and no other."""
    asked, folder = one_run(recipe, **{"lora.r": 2**52}), tmp_path / "run"
    found = execute(asked, folder, threads=1)
    assert found.failure == "out of memory"
    assert sorted(path.name for path in folder.iterdir()) == [FAILURE_FILE]
    before = times(folder)
    with pytest.raises(ConfigError, match="another recipe"):
        execute(one_run(recipe), folder, threads=1)
    assert execute(asked, folder, threads=1) == found
    assert times(folder) == before


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
    monkeypatch.undo()
    assert execute(one_run(recipe), folder, threads=1).failure is None


def test_held_out_turns_of_one_conversation_are_refused(recipe: Path, tmp_path: Path) -> None:
    """Each turn is an example, and they would lie in both halves."""

    def talking(turns: int) -> Recipe:
        told = [{"role": role, "content": str(i)} for i in range(turns) for role in ("user", "assistant")]
        talks = [[{"role": "system", "content": f"talk {number}"}, *told] for number in range(4)]
        held_out = data_file(tmp_path / f"{turns}.jsonl", *({"messages": talk} for talk in talks))
        return one_run(recipe, **{"data.test": str(held_out)})

    assert check_held_out(talking(1)) == 4
    with pytest.raises(DataError, match="example 2 is a later turn"):
        execute(talking(2), tmp_path / "run", threads=1)


def test_another_default_of_a_decomposition_is_another_run(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    over, plain = (load_recipe(str(recipe), {"method": method}) for method in ("lora-over", "lora"))
    before = digest(over), digest(plain)
    monkeypatch.setattr(config_module, "make_decomposition", lambda name, options: Mpo(gauge="random"))
    assert digest(over) != before[0]
    assert digest(plain) == before[1]
