"""Values that a recipe leaves open until its model and rows are known; a run and its plan settle them alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loraover.common.errors import DataError
from loraover.common.ranks import launched
from loraover.common.reporter import Reporter
from loraover.data.formats import RowForm
from loraover.data.sources import BadRows
from loraover.models.load import ModelSource, load_config, load_processor, takes_images
from loraover.training.checks import check_rows, row_form
from loraover.training.launch.defaults import with_batch, with_defaults
from loraover.training.launch.memory import Gpus
from loraover.training.method import TrainingMethod
from loraover.training.method_table import make_method
from loraover.training.recipe import Recipe
from loraover.training.rows.data import Examples, load_examples, report_rows, report_skipped
from loraover.training.rows.lengths import Tokens, check_fit, count_tokens
from loraover.training.rows.template import with_template
from loraover.training.run_result import Lengths
from loraover.training.trainers import TRAINERS


@dataclass(frozen=True)
class Settled:
    """A recipe without open values, and what it trains on.

    Args:
        recipe: The recipe, with values in place of those that it left to this machine and its data.
        trainer_name: Key of `TRAINERS`.
        source: The base model.
        examples: Its rows, without those that are skipped; None if a plan does not read them.
        tokenizer: Its tokenizer; None if a plan finds none.
        processor: What reads the images of its rows; None for rows without any.
        tokens: Lengths of the training rows; empty if a plan cannot count them.
        lengths: What is cut of them; None if none can be cut, or they are not counted.
        method: The recipe's method.
    """

    recipe: Recipe
    trainer_name: str
    source: ModelSource
    examples: Examples | None
    tokenizer: Any
    processor: Any | None
    tokens: list[Tokens]
    lengths: Lengths | None
    method: TrainingMethod

    @property
    def reads(self) -> Any:
        """Reader that turns rows into tokens: the processor if any row holds images, else the tokenizer."""
        return self.tokenizer if self.processor is None else self.processor


def read_examples(
    recipe: Recipe, name: str, source: ModelSource, tokenizer: Any, report: Reporter, *, measures: bool = True
) -> Examples:
    """Load the rows that a recipe trains and measures on, and report what is not learned of them.

    Args:
        recipe: The recipe.
        name: Key of `TRAINERS`.
        source: The base model.
        tokenizer: Its tokenizer; None if there is none, so that no chat messages are written.
        report: Receiver of the lines.
        measures: Whether held-out rows are read.

    Raises:
        DataError: See `load_examples`.
    """
    form = RowForm(TRAINERS[name].columns, text=recipe.training.text_column)
    if tokenizer is not None:
        form = row_form(recipe, name, tokenizer, takes_images=takes_images(source))
    measures = measures and name != "grpo"  # whose loss says nothing; its log has rewards
    with launched().first_then_others():
        examples = load_examples(recipe if measures else recipe.changed("evaluation", examples=0), form)
    report_rows(examples, report, measures=measures and bool(recipe.evaluation.examples))
    return examples


def settle(
    recipe: Recipe,
    name: str,
    source: ModelSource,
    tokenizer: Any,
    examples: Examples | None,
    report: Reporter,
    gpus: Gpus | None = None,
) -> Settled:
    """Check the rows of a recipe, and give the values that it leaves to them, to its method and to this machine.

    Args:
        recipe: The recipe.
        name: Key of `TRAINERS`.
        source: The base model.
        tokenizer: Its tokenizer; None if a plan finds none.
        examples: Its rows; None if a plan does not read them.
        report: Receiver of the values with their reasons, and of what is cut.
        gpus: GPUs that a plan is for; None: this machine.

    Raises:
        ConfigError: The recipe does not fit its model or this machine.
        DataError: Rows that cannot be learned, or none that keeps anything to learn from.
    """
    processor, counted = None, list[list[Tokens]]()
    if examples is not None and tokenizer is not None:
        if examples.have_pictures:
            processor = with_template(recipe, load_processor(source))
            tokenizer = with_template(recipe, processor.tokenizer)
        check_rows(recipe, name, tokenizer, examples)
        answers_only = recipe.training.assistant_only_loss
        bad = [BadRows() for _ in examples.parts]
        counted = [
            count_tokens(part, name, tokenizer, answers_only=answers_only, processor=processor, bad=one)
            for part, one in zip(examples.parts, bad, strict=True)
        ]
        if any(one.examples for one in bad):
            examples, counted = _without(recipe, examples, counted, bad, report)
    lasting = [one for part in (counted[:1] if processor is None else counted) for one in part]
    config = load_config(source)
    recipe = with_batch(with_defaults(recipe, config, lasting, report, gpus), source, report, gpus)
    method, lengths = make_method(recipe, is_seq2seq=bool(config.is_encoder_decoder)), None
    if examples is not None and counted:
        method.check_rows(examples.train.rows)
        lengths = check_fit(recipe, name, examples, counted, report)
    tokens = counted[0] if counted else []
    return Settled(recipe, name, source, examples, tokenizer, processor, tokens, lengths, method)


def _without(
    recipe: Recipe, examples: Examples, counted: list[list[Tokens]], bad: list[BadRows], report: Reporter
) -> tuple[Examples, list[list[Tokens]]]:
    """Leave out the rows that a chat template refuses, with their lengths, or raise DataError with their faults."""
    faults = list[str]()
    for part, one in zip(examples.parts, bad, strict=True):
        if not recipe.data.skip_bad_rows or len(one.examples) == len(part.rows):
            try:
                one.refuse(part.origin)
            except DataError as error:
                faults.append(str(error))
    if faults:
        raise DataError("\n".join(faults))
    for one in bad:
        report_skipped(one.rows, report)
    kept = [[t for i, t in enumerate(part) if i not in one.examples] for part, one in zip(counted, bad, strict=True)]
    return examples.without(bad), kept
