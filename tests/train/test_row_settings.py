"""Settings of TRL that say how rows are read: the column of texts, and the chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import loraover
import loraover_export
from loraover.common.errors import ConfigError, DataError
from loraover.training.plan import make_plan

from support.lines import Lines
from support.rows import TURNS
from support.tiny_hub import write_recipe
from support.train_command import data_file
from support.trained_run import matrices

TEXT = [{"text": f"{n} + 1 = {n + 1}"} for n in range(8)]
CHAT = [
    {"messages": [{"role": "user", "content": f"{n}+1?"}, {"role": "assistant", "content": str(n + 1)}]}
    for n in range(8)
]


def asked(folder: Path, model: Path, rows: list[dict[str, Any]], **training: Any) -> str:
    """A recipe of two steps on rows, without evaluation, with these settings of `training`."""
    data = {"train": str(data_file(folder / f"{len(training)}.jsonl", *rows)), "train_examples": None}
    settings = {"max_steps": 2, "save_steps": 1} | training
    path = folder / f"recipe-{len(training)}.yaml"
    return str(write_recipe(path, model, data=data, training=settings, evaluation={"examples": 0}))


@pytest.fixture
def template(bases: dict[str, Path], tmp_path: Path) -> Path:
    """A file with the chat template that the model `chat` has and the model `llama` has not."""
    path = tmp_path / "chat.jinja"
    path.write_text(AutoTokenizer.from_pretrained(bases["chat"]).chat_template)
    return path


def same(one: Path, other: Path) -> bool:
    """Whether two runs have trained the same matrices, bit for bit."""
    first, second = matrices(one), matrices(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_column_of_another_name_is_learned_as_text(base: Path, tmp_path: Path) -> None:
    named = [{"body": row["text"], "id": k} for k, row in enumerate(TEXT)]
    loraover.train(asked(tmp_path, base, TEXT), tmp_path / "text")
    said = Lines()
    loraover.train(asked(tmp_path, base, named, dataset_text_field="body"), tmp_path / "body", report=said)
    assert same(tmp_path / "text", tmp_path / "body")
    assert [line for line in said.lines if "is not learned" in line] == [
        "column 'id' is not learned; 8 rows have it (rows 1, 2, 3, ...)"
    ]


def test_two_columns_of_texts_are_refused(base: Path, tmp_path: Path) -> None:
    recipe = asked(tmp_path, base, [*TEXT, {"text": "a", "body": "b"}], dataset_text_field="body")
    with pytest.raises(DataError, match="row 9: has a column 'text' besides 'body'"):
        loraover.train(recipe, tmp_path / "out")


def test_a_template_takes_the_place_of_the_models(bases: dict[str, Path], template: Path, tmp_path: Path) -> None:
    loraover.train(asked(tmp_path, bases["chat"], CHAT), tmp_path / "own")
    recipe = asked(tmp_path, bases["llama"], CHAT, chat_template_path=str(template))
    result = loraover.train(recipe, tmp_path / "named")
    assert same(tmp_path / "own", tmp_path / "named")
    kept = AutoTokenizer.from_pretrained(tmp_path / "named" / "adapter")
    assert kept.chat_template == template.read_text()
    assert make_plan(loraover.load_recipe(recipe)).lengths == result.lengths


def test_exports_keep_the_template(bases: dict[str, Path], template: Path, tmp_path: Path) -> None:
    recipe = asked(tmp_path, bases["llama"], CHAT, chat_template_path=str(template))
    loraover.train(recipe, tmp_path / "run")
    trained, folded = tmp_path / "run" / "adapter", tmp_path / "folded"
    loraover_export.fold_checkpoint(trained, folded)
    loraover_export.export_vllm(folded, tmp_path / "vllm")
    loraover_export.merge_adapter(folded, tmp_path / "merged", model=str(bases["llama"]))
    for written in (folded, tmp_path / "vllm"):
        assert (written / "chat_template.jinja").read_bytes() == (trained / "chat_template.jinja").read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == template.read_text()


def test_a_run_is_resumed_with_its_template_only(bases: dict[str, Path], template: Path, tmp_path: Path) -> None:
    recipe, out = asked(tmp_path, bases["llama"], CHAT, chat_template_path=str(template)), tmp_path / "out"
    loraover.train(recipe, out)
    (out / "run.json").unlink()
    template.write_text(template.read_text() + " ")
    with pytest.raises(DataError, match="another text in the file that"):
        loraover.train(recipe, out, resume=True)


NO_TEMPLATES = {
    "another model": ("owner/model", "expected a file on this machine that ends in .jinja or .j2"),
    "no such file": ("missing.jinja", "expected a file on this machine"),
    "another ending": ("rows.txt", "expected a file on this machine that ends"),
    "no text": ("bytes.jinja", "cannot be read"),
}


@pytest.mark.parametrize(("name", "message"), NO_TEMPLATES.values(), ids=NO_TEMPLATES)
def test_what_is_no_template_is_refused(
    name: str, message: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.txt").write_text("a")
    Path("bytes.jinja").write_bytes(b"\xff")
    recipe = asked(tmp_path, base, CHAT, chat_template_path=name)
    for act in (lambda: loraover.train(recipe, tmp_path / "out"), lambda: make_plan(loraover.load_recipe(recipe))):
        with pytest.raises(ConfigError, match=f"training.chat_template_path.*{message}"):
            act()
    assert not (tmp_path / "out").exists()


def test_a_template_that_refuses_a_row_names_it(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "strict.jinja"
    path.write_text("{{ raise_exception('no system turns') if messages[0].role == 'system' else 'a' }}")
    recipe = asked(tmp_path, base, [*CHAT, {"messages": TURNS}], chat_template_path=str(path))
    with pytest.raises(DataError, match=r"row 9.*chat template refuses it: no system turns"):
        loraover.train(recipe, tmp_path / "out")
