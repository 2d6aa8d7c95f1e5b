"""Measures of a run on its held-out rows, before and after training."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from inspect import signature
from typing import Any, Literal, NamedTuple

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy

from loraover.common.atomic_output import publish_text
from loraover.common.errors import DataError, DivergedError
from loraover.common.ranks import launched
from loraover.data.formats import Row
from loraover.data.word_problems import final_number
from loraover.training.launch.distribution import CUTS_WEIGHTS
from loraover.training.recipe import LEARNS_TOKENS
from loraover.training.run.answers import answer_rooms, greedy_answers
from loraover.training.run.build import Prepared
from loraover.training.run.folder import HELD_OUT_FILE
from loraover.training.run.log import log_measures
from loraover.training.run_result import Measures

BEFORE, AFTER = "before training", "after training"
LOWER = "Lower the learning rate of {:g}"


def check_room(run: Prepared) -> None:
    """Check before the first step that answers can be generated after the last one."""
    if run.examples.test is not None and run.recipe.evaluation.exact_match:
        answer_rooms(run.model, run.tokenizer, [row["prompt"] for row in _asked(run.examples.test.rows)])


def measure(run: Prepared, when: str, *, has_begun: bool) -> Measures | None:
    """Measure loss and exact match on the held-out rows `BEFORE` or `AFTER`, and log them.

    DeepSpeed and FSDP place the weights with a step, so that it matters whether this process `has_begun`.
    """
    recipe, report = run.recipe, run.report
    if run.examples.test is None or (when == BEFORE and not recipe.evaluation.before):
        return None
    spread = recipe.distributed.engine
    by_library = spread in CUTS_WEIGHTS or (spread == "zero2" and run.trainer_name not in LEARNS_TOKENS)
    if by_library and not has_begun:
        report.line(f"not measured {when}: {spread} places the weights when this process takes its first step")
        return None
    rows, ranks = run.examples.test.rows, launched()
    with report.task(f"measuring the held-out loss {when}, examples", len(rows)) as advance:
        if run.trainer_name in LEARNS_TOKENS:
            scored = _scored(run, lambda done: advance(min(ranks.size * done, len(rows))))
            loss, fitting = token_loss(scored), sum(example.tokens > 0 for example in scored)
            _check_fitting(run, fitting, rows)
            if when == AFTER:
                ranks.write(publish_text, run.output / HELD_OUT_FILE, json.dumps(scored) + "\n")
        else:
            fitting = len(run.trainer.eval_dataset)  # trainers of preferences leave out rows without room
            _check_fitting(run, fitting, rows)
            run.progress.advance_evaluation = advance
            batches = run.trainer.get_eval_dataloader()  # evaluated without a line in the Trainer's log
            loop = run.trainer.evaluation_loop(batches, "held-out loss", prediction_loss_only=True)
            loss = float(loop.metrics["eval_loss"])
    lower = LOWER.format(recipe.training.peak_rate)
    check_finite(loss, f"the held-out loss {when}", lower if when == AFTER else f"Check the weights of {recipe.model}")
    accuracy = _accuracy(run, rows, when) if recipe.evaluation.exact_match else None
    measures = Measures(examples=fitting, loss=loss, exact_match=accuracy)
    report.line(f"{when}: {measures}")
    ranks.write(log_measures, run.output, run.trainer.state.global_step, eval_loss=loss, exact_match=accuracy)
    return measures


def _scored(run: Prepared, on_batch: Callable[[int], None]) -> list[Scored]:
    """Return the loss of each held-out row, in order.

    Each process takes every so-many-th batch, the longest rows first, so that a batch has rows of about one length and
    the largest shows at once whether it fits. Accelerate fills the last round of batches up with the first rows, so
    that all processes have equally many.
    """
    data = run.trainer.eval_dataset
    order = list(range(len(data)))
    if "input_ids" in data.column_names:  # rows with images become tokens as they are asked for
        order.sort(key=[-len(ids) for ids in data["input_ids"]].__getitem__)
    if run.recipe.distributed.engine == "zero2" and run.recipe.model_init.quantization not in ("nf4", "int8"):
        run.model.to(run.trainer.args.device)  # which DeepSpeed does when the first step begins
    size = run.trainer.args.per_device_eval_batch_size
    with _own_batches(run.trainer):
        mine = example_losses(run.model, run.trainer.get_eval_dataloader(data.select(order)), on_batch=on_batch)
    parts = [[Scored(*pair) for pair in part] for part in launched().gathered(mine)]
    rounds = zip(*([part[i : i + size] for i in range(0, len(mine), size)] for part in parts), strict=True)
    found = [row for batches in rounds for batch in batches for row in batch]
    return [row for _, row in sorted(zip(order, found[: len(order)], strict=True))]


@contextmanager
def _own_batches(trainer: Any) -> Iterator[None]:
    """Make batches of held-out rows anew, all of them and in order, whatever is asked for the training rows.

    They are filled up, where TRL would join them to one row, as it joins those that it packs.
    """
    asked, collator = trainer.args, trainer.data_collator
    trainer.args = copy(asked)
    for name, value in IN_ORDER.items():
        setattr(trainer.args, name, value)
    if getattr(collator, "padding_free", False):  # only the collator of TRL's sft has it
        trainer.data_collator = replace(collator, padding_free=False)
    try:
        yield
    finally:
        trainer.args, trainer.data_collator = asked, collator


IN_ORDER = {
    "dataloader_persistent_workers": False,  # they keep the rows that they were first given
    "dataloader_drop_last": False,
    "train_sampling_strategy": "random",  # any but by length, which holds for held-out rows too
    "group_by_length": False,  # the same under transformers 4
}


def _check_fitting(run: Prepared, fitting: int, rows: Sequence[Row]) -> None:
    length = run.recipe.training.tokens
    if not fitting:
        raise DataError(
            f"no held-out example has room for its completion within training.max_length = {length}; raise it."
        )
    if fitting < len(rows):
        run.report.line(
            f"{len(rows) - fitting} of {len(rows)} held-out examples have no room for their completion within "
            f"training.max_length = {length}: the loss leaves them out"
        )


def _asked(rows: Sequence[Row]) -> list[Row]:
    """Return the prompt and the completion of each row; of a conversation, the last turn is the completion."""
    return [
        row if "prompt" in row else {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows
    ]


def _accuracy(run: Prepared, rows: Sequence[Row], when: str) -> float | None:
    """Measure exact match; None, with a line that says why, if numbers are compared and no held-out row has one."""
    asked, ranks = run.recipe.evaluation, launched()
    pairs = _asked(rows)
    mine = pairs[ranks.rank :: ranks.size]
    if asked.answer == "number" and not any_number(pairs):
        run.report.line(
            "no held-out completion has a number, so exact match is not measured; set evaluation.answer to text to "
            "compare texts"
        )
        return None
    with run.report.task(f"generating held-out answers {when}, examples", len(rows)) as advance:
        share = exact_match(
            run.model,
            run.tokenizer,
            mine,
            max_new_tokens=asked.max_new_tokens,
            batch_size=asked.batch_size,
            answer=asked.answer,
            on_batch=lambda done: advance(min(ranks.size * done, len(rows))),
        )
    right: int = sum(ranks.gathered(round(share * len(mine))))
    return right / len(pairs)


def check_finite(value: float, what: str, advice: str) -> None:
    """Raise DivergedError for a figure that `run.json` cannot hold."""
    if not math.isfinite(value):
        raise DivergedError(
            f"{what} is {value}, expected a finite number. {advice}, or set training.bf16 and training.fp16 to false."
        )


def exact_match(
    model: Any,
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    *,
    max_new_tokens: int,
    batch_size: int,
    answer: Literal["number", "text"] = "number",
    on_batch: Callable[[int], None] = lambda done: None,
) -> float:
    """Share of examples whose greedily generated answer equals the reference; 0 without examples.

    Compared are final numbers, where an answer without one is wrong, or texts without the white space around them.
    """
    if not rows:
        return 0.0
    answers = greedy_answers(
        model,
        tokenizer,
        [row["prompt"] for row in rows],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        on_batch=on_batch,
    )
    read: Callable[[str], object] = final_number if answer == "number" else str.strip
    found = [read(text) for text in answers]
    wanted = [read(_content(row["completion"])) for row in rows]
    return sum(one is not None and one == other for one, other in zip(found, wanted, strict=True)) / len(rows)


def any_number(rows: Iterable[dict[str, Any]]) -> bool:
    """Whether the completion of any example has a number to compare."""
    return any(final_number(_content(row["completion"])) is not None for row in rows)


class Scored(NamedTuple):
    """Negative log-likelihood of one completion, in nats, and its number of tokens."""

    nats: float
    tokens: int


@torch.no_grad()
def example_losses(
    model: Any, batches: Iterable[dict[str, Any]], on_batch: Callable[[int], None] = lambda done: None
) -> list[Scored]:
    """Loss of each example on its completion, in order."""
    was_training = model.training
    model.eval()
    is_causal = not model.config.is_encoder_decoder
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    may_keep = is_causal and "logits_to_keep" in signature(inner.forward).parameters
    found = []
    for batch in batches:
        labels = batch["labels"][:, is_causal:]  # a causal model does not predict its first label
        # Given labels, a causal model under TRL 1.9 returns no logits; an encoder-decoder makes its input of them.
        inputs = {name: value for name, value in batch.items() if name != "labels"} if is_causal else batch
        counts = labels != -100
        if may_keep and counts.any():  # else the logits of prompts, which nothing reads, take most of the memory
            first = int(counts.any(0).nonzero()[0])
            labels, counts = labels[:, first:], counts[:, first:]
            inputs["logits_to_keep"] = counts.shape[1] + 1
        logits = model(**inputs).logits[:, : labels.shape[1]]
        # A softmax over a dimension that is not the last, as for all positions at once, is off by 1e-4 nats a token.
        nats = cross_entropy(logits[counts].float(), labels[counts], reduction="none").cpu().double()
        found += [Scored(float(part.sum()), len(part)) for part in torch.split(nats, counts.sum(1).tolist())]
        on_batch(len(found))
    model.train(was_training)
    return found


def token_loss(scored: Sequence[Scored]) -> float:
    """Mean loss over all completion tokens, in nats; NaN where no token counts."""
    tokens = sum(example.tokens for example in scored)
    return sum(example.nats for example in scored) / tokens if tokens else math.nan


def _content(completion: Any) -> str:
    content = completion if isinstance(completion, str) else completion[-1].get("content") or ""
    return str(content) if not isinstance(content, list) else "".join(part.get("text", "") for part in content)
