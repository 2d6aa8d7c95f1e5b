"""A fold that cannot be done ends in one message and exit code 2, with the input untouched and no output.

What the readers refuse is tested in `tests/train/test_checkpoint_refused.py`; here, that the command reports it.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from support.checkpoint_damage import Q_A, TENSORS, WRONG_TENSORS, meta, replaced, site
from support.make_checkpoint import Made, edit_json, reseal
from support.refusals import Refused
from support.tiny_models import tiny_gpt2
from support.vllm_damage import config

pytestmark = pytest.mark.process


@pytest.fixture
def source(made: Made, tmp_path: Path) -> Path:
    return shutil.copytree(made.path, tmp_path / "input")


def test_what_a_reader_refuses_is_named(source: Path, tmp_path: Path, refused: Refused) -> None:
    """A matrix that the cores contradict is found last, when parents of the output could have been made."""
    damage, named = WRONG_TENSORS["core transposed"]
    refused("fold", tmp_path / "absent", named=(f"{tmp_path / 'absent'}: no such folder",))
    replaced(TENSORS, Q_A, lambda a: a * 2)(source)
    reseal(source)
    refused("fold", source, output=tmp_path / "new" / "parents" / "out")
    damage(source)
    reseal(source)
    refused("fold", source, named=(str(source), *named))


def test_control_characters_of_a_file_do_not_reach_the_terminal(source: Path, refused: Refused) -> None:
    site(name="\x1b[31mred\r\n")(source)
    reseal(source)
    assert re.search(r"[\x00-\x08\x0b-\x1f\x7f]", refused("fold", source)) is None


# Base models and prompts that do not fit


def test_a_base_model_that_does_not_load_is_named(made: Made, source: Path, tmp_path: Path, refused: Refused) -> None:
    """Its weights are cut off, or its architecture is not known."""
    base = shutil.copytree(made.base, tmp_path / "base")
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused("fold", source, "--check-error", "--model", base, named=(str(base),))
    edit_json(base / "config.json", lambda content: content.update(model_type="unheard-of"))
    refused("fold", source, "--check-error", "--model", base, named=(str(base),))


def test_a_base_model_that_is_another_or_nowhere_is_named(
    made: Made, source: Path, tmp_path: Path, refused: Refused
) -> None:
    tiny_gpt2().save_pretrained(tmp_path / "gpt2")
    options = ("--check-error", "--model", tmp_path / "gpt2")
    refused("fold", source, *options, named=(str(source), "self_attn", str(made.base), "--model"))
    for name in ("./absent", "absent"):
        refused("fold", source, "--check-error", "--model", name, named=(repr(name),))


def test_a_checkpoint_without_a_base_model_asks_for_one(source: Path, refused: Refused) -> None:
    config(base_model_name_or_path=None)(source)
    meta(base_model=None)(source)
    reseal(source)
    refused("fold", source, "--check-error", named=(str(source), "--model"))


@pytest.mark.usefixtures("no_model")
def test_prompts_that_cannot_be_used_are_named(made: Made, source: Path, tmp_path: Path, refused: Refused) -> None:
    """Before the base model is loaded."""
    prompts = tmp_path / "prompts.txt"
    options = ("--check-error", "--prompts", prompts)
    refused("fold", source, *options, named=(str(prompts),))
    prompts.write_bytes(b" \n\n")
    refused("fold", source, *options, named=(str(prompts),))
    prompts.write_text("the train\n")
    base = shutil.copytree(made.base, tmp_path / "base", ignore=shutil.ignore_patterns("tokenizer*"))
    refused("fold", source, *options, "--model", base, named=("no tokenizer", str(base)))
