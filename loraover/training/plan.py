"""Memory, steps and tokens that a recipe would need, from the model's config.json and the size of the data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pydantic import Field

from loraover.common.errors import ConfigError
from loraover.common.reporter import SILENT, Reporter
from loraover.data.formats import PAIRS
from loraover.data.sources import count_hub_rows, is_hub_name
from loraover.models.load import ModelSource, is_encoder_decoder, load_tokenizer, resolve_model
from loraover.training.checks import check_names
from loraover.training.estimate import Memory, estimate_memory
from loraover.training.examples import Examples
from loraover.training.lengths import SPLITS
from loraover.training.recipe import Recipe
from loraover.training.run_result import Lengths
from loraover.training.settle import Settled, read_examples, settle
from loraover.training.spelling import with_template
from loraover.training.trainers import TRAINERS, make_arguments, trainer_name
from loraover.training.trial import try_steps


class TrainingPlan(Memory):
    """Needs of one process: its memory, time, steps and tokens."""

    model: str = Field(description="Base model with its commit or folder.")
    method: str = Field(description="Method of the recipe, such as lora or lora-over.")
    steps: int = Field(description="Optimizer steps.")
    examples: int = Field(description="Examples that the run sees, over all epochs.")
    tokens: int = Field(description="Largest number of tokens: every example at full length.")
    step_seconds: float | None = Field(
        None, description="Seconds of an optimizer step on this machine, measured in a trial; None: there was none."
    )
    peak_bytes: int | None = Field(
        None, description="Largest memory on this machine, measured in a trial; None: there was none."
    )
    lengths: Lengths | None = Field(
        description="Lengths of the examples; None: their data or tokenizer is not at hand."
    )

    def needs(self) -> dict[str, str]:
        """Name and value of each row of a table, without the lengths of the examples."""
        known = self.activations is not None
        return {
            "base model": self.model,
            "method": self.method,
            "weights": size_text(self.weights),
            "A and B": size_text(self.adapter),
            "cores": size_text(self.cores),
            **({"bases and moments": size_text(self.gauge)} if self.gauge else {}),
            "gradients": size_text(self.gradients),
            "optimizer states": size_text(self.optimizer_states),
            "activations": f"about {size_text(self.activations or 0)}" if known else "unknown for this architecture",
            "in all": f"about {size_text(self.held + (self.activations or 0))}{'' if known else ', and activations'}",
            "steps": f"{self.steps:,}",
            "examples": f"{self.examples:,}",
            "tokens": f"at most {self.tokens:,}",
            **({} if self.step_seconds is None else {"time": _time(self.steps, self.step_seconds)}),
            **({} if (peak := self.peak_bytes) is None else {"peak memory": f"{size_text(peak)}, measured in a trial"}),
        }

    def facts(self, *, with_bars: bool = True) -> dict[str, str]:
        """Name and value of each row of a table, with a histogram of the lengths if they are known and it is wanted."""
        lengths = self.lengths
        if lengths is None:
            return self.needs()
        return self.needs() | (_bars(lengths) if with_bars else {}) | _cut(lengths)


ASSUMPTION = (
    "Activations are what autograd keeps of one micro-batch of full length: all logits (TRL computes them in parts), "
    "but no attention scores, as with fused attention. Cores are all that the schedule can inject, optimizer states "
    "AdamW's. Fragmentation and the buffers of libraries come on top; where bases are measured, so do "
    "the moments of all layers' inputs and outputs before the first step."
)


def make_plan(recipe: Recipe, report: Reporter = SILENT, *, tries: bool = False) -> TrainingPlan:
    """Estimate memory, steps and tokens of a run without reading weights.

    Args:
        recipe: The recipe.
        report: Receiver of the values that the recipe leaves open.
        tries: Whether to measure time and memory in a few steps with random weights, see `try_steps`; they need the
            model's tokenizer, and a trainer of prompts and completions where the data are on the hub.

    Raises:
        ConfigError: A recipe that `train` would refuse before it loads weights; or neither the hub nor its cache
            answers.
        DataError: Local data that cannot be read.
    """
    check_names(recipe)
    source = resolve_model(recipe.model, recipe.model_revision)
    is_seq2seq = is_encoder_decoder(source)
    name = trainer_name(recipe, is_seq2seq=is_seq2seq)
    make_arguments(recipe, name, Path())
    tokenizer = _tokenizer(recipe, source)
    read = _read(recipe, name, source, tokenizer, report)
    settled = settle(recipe, name, source, tokenizer, read, report)
    recipe, training = settled.recipe, settled.recipe.training
    examples = None if training.max_steps is not None else _count_examples(settled, read)
    steps = recipe.steps(examples or 0)
    in_a_step = training.micro_batch * training.gradient_accumulation_steps * (recipe.distributed.processes or 1)
    seen = steps * in_a_step * recipe.clients
    if training.num_train_epochs is not None and examples is not None:
        seen = round(examples * training.num_train_epochs)
    can_try = settled.tokens or (read is None and tokenizer is not None and PAIRS[0] in TRAINERS[name].columns)
    needs = try_steps(recipe, source, report) if tries and can_try else None
    return TrainingPlan(
        model=source.origin,
        method=recipe.method,
        **dict(estimate_memory(recipe, source, steps)),
        steps=steps,
        examples=seen,
        tokens=seen * training.tokens * (2 if is_seq2seq else TRAINERS[name].texts),
        step_seconds=None if needs is None else needs.step_seconds,
        peak_bytes=None if needs is None else round(needs.peak_bytes),
        lengths=settled.lengths,
    )


def _bars(lengths: Lengths) -> dict[str, str]:
    """Return a row for each bar of the histogram of lengths."""
    most = max(lengths.histogram.values())
    return {
        f"up to {edge:,} tokens": f"{'#' * max(1, round(24 * count / most))} {count:,}"
        for edge, count in lengths.histogram.items()
    }


def _cut(lengths: Lengths) -> dict[str, str]:
    """Return rows that say what is cut."""
    cut = f"{lengths.cut:,} of {lengths.examples:,} ({lengths.cut_share:.1%})"
    return {
        "cut": f"{cut} at max_length {lengths.max_length:,}; {lengths.unlabelled:,} of them have nothing to learn",
        "longest example": f"{lengths.longest:,} tokens; max_length {lengths.keeps_99:,} would cut 1 % of all at most",
    }


def _tokenizer(recipe: Recipe, source: ModelSource) -> Any:
    """Load the tokenizer; None for a model that has none beside its configuration."""
    try:
        tokenizer = load_tokenizer(source)
    except ConfigError:
        return None
    return with_template(recipe, tokenizer)


def _read(recipe: Recipe, name: str, source: ModelSource, tokenizer: Any, report: Reporter) -> Examples | None:
    """Read the rows that are here; None, with a line that says so, if training rows are on the hub."""
    if any(map(is_hub_name, recipe.data.sources)):
        report.line(f"{', '.join(recipe.data.sources)}: not read, since a plan downloads no data; the run checks rows")
        return None
    return read_examples(recipe, name, source, tokenizer, report, measures=not is_hub_name(recipe.data.test or ""))


def _count_examples(settled: Settled, read: Examples | None) -> int:
    """Count the examples of an epoch: of local data those that are not left out, as few as packing makes of them."""
    recipe, lengths = settled.recipe, settled.lengths
    data, most = recipe.data, recipe.training.tokens
    if read is None and data.train_examples:
        return data.train_examples
    if read is None:
        return sum(count_hub_rows(name, data.train_split, data.subset, data.revision) for name in data.sources)
    if recipe.packs and settled.tokens:
        whole = (recipe.training.model_extra or {}).get("packing_strategy") in SPLITS
        return math.ceil(sum(one.total if whole else min(one.total, most) for one in settled.tokens) / most)
    return len((settled.examples or read).train.rows) - (0 if lengths is None else lengths.unlabelled)


def _time(steps: int, seconds: float) -> str:
    """Return the time of a step and of all, in the largest unit in which they are not below one."""
    minutes = steps * seconds / 60
    short = f"{minutes:.1f} min" if minutes >= 1 else f"{60 * minutes:.2g} s"
    whole = f"{minutes / 60:.1f} h" if minutes >= 60 else short
    return f"about {seconds:.2g} s a step, {whole} in all without evaluation"


def size_text(count: int) -> str:
    """Return a number of bytes in the largest unit in which it is not below one."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"
