"""Schedules and bases that run the model on training data, in TRL's trainers, whose batches hold no labels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from loraover import Budget, LoraOverCallback, LoraOverConfig, trainer_loss
from loraover.common.errors import ConfigError

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
