"""`loraover.train` from Python: it prints nothing, and returns what the run keeps."""

from __future__ import annotations

import json
import logging
import shlex
from pathlib import Path

import pytest
import transformers
from rich.console import Console

import loraover
from loraover.common.errors import ConfigError
from loraover.common.quiet import LOGGERS
from loraover.reporting.reporter import ConsoleReporter

pytestmark = [pytest.mark.process, pytest.mark.usefixtures("no_network")]


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
