"""What the trainers that `loraover train` makes compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainingArguments
from trl.trainer import utils

from loraover.common.errors import ConfigError
from loraover.common.reporter import SILENT
from loraover.training.launch.settings import use_one_device
from loraover.training.recipe import load_recipe
from loraover.training.run.build import build
from loraover.training.trainers import find_reward

from support.lines import Lines
from support.tiny_hub import save_llama, write_recipe

pytestmark = pytest.mark.process


def test_only_labelled_positions_are_projected_and_no_gradient_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(str(write_recipe(tmp_path / "recipe.yaml", save_llama(tmp_path / "base"), method="lora")))
    (tmp_path / "run").mkdir()
    trainer: Any = build(recipe, tmp_path / "run", SILENT).trainer
    batch = next(iter(trainer.get_train_dataloader()))
    labelled = int((batch["labels"][:, 1:] != -100).sum())
    assert 0 < labelled < batch["labels"][:, 1:].numel()

    def gradients(loss: Tensor) -> dict[str, Tensor]:
        trainer.model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        return {name: value.grad for name, value in trainer.model.named_parameters() if value.requires_grad}

    whole = trainer.model(**batch).loss
    expected = gradients(whole)

    projected = []

    class Spied(utils._ChunkedLogProbFunction):
        @classmethod
        def apply(cls, hidden: Tensor, *rest: Any) -> Any:
            projected.append(len(hidden))
            return super().apply(hidden, *rest)

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Spied)
    loss = trainer.compute_loss(trainer.model, dict(batch))
    found = gradients(loss)
    assert projected == [labelled]
    torch.testing.assert_close(loss, whole)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["a_reward", "math.pi", "..length"])
def test_a_reward_that_is_no_function_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' is neither of trl.rewards .* nor a function"):
        find_reward(name)


@pytest.mark.parametrize(("count", "told"), [(1, 0), (3, 1)])
def test_several_gpus_without_a_launcher_do_not_make_a_step_larger(count: int, told: int, tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", per_device_train_batch_size=4)
    arguments._n_gpu = count
    report = Lines()
    use_one_device(arguments, report)
    assert (arguments.n_gpu, arguments.train_batch_size, len(report.lines)) == (1, 4, told)
    assert all("3 GPUs are here" in line and "torchrun --nproc-per-node 3" in line for line in report.lines)
