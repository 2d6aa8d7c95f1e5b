"""A run whose result is the untrained model, although its loss fell, fails for every method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import loraover
from loraover.common.errors import FoldError
from loraover.training.method_table import METHODS
from loraover.training.run import train
from loraover.training.run.failure import read_failure

from support.tiny_hub import write_recipe

pytestmark = [pytest.mark.process, pytest.mark.usefixtures("no_network")]

RECIPES: dict[str, dict[str, Any]] = {name: {"method": name} for name in ("full", "lora", "lora-over", *METHODS)}
RECIPES["dora"] = {"method": "lora", "lora": {"use_dora": True}}
RECIPES["lorasc"]["lorasc"] = {"stages": 1}
RECIPES["federated"]["federated"] = {"noise_multiplier": 0, "noise_seed": 0}  # the loss falls in every run
RECIPES["tensorguide"]["tensorguide"] = {"tt_rank": 2}


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_a_result_that_lost_its_training_is_not_published(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    take_steps = train._take_steps

    def forget(prepared: Any, *args: Any) -> train.TimedSteps:
        """Take the steps, then put back all that was trained."""
        trained = [prepared.model, *getattr(prepared.method, "trains", ())]
        starts = [{name: value.clone() for name, value in module.state_dict().items()} for module in trained]
        timed = take_steps(prepared, *args)
        for module, start in zip(trained, starts, strict=True):
            module.load_state_dict(start)
        return timed

    path = write_recipe(tmp_path / "r.yaml", base, evaluation={"exact_match": False}, **RECIPES[recipe])
    monkeypatch.setattr(train, "_take_steps", forget)
    with pytest.raises(FoldError, match=r"has changed nothing: .* the training loss fell from"):
        loraover.train(path, tmp_path / "lost")
    failure = read_failure(tmp_path / "lost")
    assert failure is not None
    assert failure.kind == "refused"
    assert not any((tmp_path / "lost" / name).exists() for name in ("adapter", "model", "run.json"))
