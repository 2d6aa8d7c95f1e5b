"""The callback in the Hugging Face Trainer, Seq2SeqTrainer and TRL's SFTTrainer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainerCallback, TrainingArguments

from loraover import Budget, LoraOverCallback, LoraOverConfig, OverParameterization, SealCheckpoints, read_checkpoint
from loraover.checkpoint.peft_adapter import site_key
from loraover.checkpoint.tensor_file import open_tensors
from loraover.common.command_line import run as run_command
from loraover.common.errors import CheckpointError, ConfigError
from loraover.common.threads import one_thread
from loraover.reporting.reporter import ConsoleReporter
from loraover.reporting.schedule_map import placed
from loraover.training.progress import TrainingProgress
from loraover_export.cli import cli as export_cli

from support.optimizers import adagrad, adamw_8bit, muon
from support.tiny_models import (
    VOCABULARY,
    fill_b,
    lora_matrices,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
    token_ids,
    trainable,
    with_lora,
)

pytestmark = pytest.mark.process

DATA = [{"input_ids": row, "labels": row} for row in token_ids(seed=7, batch=24)]


@pytest.fixture(autouse=True, scope="module")
def _single_thread() -> Iterator[None]:
    with one_thread():
        yield


def arguments(folder: Path, kind: Any = TrainingArguments, **changes: Any) -> Any:
    chosen = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return kind(**(chosen | changes))


def llama(**options: Any) -> Any:
    return with_lora(tiny_llama(), task_type="CAUSAL_LM", **options)


def trainer_of(
    folder: Path, model: Any = None, callback: LoraOverCallback | None = None, optimizer: Any = None, **changes: Any
) -> Any:
    return Trainer(
        model or llama(),
        arguments(folder, **changes),
        train_dataset=DATA,
        callbacks=[callback or LoraOverCallback()],
        optimizers=(optimizer, None),
    )


def adapter_tensors(folder: Path) -> dict[str, Tensor]:
    with open_tensors(folder / "adapter_model.safetensors") as file:
        return {key: file.read(key) for key in file.keys}


def assert_holds(model: nn.Module, folder: Path) -> None:
    """The model's matrices are those of the adapter in `folder`, bit for bit."""
    stored = adapter_tensors(folder)
    held = {key.replace(".default", ""): matrix for key, matrix in lora_matrices(model).items()}
    assert held.keys() == stored.keys()
    assert [key for key in held if not torch.equal(held[key], stored[key])] == []


def assert_contracted(folder: Path, sites: int) -> None:
    """The adapter in a checkpoint is the contraction of the cores beside it."""
    checkpoint = read_checkpoint(folder)
    assert len(checkpoint.sites) == sites
    stored = adapter_tensors(folder)
    with open_tensors(checkpoint.cores_path) as file:
        for site in checkpoint.meta.sites:
            matrix, magnitude = checkpoint.contract(checkpoint.read_cores(file, site), site)
            assert matrix.any()
            checkpoint.check_stored(stored[site_key(site.name)], matrix, magnitude, site)


def test_the_three_lines_of_a_users_script(tmp_path: Path) -> None:
    base, data = tiny_llama(), DATA
    args = arguments(tmp_path / "run")
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    before = lora_matrices(model)
    callback = LoraOverCallback(LoraOverConfig())
    trainer = Trainer(model, args, train_dataset=data, callbacks=[callback])
    trainer.train()
    model.save_pretrained(tmp_path / "adapter")

    assert not any(torch.equal(before[key], matrix) for key, matrix in lora_matrices(model).items())
    assert_holds(model, tmp_path / "adapter")
    assert {p.name for p in (tmp_path / "adapter").iterdir()} <= {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    reloaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "adapter"))
    tokens = token_ids(1)
    assert torch.equal(reloaded.eval()(input_ids=tokens).logits, model.eval()(input_ids=tokens).logits)
    assert callback.over is not None
    for group in callback.over.groups:
        for site, matrix in zip(group.sites, group.contract(), strict=True):
            assert torch.equal(site.parameter, matrix)


def test_fold_takes_what_training_leaves_and_says_what_a_plain_lora_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = trainer_of(tmp_path / "run", model := llama())
    trainer.train()
    model.save_pretrained(tmp_path / "adapter")
    assert_holds(model, tmp_path / "run")
    assert_contracted(tmp_path / "run", sites=28)
    assert read_checkpoint(tmp_path / "run").meta.step == 4

    assert run_command(export_cli, ["fold", str(tmp_path / "adapter"), "-o", str(tmp_path / "folded")]) == 2
    said = capsys.readouterr().err
    assert "holds a plain LoRA without the cores of its training, which can be served as it is" in said
    assert "output_dir and its checkpoint-N folders hold cores" in said
    trainer.save_model()  # into the same folder, which stays a checkpoint
    assert run_command(export_cli, ["fold", str(tmp_path / "run"), "-o", str(tmp_path / "folded")]) == 0
    folded = adapter_tensors(tmp_path / "folded")
    for key, matrix in adapter_tensors(tmp_path / "run").items():
        torch.testing.assert_close(folded[key], matrix)
    assert (tmp_path / "folded" / "fold_certificate.json").is_file()


def test_what_training_leaves_is_of_the_adapter_that_was_trained(tmp_path: Path) -> None:
    model = llama(adapter="math")
    model.add_adapter("frozen", LoraConfig(r=2, target_modules=["q_proj"]))
    trainer_of(tmp_path, model).train()
    assert_contracted(tmp_path / "math", sites=28)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"math"}


def test_a_model_that_peft_does_not_save_trains_without_leaving_anything(tmp_path: Path) -> None:
    inner = llama().base_model.model
    trainer_of(tmp_path, inner).train()
    assert list(tmp_path.iterdir()) == []


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


def test_the_first_loss_and_gradient_norm_are_plain_loras(tmp_path: Path) -> None:
    def first(callbacks: list[Any]) -> tuple[float, float]:
        trainer = Trainer(llama(), arguments(tmp_path, max_steps=1), train_dataset=DATA, callbacks=callbacks)
        trainer.train()
        return trainer.state.log_history[0]["loss"], trainer.state.log_history[0]["grad_norm"]

    assert first([LoraOverCallback()]) == pytest.approx(first([]), rel=1e-4)


def test_a_model_without_lora_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no LoRA layers"):
        trainer_of(tmp_path, tiny_llama()).train()


def test_a_second_training_begins_anew(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, model := llama())
    trainer.train()
    between = lora_matrices(model)
    trainer.train()
    assert not any(torch.equal(between[key], matrix) for key, matrix in lora_matrices(model).items())


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


def test_several_adapters_at_once_are_refused(tmp_path: Path) -> None:
    model = llama()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    before = lora_matrices(model)
    with pytest.raises(ConfigError, match=r"2 adapters are trained at once \(default, second\)"):
        trainer_of(tmp_path, model).train()
    assert all(torch.equal(matrix, before[key]) for key, matrix in lora_matrices(model).items())


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


OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "adagrad": lambda model: adagrad(trainable(model), lr=1e-2),
    "muon": lambda model: muon(trainable(model), lr=1e-2),
    "adamw-8bit": lambda model: adamw_8bit(trainable(model)),
}


def run(
    folder: Path,
    *,
    resume: str | bool | None = None,
    optim: str = "adamw_torch",
    adapter: str = "default",
    **callback: Any,
) -> Any:
    """Losses of every micro-batch, and the matrices at the end, of a run of 6 steps."""
    model, losses = llama(lora_dropout=0.1, adapter=adapter), []
    model.register_forward_hook(lambda module, args, output: losses.append(output.loss.item()))
    optimizer = OPTIMIZERS[optim](model) if optim in OPTIMIZERS else None
    changes = {} if optimizer is not None else {"optim": optim}
    trainer = trainer_of(
        folder,
        model,
        LoraOverCallback(**callback),
        optimizer,
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=3,
        max_grad_norm=0.5,
        **changes,
    )
    trainer.train(resume_from_checkpoint=resume)
    return losses, lora_matrices(model)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor", *OPTIMIZERS])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, optim: str) -> None:
    config = LoraOverConfig(sites=["*.lora_B", "*_proj.lora_A"] if optim == "sgd" else ["*.layers.0.*"])
    losses, matrices = run(tmp_path, optim=optim, config=config)
    shutil.rmtree(tmp_path / "checkpoint-6")
    resumed_losses, resumed = run(tmp_path, resume=True, optim=optim, config=config)
    assert len(losses) == 12
    assert resumed_losses == losses[6:]
    assert [key for key in matrices if not torch.equal(matrices[key], resumed[key])] == []
    assert_contracted(tmp_path / "checkpoint-6", sites=28 if optim == "sgd" else 14)


def test_an_adapter_of_another_name_is_resumed(tmp_path: Path) -> None:
    config = LoraOverConfig(schedule="dynamic", budget=Budget(sites=8), rounds=2, start=0.2, end=0.7)
    losses, matrices = run(tmp_path, adapter="math", config=config)
    shutil.rmtree(tmp_path / "checkpoint-6")
    resumed_losses, resumed = run(tmp_path, resume=True, adapter="math", config=config)
    assert resumed_losses == losses[6:]
    assert [key for key in matrices if not torch.equal(matrices[key], resumed[key])] == []
    meta = read_checkpoint(tmp_path / "checkpoint-6" / "math").meta
    assert [len(found.chosen) for found in meta.rounds] == [4, 4]
    assert list(placed(meta).values()).count(None) == 20


def test_a_resume_that_loses_the_moments_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses, _ = run(tmp_path)
    monkeypatch.setattr(OverParameterization, "load_core_state", lambda self, parameter, state: None)
    resumed_losses, _ = run(tmp_path, resume=str(tmp_path / "checkpoint-3"))
    assert resumed_losses[:2] == losses[6:8]
    assert resumed_losses[2:] != losses[8:]


def test_a_resume_without_its_cores_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    folder = tmp_path / "checkpoint-3"
    with pytest.raises(CheckpointError, match="was trained with"):
        run(tmp_path, resume=str(folder), config=LoraOverConfig(decomposition="svd"))
    for name in ("loraover.json", "loraover.safetensors"):
        (folder / name).unlink()
    with pytest.raises(CheckpointError, match=r"loraover\.json: no such file"):
        run(tmp_path, resume=str(folder))


def test_a_resume_with_another_optimizer_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(ConfigError, match="the run was trained with AdamW, this optimizer is SGD"):
        run(tmp_path, resume=str(tmp_path / "checkpoint-3"), optim="sgd")


def test_a_checkpoint_that_was_moved_is_named(tmp_path: Path) -> None:
    losses, matrices = run(tmp_path / "first")
    moved = tmp_path / "kept" / "best"
    moved.parent.mkdir()
    shutil.move(tmp_path / "first" / "checkpoint-3", moved)
    with pytest.raises(CheckpointError, match="LoraOverCallback"):
        run(tmp_path / "second", resume=str(moved))
    resumed_losses, resumed = run(tmp_path / "third", resume=str(moved), resume_from=moved)
    assert resumed_losses == losses[6:]
    assert all(torch.equal(matrices[key], resumed[key]) for key in matrices)


def test_cores_of_another_run_are_refused(tmp_path: Path) -> None:
    first, second = (tmp_path / name / "checkpoint-3" for name in ("first", "second"))
    run(first.parent)
    run(second.parent, optim="sgd")
    with pytest.raises(CheckpointError, match=r"q_proj\.lora_A.* (contradicts|differ)"):
        run(tmp_path / "third", resume=str(first), resume_from=second)


# The best model


SCHEDULES = {
    "all": (LoraOverConfig(), 28, 28),
    "dynamic": (LoraOverConfig(schedule="dynamic", budget=Budget(sites=8), rounds=2, start=0.25, end=0.75), 4, 8),
}
"""A configuration, and how many sites have cores in the best checkpoint, the first, and in the last."""


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_best_models_weights_are_kept_at_the_end_with_their_cores(schedule: str, tmp_path: Path) -> None:
    config, first, last = SCHEDULES[schedule]
    worse = count()
    model, callback = llama(), LoraOverCallback(config)
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
        ),
        train_dataset=DATA,
        eval_dataset=DATA[:4],
        compute_metrics=lambda _: {"score": -next(worse)},
        callbacks=[callback],
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    assert_holds(model, tmp_path / "checkpoint-1")
    for step, sites in ((1, first), (4, last)):
        assert_contracted(tmp_path / f"checkpoint-{step}", sites=sites)
    with pytest.raises(AssertionError):
        assert_holds(model, tmp_path / "checkpoint-4")
    assert_holds(model, tmp_path)
    assert_contracted(tmp_path, sites=first)
    assert read_checkpoint(tmp_path).meta.step == 1
    model.save_pretrained(tmp_path / "best")
    callback.save(tmp_path / "best", step=4)
    assert_contracted(tmp_path / "best", sites=first)
    assert_holds(model, tmp_path / "best")
    assert read_checkpoint(tmp_path / "best").meta.rounds == read_checkpoint(tmp_path / "checkpoint-1").meta.rounds


# Writes from outside


class WriteBetween(TrainerCallback):
    """Writes B after the second step, as a callback with averaged weights would."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            kwargs["model"].base_model.model.model.layers[0].mlp.up_proj.lora_B["default"].weight.data.mul_(2)


def test_a_write_during_training_stops_it_by_name(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, save_strategy="steps", save_steps=2)
    trainer.add_callback(WriteBetween())
    with pytest.raises(ConfigError, match=r"first model\.layers\.0\.mlp\.up_proj\.lora_B, were changed"):
        trainer.train()
    assert not (tmp_path / "checkpoint-2" / "loraover.json").exists()


# Other trainers


def test_seq2seq_trainer_with_t5(tmp_path: Path) -> None:
    model = with_lora(tiny_t5(), task_type="SEQ_2_SEQ_LM")
    before = lora_matrices(model)
    args = arguments(
        tmp_path, Seq2SeqTrainingArguments, save_strategy="steps", save_steps=2, max_steps=2, predict_with_generate=True
    )
    trainer = Seq2SeqTrainer(
        model, args, train_dataset=DATA, eval_dataset=DATA[:4], callbacks=[LoraOverCallback(LoraOverConfig())]
    )
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    assert not any(torch.equal(before[key], matrix) for key, matrix in lora_matrices(model).items())
    assert_contracted(tmp_path / "checkpoint-2", sites=64)
    assert_holds(model, tmp_path / "checkpoint-2")


def test_gpt2_with_conv1d(tmp_path: Path) -> None:
    model = with_lora(tiny_gpt2(), task_type="CAUSAL_LM", fan_in_fan_out=True)
    trainer_of(tmp_path, model, save_strategy="steps", save_steps=2, max_steps=2).train()
    assert_contracted(tmp_path / "checkpoint-2", sites=16)
    assert_holds(model, tmp_path / "checkpoint-2")


def word_tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCABULARY))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )


def test_trl_sft_trainer(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    texts = [" ".join(f"w{i}" for i in row) for row in token_ids(seed=7, batch=16).tolist()]
    trainer = trl.SFTTrainer(
        tiny_llama(),
        arguments(tmp_path, trl.SFTConfig, save_strategy="steps", save_steps=2, max_steps=2, max_length=16),
        train_dataset=datasets.Dataset.from_dict({"text": texts}),
        processing_class=word_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[LoraOverCallback()],
    )
    fill_b(trainer.model)
    before = lora_matrices(trainer.model)
    trainer.train()
    assert not any(torch.equal(before[key], matrix) for key, matrix in lora_matrices(trainer.model).items())
    assert_contracted(tmp_path / "checkpoint-2", sites=28)
    assert_holds(trainer.model, tmp_path / "checkpoint-2")
