"""Run a recipe: load, train, measure, and leave a run folder.

OUT/recipe.yaml       the recipe, with hub revisions pinned
OUT/metrics.jsonl     one object per logging step
OUT/trainer/          sealed checkpoints to resume from
OUT/adapter/          the trained adapter; a LoRA-Over checkpoint if that was the method
OUT/run.json          measures before and after, sizes, origins, versions
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PrinterCallback, Trainer, TrainerCallback, set_seed

from loraover.callback import LoraOverCallback
from loraover.checkpoint import write_checkpoint
from loraover.data import BUILT_IN, Rows, load_rows
from loraover.errors import ConfigError, DataError, OutputError
from loraover.evaluate import exact_match
from loraover.model_card import model_card
from loraover.models import ModelSource, load_model, load_tokenizer, resolve_model
from loraover.output import check_free, publish_directory, publish_file
from loraover.progress import Reporter, TrainingProgress
from loraover.recipe import Recipe
from loraover.resume import SealCheckpoints, last_whole_checkpoint
from loraover.run_result import Measures, RunResult, environment
from loraover.update_norm import update_norm
from loraover.word_problems import split_word_problems

PRECISION = {
    "fp32": {"bf16": False, "fp16": False},
    "bf16": {"bf16": True, "fp16": False},
    "fp16": {"bf16": False, "fp16": True},
}


@dataclass(frozen=True)
class Examples:
    """Training and held-out rows with prompt and completion, and where they come from."""

    train: Rows
    test: Rows | None


def train(recipe: Recipe, output: Path, *, resume: bool, report: Reporter, command: str) -> RunResult:
    """Train an adapter as the recipe says.

    Args:
        recipe: what to do.
        output: a new folder; with `resume`, the folder of the run to continue.
        resume: continue from the last whole checkpoint in `output`, or from the start without one.
        report: shows progress.
        command: what the user typed, for the model card.
    Raises:
        ConfigError, DataError, CheckpointError, OutputError: with what was found and expected.
    """
    _claim(output, recipe, resume)
    source = resolve_model(recipe.model, recipe.model_revision)
    report.line(f"base model: {source.origin}")
    is_seq2seq = _is_encoder_decoder(source)
    tokenizer = load_tokenizer(source)
    examples = load_examples(recipe, chat=_use_chat(recipe, tokenizer, is_seq2seq))
    report.line(f"training data: {examples.train.origin}, {len(examples.train.rows)} examples")
    _write_recipe(output, recipe, source, examples)

    set_seed(recipe.training.seed)
    task = "SEQ_2_SEQ_LM" if is_seq2seq else "CAUSAL_LM"
    base = load_model(source, dtype="bf16" if recipe.training.precision == "bf16" else "fp32", task_type=task)
    model = get_peft_model(base, LoraConfig(task_type=task, revision=source.revision, **recipe.lora.model_dump()))
    model.peft_config["default"].base_model_name_or_path = recipe.model
    over = LoraOverCallback(recipe.over) if recipe.method == "lora-over" else None
    trainer = _make_trainer(recipe, model, tokenizer, examples, output, is_seq2seq, report, over)

    before = _measure(trainer, tokenizer, recipe, examples, report, "before training")
    checkpoint = last_whole_checkpoint(output / "trainer") if resume else None
    if over is not None:
        over.resume_from = checkpoint
    _trim_metrics(output / "metrics.jsonl", checkpoint)
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    seconds = time.perf_counter() - started
    after = _measure(trainer, tokenizer, recipe, examples, report, "after training")

    result = RunResult(
        method=recipe.method,
        model=recipe.model,
        model_origin=source.origin,
        data_origin=examples.train.origin,
        learning_rate=recipe.training.learning_rate,
        seed=recipe.training.seed,
        steps=trainer.state.global_step,
        train_seconds=seconds,
        lora_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        added_parameters=0 if over is None or over.over is None else _added(over),
        update_norm=update_norm(model),
        before=before,
        after=after,
        versions=environment(),
    )
    with publish_directory(output / "adapter") as draft:
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        if over is not None and over.over is not None:
            write_checkpoint(draft, over.over, step=trainer.state.global_step)
        (draft / "README.md").write_text(model_card("LoRA adapter", recipe.model, result.facts(), command))
    publish_file(output / "run.json", lambda draft: draft.write_text(result.model_dump_json(indent=1) + "\n"))
    if recipe.push_to_hub is not None:
        _push(recipe.push_to_hub, output / "adapter", report)
    return result


def load_examples(recipe: Recipe, *, chat: bool) -> Examples:
    """Training rows, and held-out rows where the recipe measures something.

    Raises:
        DataError: see `load_rows`; or nothing to measure on.
    """
    data, wanted = recipe.data, recipe.evaluation.examples
    if data.train == BUILT_IN:
        count = data.train_examples or 2000
        made, held_out = split_word_problems(count, wanted, recipe.training.seed)
        origin = f"built-in word problems, seed {recipe.training.seed}"
        return Examples(Rows(made, origin), Rows(held_out, origin) if held_out else None)
    common: dict[str, Any] = {"subset": data.subset, "format": data.format, "chat": chat}
    train_rows = load_rows(
        data.train, split=data.train_split, revision=data.revision, limit=data.train_examples, **common
    )
    if not wanted:
        return Examples(train_rows, None)
    if data.test is None and Path(data.train).is_file():
        raise DataError(f"{data.train} is one file: name held-out data in data.test, or set evaluation.examples to 0.")
    limit = min(wanted, data.test_examples or wanted)
    test_rows = load_rows(
        data.test or data.train, split=data.test_split, revision=train_rows.revision, limit=limit, **common
    )
    return Examples(train_rows, test_rows)


def _claim(output: Path, recipe: Recipe, resume: bool) -> None:
    """Make the run folder, or check that it is this run's."""
    if not resume:
        check_free(output.absolute())
        try:
            (output / "trainer").mkdir(parents=True)
        except OSError as error:
            raise OutputError(f"cannot write {output}: {error.strerror}.") from error
    elif (output / "adapter").exists():
        raise ConfigError(f"{output}: the run is finished already; its adapter is in {output / 'adapter'}.")
    elif not (output / "recipe.yaml").is_file():
        raise ConfigError(f"{output}: holds no run to resume.")


def _write_recipe(output: Path, recipe: Recipe, source: ModelSource, examples: Examples) -> None:
    import yaml

    pinned = recipe.model_copy(
        update={
            "model_revision": source.revision,
            "data": recipe.data.model_copy(update={"revision": examples.train.revision}),
        }
    )
    values = pinned.model_dump(mode="json")
    path = output / "recipe.yaml"
    if path.is_file() and (previous := yaml.safe_load(path.read_bytes())) != values:
        changed = sorted(key for key in values if previous.get(key) != values[key])
        raise ConfigError(f"{path}: the run was started with another recipe ({', '.join(changed)} differ); start anew.")
    publish_file(path, lambda draft: draft.write_text(yaml.safe_dump(values, sort_keys=False)))


def _is_encoder_decoder(source: ModelSource) -> bool:
    from transformers import AutoConfig

    try:
        return bool(AutoConfig.from_pretrained(source.location, revision=source.revision).is_encoder_decoder)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model: {source.origin} has no readable config.json: {error}") from error


def _use_chat(recipe: Recipe, tokenizer: Any, is_seq2seq: bool) -> bool:
    has_template = tokenizer.chat_template is not None
    if recipe.data.chat and not has_template:
        raise ConfigError(f"data.chat is true, but the tokenizer of {recipe.model} has no chat template.")
    return has_template and not is_seq2seq if recipe.data.chat is None else recipe.data.chat


def _make_trainer(
    recipe: Recipe,
    model: PeftModel,
    tokenizer: Any,
    examples: Examples,
    output: Path,
    is_seq2seq: bool,
    report: Reporter,
    over: LoraOverCallback | None,
) -> Trainer:
    from datasets import Dataset

    options = recipe.training.model_dump(exclude={"precision", "max_length"})
    options |= PRECISION[recipe.training.precision]
    options |= {
        "output_dir": str(output / "trainer"),
        "per_device_eval_batch_size": recipe.training.per_device_train_batch_size,
        "report_to": ["tensorboard"] if recipe.tensorboard else "none",
        "disable_tqdm": True,
    }
    train_set = Dataset.from_list(examples.train.rows)
    eval_set = Dataset.from_list(examples.test.rows) if examples.test is not None else None
    callbacks: list[TrainerCallback] = [TrainingProgress(report, output / "metrics.jsonl")]
    if over is not None:
        callbacks.append(over)
    callbacks.append(SealCheckpoints())
    if is_seq2seq:
        trainer = _seq2seq_trainer(recipe, model, tokenizer, options, train_set, eval_set, callbacks)
    else:
        from trl import SFTConfig, SFTTrainer

        trainer = SFTTrainer(
            model,
            SFTConfig(max_length=recipe.training.max_length, completion_only_loss=True, **options),
            train_dataset=train_set,
            eval_dataset=eval_set,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _seq2seq_trainer(
    recipe: Recipe,
    model: PeftModel,
    tokenizer: Any,
    options: dict[str, Any],
    train_set: Any,
    eval_set: Any,
    callbacks: Any,
) -> Trainer:
    from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(row["prompt"], str):
            raise DataError(
                f"{recipe.data.train}: chat messages cannot train the encoder-decoder {recipe.model}; use text."
            )
        limit: dict[str, Any] = {"truncation": True, "max_length": recipe.training.max_length}
        encoded = dict(tokenizer(row["prompt"], **limit))
        encoded["labels"] = tokenizer(text_target=row["completion"], **limit)["input_ids"]
        return encoded

    columns = ["prompt", "completion"]
    return Seq2SeqTrainer(
        model,
        Seq2SeqTrainingArguments(**options),
        train_dataset=train_set.map(encode, remove_columns=columns),
        eval_dataset=None if eval_set is None else eval_set.map(encode, remove_columns=columns),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model),
        processing_class=tokenizer,
        callbacks=callbacks,
    )


def _measure(
    trainer: Trainer, tokenizer: Any, recipe: Recipe, examples: Examples, report: Reporter, when: str
) -> Measures | None:
    if examples.test is None:
        return None
    rows = examples.test.rows
    loss = trainer.evaluate()["eval_loss"]
    accuracy = None
    if recipe.evaluation.exact_match:
        with report.task(f"held-out answers {when}", len(rows)) as advance:
            accuracy = exact_match(
                trainer.model,
                tokenizer,
                rows,
                max_new_tokens=recipe.evaluation.max_new_tokens,
                batch_size=recipe.evaluation.batch_size,
                on_batch=advance,
            )
    measures = Measures(examples=len(rows), loss=loss, exact_match=accuracy)
    report.line(f"{when}: {measures}")
    return measures


def _added(callback: LoraOverCallback) -> int:
    assert callback.over is not None
    cores, matrices = callback.over.num_parameters()
    return cores - matrices


def _trim_metrics(path: Path, checkpoint: Path | None) -> None:
    """Forget what was logged after the checkpoint that the run resumes from."""
    if not path.is_file():
        return
    step = 0 if checkpoint is None else int(checkpoint.name.removeprefix("checkpoint-"))
    kept = [line for line in path.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= step]
    publish_file(path, lambda draft: draft.write_text("".join(line + "\n" for line in kept)))


def _push(repository: str, folder: Path, report: Reporter) -> None:
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repository, exist_ok=True)
    api.upload_folder(repo_id=repository, folder_path=folder)
    report.line(f"uploaded to {repository}")
