"""The callback in the Hugging Face Trainer, Seq2SeqTrainer and TRL's SFTTrainer, and how a Trainer resumes with it."""

from __future__ import annotations

import json
import shutil
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from rich.console import Console
from transformers import Trainer, TrainerCallback

from loraover import Budget, LoraOverCallback, LoraOverConfig, SealCheckpoints, read_checkpoint
from loraover.checkpoint.tensor_file import open_tensors
from loraover.common.errors import CheckpointError, ConfigError
from loraover.reporting.reporter import ConsoleReporter
from loraover.reporting.schedule import placed
from loraover.training.run.trainer import TrainingProgress

from support.hf_trainer import DATA, arguments, assert_contracted, assert_holds, llama, trainer_of
from support.tiny_models import lora_matrices, trainable

pytestmark = pytest.mark.process


@pytest.mark.parametrize("optim", ["adafactor", "adamw_torch"])
def test_bases_are_measured_where_the_optimizers_state_cannot_be_turned(
    optim: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = LoraOverConfig(decomposition="eigen", options={"block": 8})
    args = arguments(tmp_path / "run", optim=optim)
    callback = LoraOverCallback(config)
    Trainer(model := llama(), args, train_dataset=DATA, callbacks=[callback]).train()
    is_turned = optim == "adamw_torch"
    said = "Adafactor keeps state that cannot be turned into another basis, so the bases of eigen are measured"
    assert (said in caplog.text) is not is_turned
    assert callback.over is not None
    followed = [follower.blocks for follower in callback.over.followers.values()]
    assert all(bool(blocks) is is_turned for blocks in followed)
    kept = read_checkpoint(tmp_path / "run").meta.config.options
    assert kept == config.options if is_turned else kept == {"block": 8, "short": "calibration", "long": "calibration"}
    for group in callback.over.groups:
        for basis in (stack for k, stack in enumerate(group.stacks) if k != group.centre):
            blocks = basis.reshape(-1, basis.shape[-1], basis.shape[-1])
            assert not any(torch.equal(block, torch.eye(len(block))) for block in blocks)
    assert_holds(model, tmp_path / "run")


def test_options_of_one_run_are_not_those_of_the_next(tmp_path: Path) -> None:
    callback = LoraOverCallback(config := LoraOverConfig(decomposition="eigen", options={"block": 8}))
    for optim, sources in (("adafactor", {"short": "calibration", "long": "calibration"}), ("adamw_torch", {})):
        trainer_of(tmp_path / optim, callback=callback, optim=optim, max_steps=1).train()
        assert callback.config == config
        assert read_checkpoint(tmp_path / optim).meta.config.options == {"block": 8, **sources}


def test_training_leaves_the_adapter_with_its_cores(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, model := llama())
    trainer.train()
    assert read_checkpoint(tmp_path).meta.step == 4
    for _ in range(2):
        assert_holds(model, tmp_path)
        assert_contracted(tmp_path, sites=28)
        trainer.save_model()  # into the same folder, which stays a checkpoint


def test_what_training_leaves_is_of_the_adapter_that_was_trained(tmp_path: Path) -> None:
    model = llama(adapter="math")
    model.add_adapter("frozen", LoraConfig(r=2, target_modules=["q_proj"]))
    trainer_of(tmp_path, model).train()
    assert_contracted(tmp_path / "math", sites=28)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"math"}


def test_a_saved_checkpoint_holds_the_cores(tmp_path: Path) -> None:
    model = llama()
    trainer_of(tmp_path, model, save_strategy="steps", save_steps=2, seed=11).train()
    for step in (2, 4):
        folder = tmp_path / f"checkpoint-{step}"
        assert (folder / "loraover.json").is_file()
        meta = read_checkpoint(folder).meta
        assert (meta.step, meta.config.seed, meta.core_dtype) == (step, 11, "float32")
        assert_contracted(folder, sites=28)
    assert_holds(model, tmp_path / "checkpoint-4")
    with pytest.raises(AssertionError):
        assert_holds(model, tmp_path / "checkpoint-2")
    with open_tensors(tmp_path / "checkpoint-4" / "loraover.safetensors") as file:
        assert "model.layers.0.mlp.up_proj.lora_A.core.0.exp_avg" in file.keys


def test_a_seed_of_its_own_is_kept(tmp_path: Path) -> None:
    callback = LoraOverCallback(LoraOverConfig(seed=5, sites=["*.q_proj.*"]))
    trainer_of(tmp_path, callback=callback, save_strategy="steps", save_steps=4, seed=11).train()
    assert read_checkpoint(tmp_path / "checkpoint-4").meta.config.seed == 5
    assert_contracted(tmp_path / "checkpoint-4", sites=4)


def test_an_interrupted_training_can_be_begun_again(tmp_path: Path) -> None:
    class Interrupt(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                raise KeyboardInterrupt

    args = arguments(tmp_path, save_strategy="steps", save_steps=1, save_total_limit=2)
    callbacks = [LoraOverCallback(), SealCheckpoints(), interrupt := Interrupt()]
    trainer = Trainer(llama(), args, train_dataset=DATA, callbacks=callbacks)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(interrupt)
    trainer.train()
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-4"}
    assert args.save_total_limit == 2
    assert_contracted(tmp_path / "checkpoint-4", sites=28)


def test_a_seal_that_would_come_before_the_cores_is_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path, save_strategy="steps", save_steps=1)
    trainer = Trainer(llama(), args, train_dataset=DATA, callbacks=[SealCheckpoints(), LoraOverCallback()])
    with pytest.raises(ConfigError, match="SealCheckpoints comes before LoraOverCallback"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [({}, []), ({"schedule": "static"}, [1]), ({"schedule": "dynamic", "rounds": 2}, [1, 2])],
    ids=["all", "static", "dynamic"],
)
def test_every_decision_is_in_the_log_once(tmp_path: Path, schedule: dict[str, Any], steps: list[int]) -> None:
    budget = {"budget": Budget(sites=4)} if schedule else {}
    trainer = trainer_of(tmp_path, callback=(callback := LoraOverCallback(LoraOverConfig(**schedule, **budget))))
    trainer.add_callback(TrainingProgress(ConsoleReporter(Console(quiet=True)), tmp_path / "metrics.jsonl"))
    trainer.train()
    told = [row for row in trainer.state.log_history if "loraover_injected_sites" in row]
    assert [row["step"] for row in told] == steps
    assert sum(row["loraover_injected_sites"] for row in told) == (4 if schedule else 0)
    assert callback.over is not None
    for row, found in zip(told, callback.over.schedule.rounds, strict=bool(schedule)):
        assert row["loraover_scores"] == {name: found.scores[name] for name in found.chosen}
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()] == trainer.state.log_history


# Resuming


def in_dtype(model: Any, dtype: torch.dtype) -> Any:
    """The model with A and B cast as TRL casts those on a quantised base."""
    for parameter in trainable(model):
        parameter.data = parameter.data.to(dtype)
    return model


def run(
    folder: Path,
    *,
    resume: str | bool | None = None,
    adapter: str = "default",
    **callback: Any,
) -> Any:
    """Losses of every micro-batch, and the matrices at the end, of a run of 6 steps."""
    model, losses = llama(lora_dropout=0.1, adapter=adapter), []
    model.register_forward_hook(lambda module, args, output: losses.append(output.loss.item()))
    trainer = trainer_of(
        folder,
        model,
        LoraOverCallback(**callback),
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=3,
        max_grad_norm=0.5,
    )
    trainer.train(resume_from_checkpoint=resume)
    return losses, lora_matrices(model)


def test_an_adapter_of_another_name_is_resumed(tmp_path: Path) -> None:
    config = LoraOverConfig(schedule="dynamic", budget=Budget(sites=8), rounds=2, start=0.2, end=0.7)
    losses, matrices = run(tmp_path, adapter="math", config=config)
    shutil.rmtree(tmp_path / "checkpoint-6")
    resumed_losses, resumed = run(tmp_path, resume=True, adapter="math", config=config)
    assert len(losses) == 12
    assert resumed_losses == losses[6:]
    assert [key for key in matrices if not torch.equal(matrices[key], resumed[key])] == []
    meta = read_checkpoint(tmp_path / "checkpoint-6" / "math").meta
    assert [len(found.chosen) for found in meta.rounds] == [4, 4]
    assert list(placed(meta).values()).count(None) == 20


def test_a_checkpoint_that_was_moved_is_named(tmp_path: Path) -> None:
    losses, matrices = run(tmp_path / "first")
    moved = shutil.copytree(tmp_path / "first" / "checkpoint-3", tmp_path / "kept" / "best")
    with pytest.raises(CheckpointError, match="LoraOverCallback"):
        run(tmp_path / "second", resume=str(moved))
    resumed_losses, resumed = run(tmp_path / "third", resume=str(moved), resume_from=moved)
    assert resumed_losses == losses[6:]
    assert all(torch.equal(matrices[key], resumed[key]) for key in matrices)


# The best model


SCHEDULES = {
    "all": (LoraOverConfig(), 28, 28),
    "dynamic": (LoraOverConfig(schedule="dynamic", budget=Budget(sites=8), rounds=2, start=0.25, end=0.75), 4, 8),
    "measured": (LoraOverConfig(decomposition="eigen", options={"block": 8}), 28, 28),
}
"""A configuration, and how many sites have cores in the best checkpoint, the first, and in the last."""


@pytest.mark.parametrize(
    ("schedule", "adapter", "dtype"),
    [("all", "default", torch.float32), ("dynamic", "math", torch.bfloat16), ("measured", "default", torch.bfloat16)],
    ids=str,
)
def test_the_best_models_weights_are_kept_at_the_end_with_their_cores(
    schedule: str, adapter: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    config, first, last = SCHEDULES[schedule]
    worse, part = count(), "" if adapter == "default" else adapter
    model, callback = in_dtype(llama(adapter=adapter), dtype), LoraOverCallback(config)
    trainer = Trainer(
        model,
        arguments(
            tmp_path,
            save_strategy="steps",
            save_steps=1,
            eval_strategy="steps",
            eval_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="score",
            greater_is_better=True,
            optim="adafactor" if schedule == "measured" else "adamw_torch",
        ),
        train_dataset=DATA,
        eval_dataset=DATA[:4],
        compute_metrics=lambda _: {"score": -next(worse)},
        callbacks=[callback],
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    assert_holds(model, tmp_path / "checkpoint-1" / part)
    for step, sites in ((1, first), (4, last)):
        assert_contracted(tmp_path / f"checkpoint-{step}" / part, sites=sites)
    with pytest.raises(AssertionError):
        assert_holds(model, tmp_path / "checkpoint-4" / part)
    assert_holds(model, tmp_path / part)
    assert_contracted(tmp_path / part, sites=first)
    assert read_checkpoint(tmp_path / part).meta.step == 1
    model.save_pretrained(tmp_path / "best")
    callback.save(tmp_path / "best", step=4)
    best = read_checkpoint(tmp_path / "best" / part)
    assert_contracted(best.path, sites=first)
    assert_holds(model, best.path)
    assert best.meta.rounds == read_checkpoint(tmp_path / "checkpoint-1" / part).meta.rounds
