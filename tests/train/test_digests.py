"""Digests by which an evaluation recognises a base model."""

from __future__ import annotations

from pathlib import Path

import pytest

from loraover.checkpoint.base_model import model_digest
from loraover.common.errors import ConfigError
from loraover.models.load import ModelSource, resolve_model

from support.tiny_hub import save_llama

FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja")


@pytest.mark.parametrize("name", [*FILES, "model.safetensors"])
def test_every_file_that_changes_answers_changes_the_digest(name: str, tmp_path: Path) -> None:
    source = resolve_model(str(save_llama(tmp_path / "base")))
    before = [model_digest(source, weights=weights) for weights in (True, False)]
    assert before == [model_digest(source, weights=weights) for weights in (True, False)]
    with (tmp_path / "base" / name).open("ab") as file:
        file.write(b" ")
    after = [model_digest(source, weights=weights) for weights in (True, False)]
    assert after[0] != before[0]
    assert (after[1] == before[1]) == (name == "model.safetensors")


def test_a_model_card_does_not_change_the_digest(tmp_path: Path) -> None:
    source = resolve_model(str(save_llama(tmp_path / "base")))
    before = model_digest(source, weights=True)
    (tmp_path / "base" / "README.md").write_text("# base")
    assert model_digest(source, weights=True) == before


def test_a_model_on_the_hub_is_recognised_by_its_commit() -> None:
    source = ModelSource("owner/model", "owner/model", "a" * 40, "hub owner/model@aaaaaaaaaaaa")
    assert model_digest(source, weights=True) == "a" * 40


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        model_digest(ModelSource("x", str(tmp_path / "gone"), None, "folder x"), weights=True)
