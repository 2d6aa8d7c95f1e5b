"""A run that fails says why in `failure.json`, by kind; an unusable request and Ctrl-C leave no such file."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from loraover.callbacks.seal_checkpoints import last_whole_checkpoint
from loraover.checkpoint.tensor_file import NonFiniteError
from loraover.common.errors import CheckpointError, ConfigError, DivergedError, OutputError
from loraover.training.run.failure import FAILURE_FILE, failure_of, has_no_work, read_failure
from loraover.training.run_result import RUN_FILE

from support.make_checkpoint import tree
from support.no_memory import NO_MEMORY
from support.train_command import STEPS, train

pytestmark = [pytest.mark.process, pytest.mark.usefixtures("no_network")]


def no_memory() -> object:
    """An allocation that no machine can serve."""
    return torch.empty(2**60, dtype=torch.uint8)


def kind_in(folder: Path) -> str | None:
    found = read_failure(folder)
    return None if found is None else found.kind


def divergence_in(folder: Path) -> str:
    found = read_failure(folder)
    assert found is not None
    assert found.kind == "diverged"
    return found.message


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def on_step(step: int, do: Callable[[], object]) -> Iterator[None]:
    """Let something happen within a step of the block's runs, which are counted from 1."""
    training_step = Trainer.training_step

    def changed(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step - 1:
            do()
        return training_step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "training_step", changed)
        yield


def raising(error: BaseException) -> Callable[[], object]:
    def fail() -> None:
        raise error

    return fail


def end_of(recipe: Path, out: Path) -> int | Exception:
    """The exit code of a run, or the exception that Python shows with a traceback."""
    try:
        return train(recipe, out)
    except Exception as error:
        return error


# Kinds from real runs


@pytest.mark.parametrize("method", ["lora-over", "full"])
def test_a_rate_that_is_far_too_large_diverges(method: str, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert train(recipe, out, "--method", method, "--learning-rate", "1e30") == 2
    assert "learning rate 1e+30" in divergence_in(out)
    assert not (out / RUN_FILE).exists()
    assert not (out / "adapter").exists()


@pytest.mark.parametrize(
    ("figure", "before", "message"),
    [
        (
            "run.measure.token_loss",
            False,
            "the held-out loss after training is inf, expected a finite number. Lower the",
        ),
        ("run.measure.token_loss", True, "the held-out loss before training is inf, expected a finite number. Check"),
        (
            "run.train.step_norm",
            False,
            "the norm of delta(B A) is inf, expected a finite number. Lower the learning rate",
        ),
    ],
)
def test_a_figure_that_is_not_finite_is_not_written(
    figure: str, before: bool, message: str, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(f"loraover.training.{figure}", lambda *_: math.inf)
    assert train(recipe, out, "--set", f"evaluation.before={before}") == 2
    assert message in divergence_in(out)
    assert not (out / RUN_FILE).exists()


def test_cores_that_are_not_finite_cannot_be_resumed_from(recipe: Path, tmp_path: Path) -> None:
    out, options = tmp_path / "out", ("--method", "lora-over", "--learning-rate", "1e30", "--set")
    assert train(recipe, out, *options, "training.save_steps=1") == 2
    for folder in (out / "trainer").glob("checkpoint-*"):
        if folder.name > "checkpoint-3":
            shutil.rmtree(folder)
    (out / FAILURE_FILE).unlink()
    assert train(recipe, out, *options, "training.save_steps=1", "--resume") == 2
    assert "checkpoint-" in divergence_in(out)


def test_a_model_that_does_not_fit_leaves_nothing_but_its_failure(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert train(recipe, out, "--set", f"lora.r={2**52}") == 2
    assert names_in(out) == [FAILURE_FILE]
    assert kind_in(out) == "out_of_memory"
    assert not list(tmp_path.glob(".out*"))
    assert train(recipe, out) == 0
    assert kind_in(out) is None


def test_a_first_step_that_does_not_fit_leaves_nothing_but_its_failure(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with on_step(1, no_memory):
        for _ in range(2):  # the folder is not in the way
            assert train(recipe, out) == 2
            assert (names_in(out), kind_in(out)) == ([FAILURE_FILE], "out_of_memory")
    assert train(recipe, out) == 0
    assert kind_in(out) is None


ENDINGS: dict[str, tuple[Callable[[], object], str | None]] = {
    "an error of ours": (raising(ConfigError("training diverged")), "refused"),
    "any other error": (raising(RuntimeError("training diverged")), "failed"),
    "Ctrl-C": (raising(KeyboardInterrupt()), None),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_a_later_failure_lies_beside_what_the_run_resumes_from(name: str, recipe: Path, tmp_path: Path) -> None:
    """And is gone once the run has been resumed."""
    out, (do, kind) = tmp_path / "out", ENDINGS[name]
    with on_step(4, do):
        end = end_of(recipe, out)
    assert end == {"refused": 2, None: 130}.get(kind, end)
    assert kind_in(out) == kind
    assert last_whole_checkpoint(out / "trainer") == out / "trainer" / "checkpoint-2"
    before = tree(out)
    assert train(recipe, out) == 2  # the folder is in the way
    assert train(recipe, out, "--learning-rate", "1e-3", "--resume") == 2
    assert tree(out) == before
    assert train(recipe, out, "--resume") == 0
    assert kind_in(out) is None
    assert (out / RUN_FILE).exists()


@pytest.mark.parametrize("name", ENDINGS)
def test_what_ends_a_run_in_its_first_step_leaves_no_folder(name: str, recipe: Path, tmp_path: Path) -> None:
    with on_step(1, ENDINGS[name][0]):
        end = end_of(recipe, tmp_path / "out")
    assert end in (2, 130) or str(end) == "training diverged"
    assert not (tmp_path / "out").exists()


def test_a_resumed_run_that_is_interrupted_keeps_no_older_failure(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with on_step(4, raising(MemoryError())):
        assert train(recipe, out) == 2
    assert "training ran out of memory (MemoryError). Lower training.per_device" in capsys.readouterr().err
    with on_step(4, raising(KeyboardInterrupt())):
        assert train(recipe, out, "--resume") == 130
    assert kind_in(out) is None


def test_an_adapter_that_cannot_be_written_is_a_refusal(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with on_step(STEPS, lambda: (out / "adapter").write_text("in the way")):
        assert train(recipe, out) == 2
    assert kind_in(out) == "refused"


# By type


WORDLESS: dict[str, tuple[Exception, str]] = {
    "diverged": (DivergedError("xyz"), "diverged"),
    "read from a file": (NonFiniteError("xyz"), "diverged"),
    "CUDA's": (torch.OutOfMemoryError("xyz"), "out_of_memory"),
    "Python's": (MemoryError("xyz"), "out_of_memory"),
    "a checkpoint": (
        CheckpointError("training diverged: NaN or infinity; the run that wrote it had diverged"),
        "refused",
    ),
    "an output": (OutputError("CUDA out of memory: can't allocate memory, MemoryError"), "refused"),
    "a value": (ValueError("torch.OutOfMemoryError: can't allocate memory"), "failed"),
}


@pytest.mark.parametrize(("error", "kind"), WORDLESS.values(), ids=WORDLESS)
def test_the_type_decides_whatever_the_words(error: Exception, kind: str) -> None:
    assert failure_of(error).kind == kind


def test_a_model_that_cannot_be_loaded_for_lack_of_memory(
    recipe: Path, tmp_path: Path, failing_model: Callable[..., None]
) -> None:
    """As a model is loaded, every error becomes one that names the model."""
    failing_model(NO_MEMORY["the CPU"], "loaded")
    assert train(recipe, tmp_path / "out") == 2
    assert kind_in(tmp_path / "out") == "out_of_memory"


# The file


def test_the_file_is_literal_json(recipe: Path, tmp_path: Path) -> None:
    with on_step(3, raising(ValueError("two\nlines \udcff"))), pytest.raises(ValueError, match="two"):
        train(recipe, tmp_path / "out")
    assert json.loads((tmp_path / "out" / FAILURE_FILE).read_text()) == {
        "schema_version": 1,
        "kind": "failed",
        "message": "ValueError: two\nlines \\udcff",
    }


def test_a_failure_that_cannot_be_written_is_still_raised(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def remove() -> None:
        shutil.rmtree(out)
        out.write_text("no folder")
        raise RuntimeError("a fault")

    with on_step(3, remove), pytest.raises(RuntimeError, match="a fault") as raised:
        train(recipe, out)
    assert "cannot write" in raised.value.__notes__[0]
    assert out.read_text() == "no folder"


def test_only_a_folder_with_nothing_else_is_free(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert has_no_work(out)
    (out / FAILURE_FILE).write_text("{}")
    assert has_no_work(out)
    (tmp_path / "link").symlink_to(out)
    assert not has_no_work(tmp_path / "link")
    (out / "notes.txt").write_text("mine")
    assert not has_no_work(out)
    assert train(recipe, out) == 2
    assert names_in(out) == [FAILURE_FILE, "notes.txt"]
