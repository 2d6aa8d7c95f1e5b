"""A fold that cannot be done ends in one message and exit code 2, with the input untouched and no output.

What the readers refuse is tested in `tests/train/test_checkpoint_refused.py`; here, that the command reports it.
"""

from __future__ import annotations

import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraover.common.command_line import run
from loraover_export.cli import cli
from loraover_export.fold import check_outputs

from support.checkpoint_damage import (
    CORES,
    META,
    Q_A,
    TENSORS,
    WRONG_CONFIG,
    WRONG_META,
    WRONG_TENSORS,
    Damage,
    meta,
    replaced,
    site,
)
from support.make_checkpoint import Made, edit_json, make_checkpoint, reseal, tree
from support.refusals import fold, one_message, only_error
from support.tiny_models import tiny_gpt2, tiny_llama
from support.vllm_damage import config

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Tests copy it before they damage it."""
    return make_checkpoint(tmp_path_factory.mktemp("made"), tokenizer=True)


@pytest.fixture
def source(made: Made, tmp_path: Path) -> Path:
    return shutil.copytree(made.path, tmp_path / "input")


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Folds, and checks all that a refusal promises; `named` must be in the message."""

    def check(source: Path, *options: str, named: tuple[str, ...] = (), output: Path | None = None) -> str:
        before = tree(tmp_path)
        capsys.readouterr()
        code = fold(source, tmp_path / "out" if output is None else output, *options)
        out, err = capsys.readouterr()
        assert code == 2, out + err
        assert tree(tmp_path) == before
        message = one_message(err)
        for text in named:
            assert text in message
        return message

    return check


# What the readers refuse, one case of each kind


def test_a_plain_adapter_is_no_checkpoint(source: Path, refused: Callable[..., str]) -> None:
    (source / META).unlink()
    (source / CORES).unlink()
    refused(source, named=(str(source / META), "holds a plain LoRA without the cores", "output_dir"))


def test_a_missing_folder_is_named(tmp_path: Path, refused: Callable[..., str]) -> None:
    refused(tmp_path / "absent", named=(f"{tmp_path / 'absent'}: no such folder",))


CASES = [
    (WRONG_TENSORS, "core transposed"),
    (WRONG_CONFIG, "DoRA"),
    (WRONG_META, "schema 2"),
]


@pytest.mark.parametrize(("table", "case"), CASES, ids=[case for _, case in CASES])
def test_a_damaged_checkpoint_is_named(
    table: dict[str, tuple[Damage, tuple[str, ...]]], case: str, source: Path, refused: Callable[..., str]
) -> None:
    damage, named = table[case]
    damage(source)
    reseal(source)
    refused(source, named=(str(source), *named))


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_a_base_model_that_is_a_pickle_is_refused(
    made: Made, source: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    base = shutil.copytree(made.base, tmp_path / "base")
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    refused(source, "--check-error", "--model", str(base), named=(str(base),))


def test_control_characters_of_a_file_do_not_reach_the_terminal(source: Path, refused: Callable[..., str]) -> None:
    site(name="\x1b[31mred\r\n")(source)
    reseal(source)
    assert re.search(r"[\x00-\x08\x0b-\x1f\x7f]", refused(source)) is None


# Base models and prompts that do not fit


BASES: dict[str, Callable[[], Any]] = {
    "fewer heads": lambda: tiny_llama(num_key_value_heads=1),
    "another architecture": tiny_gpt2,
}


@pytest.mark.parametrize("case", BASES)
def test_another_base_model_is_named(
    case: str, made: Made, source: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    BASES[case]().save_pretrained(tmp_path / "base")
    options = ("--check-error", "--model", str(tmp_path / "base"))
    refused(source, *options, named=(str(source), "self_attn", str(made.base), "--model"))


def unloadable(folder: Path, case: str) -> None:
    weights = folder / "model.safetensors"
    match case:
        case "no config":
            (folder / "config.json").unlink()
        case "no weights":
            weights.unlink()
        case "unknown architecture":
            edit_json(folder / "config.json", lambda content: content.update(model_type="unheard-of"))
        case "weights cut off":
            weights.write_bytes(weights.read_bytes()[:-100])


@pytest.mark.parametrize("case", ["no config", "no weights", "unknown architecture", "weights cut off"])
def test_a_base_model_that_does_not_load_is_named(
    case: str, made: Made, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = shutil.copytree(made.base, tmp_path / "base")
    unloadable(base, case)
    before = tree(tmp_path)
    assert fold(source, tmp_path / "out", "--check-error", "--model", str(base)) == 2
    assert str(base) in only_error(capsys.readouterr().err)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["./absent", "absent"])
def test_a_base_model_that_is_nowhere_is_named(name: str, source: Path, refused: Callable[..., str]) -> None:
    refused(source, "--check-error", "--model", name, named=(repr(name),))


def test_a_checkpoint_without_a_base_model_asks_for_one(source: Path, refused: Callable[..., str]) -> None:
    config(base_model_name_or_path=None)(source)
    meta(base_model=None)(source)
    reseal(source)
    refused(source, "--check-error", named=(str(source), "--model"))


@pytest.mark.parametrize("content", [None, b" \n\n"], ids=str)
def test_prompts_that_cannot_be_used_are_named(
    content: bytes | None,
    source: Path,
    tmp_path: Path,
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before the base model is loaded."""
    monkeypatch.setattr(check_outputs, "load_model", None)
    prompts = tmp_path / "prompts.txt"
    if content is not None:
        prompts.write_bytes(content)
    refused(source, "--check-error", "--prompts", str(prompts), named=(str(prompts),))


def test_prompts_need_a_tokenizer(made: Made, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = shutil.copytree(made.base, tmp_path / "base", ignore=shutil.ignore_patterns("tokenizer*"))
    (tmp_path / "prompts.txt").write_text("the train\n")
    options = ("--check-error", "--model", str(base), "--prompts", str(tmp_path / "prompts.txt"))
    assert fold(source, tmp_path / "out", *options) == 2
    message = only_error(capsys.readouterr().err)
    assert "no tokenizer" in message
    assert str(base) in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [[], ["--dtype", "int8"], ["--surprise"], ["extra"]], ids=str)
def test_unusable_arguments_exit_with_2(
    arguments: list[str], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["-o", str(tmp_path / "out")] if arguments else []
    assert run(cli, ["fold", str(source), *output, *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("Error: ")) == ("", 1)
    assert not (tmp_path / "out").exists()


# Outputs that cannot be


def test_an_output_that_cannot_be_is_named(source: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "out").mkdir()
    refused(source, named=(str(tmp_path / "out"), "exists already"))
    refused(source, output=source / "out", named=("inside the input", str(source)))


def test_a_refused_fold_makes_no_parents(source: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    replaced(TENSORS, Q_A, lambda a: a * 2)(source)
    reseal(source)
    refused(source, output=tmp_path / "new" / "parents" / "out")
