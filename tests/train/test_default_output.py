"""A run's folder where none is named, the recipes that ship, and the library's functions of training."""

from __future__ import annotations

import json
import logging
import re
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import transformers
from rich.console import Console

import loraover
from loraover.cli import cli
from loraover.common.command_line import run
from loraover.common.errors import ConfigError, OutputError
from loraover.common.file_lock import hold_lock
from loraover.common.quiet import LOGGERS
from loraover.reporting.reporter import ConsoleReporter
from loraover.training.run.folder import LOCK_FILE, claim, new_run_folder, newest_unfinished

from support.machine import without_locks

pytestmark = [pytest.mark.process, pytest.mark.usefixtures("no_network")]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def begun(folder: Path, *files: str) -> Path:
    for name in ("recipe.yaml", *files):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_folders_are_numbered_from_the_first_free_one() -> None:
    with ThreadPoolExecutor(8) as pool:  # runs that begin at once do not share a folder
        made = list(pool.map(new_run_folder, ["demo", "recipes/demo.yaml"] * 20))
    assert sorted(map(str, made)) == sorted(f"runs/demo-{number}" for number in range(1, 41))
    Path("runs/demo-1").rmdir()
    assert new_run_folder("demo") == Path("runs/demo-1")


def test_a_file_in_the_place_of_all_runs_is_refused(here: Path) -> None:
    (here / "runs").touch()
    with pytest.raises(OutputError, match="it is a file"):
        new_run_folder("demo")


def test_the_newest_unfinished_run_has_the_highest_number() -> None:
    begun(Path("runs/demo-2"))
    begun(Path("runs/demo-9"))
    newest = begun(Path("runs/demo-10"), "adapter")  # killed before its result
    begun(Path("runs/demo-11"), "run.json")
    begun(Path("runs/demo-extra-13"))
    Path("runs/demo-14").mkdir()
    assert newest_unfinished("demo.yaml") == newest
    with pytest.raises(ConfigError, match="no unfinished run of other"):
        newest_unfinished("other")


def test_a_run_that_is_being_trained_is_not_the_newest_unfinished_one() -> None:
    waiting, trained = (begun(Path(f"runs/demo-{number}"), "trainer/lock") for number in (1, 2))
    with hold_lock(trained / LOCK_FILE, wait=False):
        assert newest_unfinished("demo") == waiting
        with hold_lock(waiting / LOCK_FILE, wait=False), pytest.raises(ConfigError, match="trained by another process"):
            newest_unfinished("demo")
    assert newest_unfinished("demo") == trained


def test_without_locks_a_run_is_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    without_locks(monkeypatch)
    folder = begun(Path("runs/demo-1"), "trainer/lock")
    assert newest_unfinished("demo") == folder
    with claim(folder, resume=True):
        pass


def test_a_run_is_told_its_folder_and_continued_without_it(
    recipe: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(cli, ["train", str(recipe), "--resume"]) == 2
    assert "no unfinished run of recipe" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr("loraover.training.run.train._publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(cli, ["train", str(recipe)]) == 130
    shown = capsys.readouterr()
    assert "run: runs/recipe-1" in shown.out.splitlines()
    assert re.search(r"last complete checkpoint: loraover train .* -o runs/recipe-1 --resume\n", shown.err)
    assert run(cli, ["train", str(recipe), "--resume"]) == 0
    assert (here / "runs" / "recipe-1" / "run.json").is_file()
    assert run(cli, ["train", str(recipe), "--resume"]) == 2  # it is finished now
    assert run(cli, ["train", str(recipe), "--model", "no-such-folder/at-all/here"]) == 2
    assert [path.name for path in (here / "runs").iterdir()] == ["recipe-1"]


def test_the_recipes_that_ship_are_listed_and_printed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cli, ["recipes"]) == 0
    listed = capsys.readouterr().out
    assert "demo\n  base model: HuggingFaceTB/SmolLM2-135M-Instruct" in listed
    assert "data: openai/gsm8k" in listed
    assert run(cli, ["recipes", "demo"]) == 0
    (here / "mine.yaml").write_text(capsys.readouterr().out)
    assert run(cli, ["train", "mine.yaml", "--set", "training.max_step=1"]) == 2
    assert "did you mean 'max_steps'" in capsys.readouterr().err
    assert run(cli, ["recipes", "dem"]) == 2
    assert "did you mean 'demo'" in capsys.readouterr().err


def test_every_public_name_can_be_had() -> None:
    expected = {"train", "inspect_folder", "Recipe", "RunResult"}
    assert expected <= {*loraover.__all__}
    for name in loraover.__all__:
        assert getattr(loraover, name) is not None
    with pytest.raises(AttributeError, match="fine_tune"):
        _ = loraover.fine_tune


@pytest.mark.parametrize("kind", ["name", "recipe"])
def test_training_prints_nothing_and_returns_the_result(
    kind: str, recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = {name: logging.getLogger(name).level for name in LOGGERS}
    given = str(recipe) if kind == "name" else loraover.load_recipe(recipe)
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is free
    capfd.readouterr()
    result = loraover.train(given, out, overrides={"training.seed": 1, "training.max_steps": 2})
    assert capfd.readouterr() == ("", "")
    assert json.loads((out / "run.json").read_text()) == result.model_dump(mode="json")
    assert (result.seed, result.steps) == (1, 2)
    assert loraover.read_run(out) == result
    assert {name: logging.getLogger(name).level for name in LOGGERS} == before
    card = (out / "adapter" / "README.md").read_text()
    if kind == "recipe":
        assert f"loraover train {out}/recipe.yaml\n" in card
    else:
        again = ["loraover", "train", str(recipe), "-o", str(out), "--set", "training.seed=1"]
        assert f"{shlex.join(again)} --set training.max_steps=2\n" in card


def test_a_reporter_shows_progress_and_no_bar_of_another_library(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    transformers.logging.enable_progress_bar()
    try:
        with (tmp_path / "log").open("w") as log:
            report = ConsoleReporter(Console(file=log))
            loraover.train(recipe, tmp_path / "out", overrides={"training.max_steps": 1}, report=report)
    finally:
        transformers.logging.disable_progress_bar()
    assert capfd.readouterr() == ("", "")
    assert "after training: held-out loss" in (tmp_path / "log").read_text()


def test_what_cannot_be_used_is_an_exception(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="did you mean 'demo'"):
        loraover.train("demmo", tmp_path / "out")
    assert capfd.readouterr() == ("", "")
