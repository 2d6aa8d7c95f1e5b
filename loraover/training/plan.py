"""Memory, steps and tokens that a recipe would need, from the model's config.json and the size of the data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from importlib.resources import files
from pathlib import Path

from pydantic import Field

from loraover.checkpoint.files import TRAINER_FOLDER
from loraover.common.errors import ConfigError
from loraover.common.provenance import environment, hardware, today
from loraover.common.reporter import SILENT, Reporter
from loraover.common.request import as_written
from loraover.data.formats import PAIRS
from loraover.data.sources import count_hub_rows, is_hub_name
from loraover.models.device import choose_device, total_memory
from loraover.models.load import ModelSource, is_encoder_decoder, load_tokenizer, resolve_model
from loraover.models.memory import ROOM
from loraover.reporting.figures import Band, FigureRow, rows_figure
from loraover.reporting.html_page import Origin, Page, Verdict, make_page
from loraover.reporting.svg import Axis
from loraover.reporting.table import facts_table
from loraover.training.launch.defaults import Settled, in_micro_batches, settle
from loraover.training.launch.distribution import CUTS_WEIGHTS
from loraover.training.launch.memory import Gpus, Memory, estimate_memory
from loraover.training.launch.settings import check_names, make_arguments
from loraover.training.recipe import Recipe
from loraover.training.rows.data import Examples, read_examples
from loraover.training.rows.lengths import FEW, SPLITS
from loraover.training.rows.template import with_template
from loraover.training.run_result import Lengths
from loraover.training.trainers import TRAINERS, trainer_name
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
    gpus: int | None = Field(None, description="GPUs that the plan is for, a process each; None: this machine.")
    memory: int | None = Field(
        None, description="Bytes of memory of each of these GPUs, or of this machine; None: not known."
    )
    fits: bool | None = Field(
        None, description="Whether the estimate leaves room for fragments and buffers; None: that is not known."
    )
    remedies: list[str] = Field([], description="Changes of the recipe with which it would fit, each with its bytes.")
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
            **({"weights gathered in use": size_text(self.gathered)} if self.gathered else {}),
            "A and B": size_text(self.adapter),
            "cores": size_text(self.cores),
            **({"bases and moments": size_text(self.gauge)} if self.gauge else {}),
            "gradients": size_text(self.gradients),
            "optimizer states": size_text(self.optimizer_states),
            "activations": f"about {size_text(self.activations or 0)}" if known else "unknown for this architecture",
            "in all": f"about {size_text(self.in_all)}{'' if known else ', and activations'}",
            **({} if self.fits is None else {"verdict": self.verdict}),
            "steps": f"{self.steps:,}",
            "examples": f"{self.examples:,}",
            "tokens": f"at most {self.tokens:,}",
            **({} if self.step_seconds is None else {"time": self.time}),
            **({} if (peak := self.peak_bytes) is None else {"peak memory": f"{size_text(peak)}, measured in a trial"}),
        }

    @property
    def time(self) -> str:
        """Time of a step and of all, in the largest unit in which they are not below one."""
        seconds = self.step_seconds or 0.0
        minutes = self.steps * seconds / 60
        short = f"{minutes:.1f} min" if minutes >= 1 else f"{60 * minutes:.2g} s"
        whole = f"{minutes / 60:.1f} h" if minutes >= 60 else short
        return f"about {seconds:.2g} s a step, {whole} in all without evaluation"

    @property
    def verdict(self) -> str:
        """Whether the memory suffices, and else what would make it suffice."""
        where = "this machine" if self.gpus is None else f"each of {self.gpus} GPUs" if self.gpus > 1 else "the GPU"
        room = f"{size_text(round(ROOM * (self.memory or 0)))} of the {size_text(self.memory or 0)} of {where}"
        if self.fits:
            return f"fits into {room}"
        found = f"what would fit: {'; or '.join(self.remedies)}" if self.remedies else "lower training.max_length"
        return f"does not fit into {room}; {found}"

    def facts(self, *, with_bars: bool = True) -> dict[str, str]:
        """Name and value of each row of a table, with a histogram of the lengths if they are known and it is wanted."""
        lengths, rows = self.lengths, self.needs()
        if lengths is None:
            return rows
        for edge, count in lengths.histogram.items() if with_bars else ():
            bar = "#" * max(1, round(24 * count / max(lengths.histogram.values())))
            rows[f"up to {edge:,} tokens"] = f"{bar} {count:,}"
        cut = f"{lengths.cut:,} of {lengths.examples:,} ({lengths.cut_share:.1%})"
        rows["cut"] = (
            f"{cut} at max_length {lengths.max_length:,}; {lengths.unlabelled:,} of them have nothing to learn"
        )
        most = f"max_length {lengths.keeps_99:,} would cut 1 % of all at most"
        return rows | {"longest example": f"{lengths.longest:,} tokens; {most}"}


ASSUMPTION = (
    "Activations are what autograd keeps of one micro-batch of full length: all logits (TRL computes them in parts), "
    "but no attention scores, as with fused attention. Cores are all that the schedule can inject, optimizer states "
    "AdamW's. Fragmentation and the buffers of libraries come on top; where bases are measured, so do "
    "the moments of all layers' inputs and outputs before the first step."
)


def make_plan(
    recipe: Recipe,
    report: Reporter = SILENT,
    *,
    tries: bool = False,
    gpus: int | None = None,
    gpu_memory: float | None = None,
) -> TrainingPlan:
    """Estimate memory, steps and tokens of a run without reading weights.

    Args:
        report: Receiver of the values that the recipe leaves open.
        tries: Whether to measure time and memory in a few steps with random weights where it can, see `try_steps`.
        gpus: Number of GPUs that the plan is for, with a process on each; None: one, or this machine.
        gpu_memory: Memory of each of them in GB; None: that of a GPU here.

    Raises:
        ConfigError, DataError: What `train` would refuse before it loads weights, or a hub that does not answer.
    """
    check_names(recipe)
    source = resolve_model(recipe.model, recipe.model_revision)
    is_seq2seq = is_encoder_decoder(source)
    name, data = trainer_name(recipe, is_seq2seq=is_seq2seq), recipe.data
    planned = None if gpus is None and gpu_memory is None else _planned_gpus(gpus, gpu_memory)
    if planned is not None and recipe.distributed.processes is None:
        recipe = recipe.changed("distributed", processes=planned.count)
    make_arguments(recipe, name, Path(TRAINER_FOLDER), starts=False)
    tokenizer, read = None, None
    with suppress(ConfigError):  # a model may have none beside its configuration
        tokenizer = load_tokenizer(source)
    tokenizer = tokenizer and with_template(recipe, tokenizer)
    if any(map(is_hub_name, data.sources)):
        report.line(f"{', '.join(data.sources)}: not read, since a plan downloads no data; the run checks rows")
    else:
        read = read_examples(recipe, name, source, tokenizer, report, measures=not is_hub_name(data.test or ""))
    settled = settle(recipe, name, source, tokenizer, read, report, planned)
    recipe = settled.recipe
    steps, seen, tokens = _count(settled, read)
    can_try = settled.tokens or (read is None and tokenizer is not None and PAIRS[0] in TRAINERS[name].columns)
    tries = tries and planned is None and recipe.distributed.engine == "ddp"
    needs = try_steps(recipe, source, report) if tries and can_try else None
    estimate = estimate_memory(recipe, source, steps)
    memory = total_memory(choose_device().type) if planned is None else planned.memory
    fits = None if memory is None else estimate.in_all <= ROOM * memory
    return TrainingPlan(
        model=source.origin,
        method=recipe.method,
        **dict(estimate),
        gpus=None if planned is None else planned.count,
        memory=memory,
        fits=None if estimate.activations is None and fits else fits,
        remedies=[] if fits is not False else what_would_fit(recipe, source, steps, ROOM * (memory or 0), planned),
        steps=steps,
        examples=seen,
        tokens=tokens * (2 if is_seq2seq else TRAINERS[name].texts),
        step_seconds=None if needs is None else needs.step_seconds,
        peak_bytes=None if needs is None else round(needs.peak_bytes),
        lengths=settled.lengths,
    )


def _planned_gpus(count: int | None, memory: float | None) -> Gpus:
    """Return the GPUs of a plan: by default one, with the memory of a GPU of this machine."""
    if memory is not None:
        return Gpus(count or 1, round(memory * 1e9))
    device = choose_device().type
    here = None if device == "cpu" else total_memory(device)
    if here is None:
        raise ConfigError(f"there is no GPU here to take the memory from; give {as_written('gpu_memory')}, in GB.")
    return Gpus(count or 1, here)


def _count(settled: Settled, read: Examples | None) -> tuple[int, int, int]:
    """Count the steps of a run, the examples that it sees, and the tokens that these have at most.

    An epoch has the local examples that are not left out, or the fewer ones into which they are packed.
    """
    recipe, training, lengths = settled.recipe, settled.recipe.training, settled.lengths
    data, most, sizes, examples = recipe.data, training.tokens, settled.tokens, None
    if training.max_steps is None:
        if read is None:
            examples = data.train_examples or sum(
                count_hub_rows(name, data.train_split, data.subset, data.revision) for name in data.sources
            )
        elif recipe.packs and sizes:
            whole = (training.model_extra or {}).get("packing_strategy") in SPLITS
            examples = math.ceil(sum(one.total if whole else min(one.total, most) for one in sizes) / most)
        else:
            rows = (settled.examples or read).train.rows
            examples = len(rows) - (0 if lengths is None else lengths.unlabelled)
    steps = recipe.steps(examples or 0)
    in_a_step = training.micro_batch * training.gradient_accumulation_steps * (recipe.distributed.processes or 1)
    seen = steps * in_a_step * recipe.clients
    if training.num_train_epochs is not None and examples is not None:
        seen = round(examples * training.num_train_epochs)
    if not sizes or recipe.packs:
        return steps, seen, seen * most
    longest = sorted((min(one.total, most) for one in sizes), reverse=True)[:examples]
    epochs, rest = divmod(seen, len(longest))
    return steps, seen, epochs * sum(longest) + sum(longest[:rest])


MORE_GPUS = (2, 4, 8, 16, 32, 64, 128)
"""Numbers of GPUs that a plan tries where those it is for are too few."""


def what_would_fit(recipe: Recipe, source: ModelSource, steps: int, room: float, gpus: Gpus | None) -> list[str]:
    """Return changes of a recipe after which a process needs at most the given number of bytes."""
    found: list[str] = []
    smaller = [*_smaller(recipe)]
    activations = [estimate_memory(tried, source, steps).activations for _, tried in smaller]
    for words, changed in _lighter(recipe, gpus):
        held = estimate_memory(changed, source, steps, with_activations=False).held
        for (more, _), kept in zip(smaller, activations, strict=True):
            if held + (kept or 0) <= room:
                rest = ", and activations" if kept is None else ""
                found.append(f"{', '.join([*words, *more])} (about {size_text(held + (kept or 0))}{rest})")
                break
        if found and changed.distributed != recipe.distributed:
            break  # more GPUs would fit, too
    return found


def _lighter(recipe: Recipe, gpus: Gpus | None) -> Iterator[tuple[list[str], Recipe]]:
    """Yield the recipe, then versions with less of its base model in a process, each with its changes."""
    yield [], recipe
    init, distributed, here = recipe.model_init, recipe.distributed, recipe.distributed.processes or 1
    is_cut = distributed.engine in CUTS_WEIGHTS
    if init.quantization is None and recipe.method != "full" and not is_cut:
        yield ["model_init.quantization: nf4"], recipe.changed("model_init", quantization="nf4")
    if recipe.method not in ("lora", "lora-over") or init.quantization is not None:
        return
    spread = distributed.engine if is_cut else "fsdp2"
    asked = [] if is_cut else ["distributed.engine: fsdp2"]
    if recipe.evaluation.exact_match:
        asked.append("evaluation.exact_match: false")
    for count in [here, *(n for n in MORE_GPUS if gpus and n > here)]:
        if count > 1 and (asked or count > here):
            more = [] if count == here else [f"{as_written('gpus', str(count))}"]
            yield [*asked, *more], recipe.changed("distributed", engine=spread, config=None, processes=count)


def _smaller(recipe: Recipe) -> Iterator[tuple[list[str], Recipe]]:
    """Yield the recipe, then versions with fewer activations in the same steps, each with its changes."""
    yield [], recipe
    training = recipe.training
    in_a_step = training.micro_batch * training.gradient_accumulation_steps * (recipe.distributed.processes or 1)
    checkpointing, one = ["training.gradient_checkpointing: true"], ["training.per_device_train_batch_size: 1"]
    if not training.gradient_checkpointing:
        yield checkpointing, recipe.changed("training", gradient_checkpointing=True)
    if training.micro_batch > 1:
        yield one, in_micro_batches(recipe, 1, in_a_step, training.gradient_checkpointing)
        if not training.gradient_checkpointing:
            yield [*checkpointing, *one], in_micro_batches(recipe, 1, in_a_step, True)


def size_text(count: int) -> str:
    """Return a number of bytes in the largest unit in which it is not below one."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"


def to_page(plan: TrainingPlan, command: str) -> Page:
    """Make the page of a plan; every text is escaped."""
    facts, lengths = plan.facts(with_bars=False) | {"estimate": ASSUMPTION}, plan.lengths
    sentence = f"The run takes {plan.steps:,} steps of {plan.method}. Memory in all: {facts['in all']}."
    if plan.fits is not None:
        sentence += f" It {plan.verdict.partition(';')[0]}."
    if lengths is not None:
        sentence += f" max_length {lengths.max_length:,} cuts {lengths.cut:,} of {lengths.examples:,} examples."
    is_open = plan.fits is False or (lengths is not None and lengths.cut_share > FEW)
    figures = []
    if lengths is not None:
        bars = [
            FigureRow(f"up to {edge:,} tokens", f"{count:,}", bands=[Band(0, count, "other")])
            for edge, count in lengths.histogram.items()
        ]
        axis = Axis("examples", 0, max(lengths.histogram.values()))
        figures = [rows_figure("lengths", "Number of examples by their length", bars, axis)]
    return make_page(
        files("loraover.training").joinpath("plan.html.j2").read_text(encoding="utf-8"),
        title="Plan",
        heading="What will the run need?",
        verdict=Verdict("open" if is_open else "plain", "plan", sentence),
        facts={"base model": plan.model},
        origin=Origin(command, today(), hardware(), environment()),
        figures=figures,
        table=facts_table(list(facts.items())),
    )
