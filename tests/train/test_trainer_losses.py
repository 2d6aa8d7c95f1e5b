"""Losses that trainers of TRL compute, and the logits and GPUs that they take for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import TrainingArguments
from trl.trainer import utils

from loraover import Budget, LoraOverCallback, LoraOverConfig, trainer_loss
from loraover.common.errors import ConfigError
from loraover.common.reporter import SILENT
from loraover.training.launch.settings import use_one_device
from loraover.training.recipe import load_recipe
from loraover.training.run.build import build
from loraover.training.trainers import find_reward

from support.lines import Lines
from support.tiny_hub import save_llama, write_recipe

trl = pytest.importorskip("trl", reason="trl is not installed")
datasets = pytest.importorskip("datasets", reason="datasets is not installed")

pytestmark = pytest.mark.process

CALIBRATED: dict[str, Any] = {"short": "calibration", "long": "calibration"}
CONFIGS = {
    "fisher": LoraOverConfig(schedule="static", score="fisher", budget=Budget(sites=4)),
    "loss_impact": LoraOverConfig(schedule="static", score="loss_impact", budget=Budget(sites=4)),
    "calibration": LoraOverConfig(decomposition="eigen", options=CALIBRATED),
}
FROM_GRADIENTS = LoraOverConfig(
    decomposition="eigen", schedule="dynamic", score="fisher", budget=Budget(sites=4), rounds=1
)


def trainer_of(
    kind: str, base: Path, output: Path, row: Mapping[str, str], callbacks: list[Any], **options: Any
) -> Any:
    """One of TRL's trainers for two steps."""
    config, trainer = getattr(trl, f"{kind}Config"), getattr(trl, f"{kind}Trainer")
    given = {key: options.pop(key) for key in ("reward_funcs",) if key in options}
    common = {"max_steps": 2, "logging_steps": 1, "bf16": False, "save_strategy": "no", "report_to": "none"}
    return trainer(
        str(base),
        args=config(str(output), **common, use_cpu=True, **options),
        train_dataset=datasets.Dataset.from_list([dict(row)] * 16),
        peft_config=LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=callbacks,
        **given,
    )


def dpo(base: Path, output: Path, callbacks: list[Any]) -> Any:
    return trainer_of("DPO", base, output, {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}, callbacks)


def online(kind: str, base: Path, output: Path, callback: LoraOverCallback) -> Any:
    """A trainer that makes its samples while it trains."""
    options: dict[str, Any] = {"max_completion_length": 4, "num_generations": 2, "per_device_train_batch_size": 2}

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(completion)) for completion in completions]

    return trainer_of(kind, base, output, {"prompt": "2 + 2 ="}, [callback], reward_funcs=reward, **options)


@pytest.fixture(scope="module")
def plain(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """DPO without our callback, after its training."""
    trainer = dpo(bases["llama"], tmp_path_factory.mktemp("plain"), [])
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", CONFIGS)
def test_the_loss_of_dpo_leaves_no_trace_in_its_logs(
    name: str, plain: Any, bases: dict[str, Path], tmp_path: Path
) -> None:
    callback = LoraOverCallback(CONFIGS[name])
    trainer = dpo(bases["llama"], tmp_path, [callback])
    callback.loss = trainer_loss(trainer)
    trainer.train()
    assert callback.over is not None
    assert callback.over.injected
    logs, expected = ([log for log in t.state.log_history if "loss" in log] for t in (trainer, plain))
    assert logs[0] == {key: pytest.approx(value, rel=1e-4) for key, value in expected[0].items()}
    assert [log["num_tokens"] for log in logs] == [log["num_tokens"] for log in expected]


@pytest.mark.parametrize(
    ("kind", "name", "has_loss"),
    [("GRPO", "fisher", False), ("RLOO", "calibration", True)],
)
def test_a_trainer_that_makes_its_samples_cannot_calibrate(
    kind: str, name: str, has_loss: bool, bases: dict[str, Path], tmp_path: Path
) -> None:
    callback = LoraOverCallback(CONFIGS[name])
    trainer = online(kind, bases["llama"], tmp_path, callback)
    if has_loss:
        callback.loss = trainer_loss(trainer)
    with pytest.raises(ConfigError, match=r"a batch that is a list.*GRPO.*schedule dynamic") as refused:
        trainer.train()
    assert len(str(refused.value)) < 500


def test_what_that_message_suggests_trains(bases: dict[str, Path], tmp_path: Path) -> None:
    callback = LoraOverCallback(FROM_GRADIENTS)
    online("GRPO", bases["llama"], tmp_path, callback).train()
    assert callback.over is not None
    assert len(callback.over.injected) == 4


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
    assert all("this machine has 3 GPUs" in line and "torchrun --nproc-per-node 3" in line for line in report.lines)
