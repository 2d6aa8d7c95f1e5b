"""SOAP as the optimizer of a recipe."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import loraover
from loraover.common.errors import ConfigError
from loraover.training.recipe import load_recipe

from support.resumed_run import assert_resumes
from support.tiny_hub import save_llama, write_recipe
from support.trained_run import loss

pytest.importorskip("pytorch_optimizer", reason="the extra soap is not installed")

pytestmark = [pytest.mark.process, pytest.mark.usefixtures("no_network")]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("soap")
    training = {"optim": "soap", "optim_args": "precondition_frequency=2", "weight_decay": 0.1}
    evaluation = {"exact_match": False}
    return write_recipe(
        folder / "soap.yaml", save_llama(folder / "llama"), method="lora", training=training, evaluation=evaluation
    )


def test_soap_trains_and_resumes_to_the_same_bits(recipe: Path, tmp_path: Path) -> None:
    """With two rates, those of LoRA+."""
    asked = load_recipe(recipe, {"training.loraplus_lr_ratio": 4.0})
    result = loraover.train(asked, tmp_path / "whole")
    assert loss(result.after) < loss(result.before)
    assert_resumes(tmp_path / "whole", tmp_path / "resumed", 4, recipe=asked)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown option": ({"training.optim_args": "max_precond_dim=8"}, "'max_precond_dim' is unknown, expected "),
    "an impossible option": ({"training.optim_args": "precondition_frequency=0"}, "SOAP refuses them"),
    "cores": ({"method": "lora-over"}, "soap works only with method lora, not with lora-over"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=list(REFUSED))
def test_what_soap_does_not_take_is_refused(
    changes: dict[str, Any], message: str, recipe: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        loraover.train(recipe, tmp_path / "out", overrides=changes)
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(ConfigError, match=r'pip install "\.\[soap\]"'):
        loraover.train(recipe, tmp_path / "out")
