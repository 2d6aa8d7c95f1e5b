"""PyTorch's answers of the adapted model and of the base model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from math import prod

import numpy as np

from loraover.checkpoint.peft_adapter import AdapterDir
from loraover.common.reporter import Reporter
from loraover.models.load import ModelSource, load_config, load_model
from loraover.models.memory import Needs, fit_base
from loraover.reference.reference_model import reference_model, reference_name
from loraover_serve.comparison.rounding import as_served, rounding
from loraover_serve.engines.answers import ADAPTER, BASE, Expected, Question, Row, last_rows, paired
from loraover_serve.engines.sample import TokenRequest
from loraover_serve.engines.torch import LOGITS_AT_ONCE, TorchEngine, Within
from loraover_serve.judge.case import strength_along
from loraover_serve.verify.measures import between_arms

HELD = 4
"""Models whose logprobs are held at once at most: base and adapter, and both of them rounded."""


@dataclass(frozen=True)
class TorchReference:
    """PyTorch's answers.

    Args:
        name: The adapted model, in words.
        questions: Tokens after which next tokens are compared.
        base: Logprobs of the base model.
        adapter: Logprobs of the adapted model.
        sensitivity: Ratio by which bfloat16 arithmetic moves the adapted model's logprobs more than the base model's,
            at least 1.
        bias: Strength of the adapter if PyTorch computes in bfloat16; 1 if such rounding shrinks no change.
        ends: Ids of the tokens that end a text.
    """

    name: str
    questions: tuple[Question, ...]
    base: Expected
    adapter: Expected
    sensitivity: float
    bias: float = 1.0
    ends: frozenset[int] = frozenset()


def fit_reference(
    adapter: AdapterDir,
    base: ModelSource,
    prompts: Sequence[tuple[int, ...]],
    new_tokens: int,
    device: str,
    report: Reporter,
    dtype: str,
    max_memory_gib: float | None,
) -> ModelSource:
    """Say what PyTorch needs of memory before a model is loaded, and choose how to load the base model.

    The other arguments are those of `make_reference`.

    Args:
        max_memory_gib: Largest size of the base model's weights in memory, in GiB; None: what the device has free.

    Returns:
        The base model, which is streamed if its weights are larger.
    """
    vocabulary = load_config(base).get_text_config().vocab_size
    held = sum(prod(shape) for shape in adapter.shapes.values())
    if device == "cpu":  # which has the logprobs in its memory
        held += HELD * len(prompts) * new_tokens * vocabulary
    tokens = max(max(map(len, prompts)) + new_tokens, LOGITS_AT_ONCE // vocabulary)
    needs = Needs.of_model(base, adapters=held, tokens=tokens, logits=2)  # the model's, and these in float32
    place = {"device": device, "compute_dtype": dtype}
    return fit_base("PyTorch", base, needs=needs, say=report.line, max_memory_gib=max_memory_gib, **place)


def make_reference(
    adapter: AdapterDir,
    base: ModelSource,
    prompts: Sequence[tuple[int, ...]],
    new_tokens: int,
    device: str,
    report: Reporter,
    dtype: str = "fp32",
) -> TorchReference:
    """Run the adapted model and the base model in PyTorch.

    A checkpoint's unfolded model applies the cores and never forms A and B; any other adapter is applied by PEFT.

    Args:
        adapter: The adapter.
        base: The base model.
        prompts: Token ids of the prompts.
        new_tokens: Number of tokens of the greedy answers.
        device: Device to run on.
        report: Receiver of progress.
        dtype: Data type to run in: fp32, bf16, fp16 or fp64.

    Raises:
        CheckpointError: An adapter of another model, or one that PEFT refuses.
        EngineError: A model that PyTorch fails to run.
    """
    report.line(f"loading the base model from {base.origin}")
    model, name = load_model(base, dtype=dtype, device=device), reference_name(adapter)
    ends = _ends(base)
    with reference_model(model, adapter) as adapted:
        report.line(f"running {name} and the base model in PyTorch on {len(prompts)} prompts")
        engine = TorchEngine({BASE: partial(nullcontext, model), ADAPTER: partial(nullcontext, adapted)})
        answers = engine.run(ADAPTER, 0, 0, [TokenRequest(prompt, new_tokens) for prompt in prompts])
        questions = tuple(
            Question(p, _first(answer.token_ids, ends)) for p, answer in zip(prompts, answers, strict=True)
        )
        read = partial(_rows, engine, questions=questions, in_file=base.is_streamed)
        plain = {arm: read(arm) for arm in (BASE, ADAPTER)}
        coarse = partial(rounding, format_=as_served("bf16", dtype))
        rounded = {arm: read(arm, within=coarse) for arm in (BASE, ADAPTER)}
    moved = {arm: _rms(plain[arm], rounded[arm]) for arm in (BASE, ADAPTER)}
    sensitivity = max(1.0, moved[ADAPTER] / moved[BASE]) if moved[BASE] > 0 else 1.0
    expected = {arm: Expected(plain[arm]) for arm in (BASE, ADAPTER)}
    pairs = paired(rounded[BASE], rounded[ADAPTER])
    bias = strength_along(between_arms(pairs, expected[BASE], expected[ADAPTER])).value
    return TorchReference(name, questions, expected[BASE], expected[ADAPTER], sensitivity, bias or 1.0, ends)


def _first(tokens: tuple[int, ...], ends: frozenset[int]) -> tuple[int, ...]:
    """The tokens up to the first end of the text: what follows it is not what anybody trained or reads."""
    last = next((index for index, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: last + 1]


def _ends(base: ModelSource) -> frozenset[int]:
    """Ids of the tokens that end a text, by the model's configuration."""
    found = getattr(load_config(base).get_text_config(), "eos_token_id", None)
    return frozenset(found) if isinstance(found, list) else frozenset() if found is None else frozenset({found})


def _rows(
    engine: TorchEngine, arm: str, questions: Sequence[Question], *, in_file: bool, within: Within = nullcontext
) -> list[Row]:
    found = enumerate(engine.logits(arm, (question.tokens for question in questions), within=within))
    return [row for i, logits in found for row in last_rows(i, questions[i].window, logits, in_file=in_file)]


def _rms(one: Sequence[Row], other: Sequence[Row]) -> float:
    squares = [float(np.mean(np.square(p.logprobs - q.logprobs))) for p, q in zip(one, other, strict=True)]
    return float(np.sqrt(np.mean(squares)))
