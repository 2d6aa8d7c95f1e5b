"""Models that PyTorch runs: the right ones at once, and each fault when the judge first asks for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from loraover.checkpoint.peft_adapter import AdapterDir
from loraover.common.errors import ConfigError
from loraover.common.reporter import Reporter
from loraover.common.request import as_written
from loraover.models.load import ModelSource, load_config, load_model, load_tokenizer
from loraover.models.memory import ACTIVATIONS, Needs, fit_base
from loraover.reference import reference_model, reference_name
from loraover_serve.comparison.rounding import as_served
from loraover_serve.comparison.served_weights import ServedWeights
from loraover_serve.engines.answers import Expected, row_of
from loraover_serve.engines.endpoint import text_of
from loraover_serve.engines.torch import LOGITS_AT_ONCE, TOKENS_AT_ONCE
from loraover_serve.judge.case import strength_along
from loraover_serve.judge.evidence import projected
from loraover_serve.judge.limits import ADAPTER, BASE
from loraover_serve.judge.models import Answers, FaultyModel, Model, Models, Question
from loraover_serve.judge.templates import Conversations
from loraover_serve.verify.faults import FAULTS, RightAdapter, rescaled
from loraover_serve.verify.right_models import EXACT, RightModels, end_tokens
from loraover_serve.verify.variants import DELTAS_AT_ONCE, FaultyAdapter, Variants
from loraover_serve.verify.work import Advance, unseen

HELD = 4
"""Largest number of models whose logprobs are held at once: base and adapter, and both of them rounded."""

KEPT = 128
"""Number of likeliest tokens of each right model at which an engine in this process is compared."""

FACTORS = (32.0, 16.0, 8.0, 4.0, 2.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32)
Ids = NDArray[np.int64]


@final
@dataclass(eq=False)
class TorchModels(Models):
    """Questions, PyTorch's answers to them, and the base model to run faults.

    Logprobs of the right models are held of the entire vocabulary, and given for the likeliest tokens of both, and for
    those that an engine has answered.

    Args:
        name: The adapted model, in words.
        expected: Logprobs of the right models, by arm.
        sensitivity: Ratio by which bfloat16 arithmetic moves the adapted model's logprobs more than the base model's,
            at least 1.
        variants: The base model with changed adapters.
        subject: The adapter.
        bf16_strength: Strength of the adapter if PyTorch computes in bfloat16; 1 if such rounding shrinks no change.
        ends: Ids of the tokens that end a text.
        answers: Answers of the engine that is judged; None before it was asked.
        likely: Likeliest tokens of both right models at each place; found if there are none.
        conversations: See `Models`.
        weights: See `Models`.
        coarseness: See `Models`.
        finest: See `Models`.
    """

    name: str
    questions: tuple[Question, ...]
    expected: Mapping[str, Expected]
    sensitivity: float
    variants: Variants
    subject: RightAdapter
    bf16_strength: float = 1.0
    ends: frozenset[int] = frozenset()
    answers: Answers | None = None
    likely: Sequence[Ids] = ()
    conversations: Conversations = field(default_factory=Conversations)
    weights: str | None = None
    coarseness: str | None = None
    finest: str | None = None
    places: list[tuple[int, int]] = field(init=False)
    base: Model = field(init=False)
    adapter: Model = field(init=False)
    vocabulary: int = field(init=False)
    factors = FACTORS

    def __post_init__(self) -> None:
        self.places = [
            (index, position + 1 - len(question.prompt))
            for index, question in enumerate(self.questions)
            for position in question.window
        ]
        if not self.likely:
            right = (self.expected[BASE], self.expected[ADAPTER])
            at = map(self.position, range(len(self.places)))
            self.likely = [np.unique([likeliest(model.at(*each), KEPT) for model in right]) for each in at]
        self.vocabulary = self.expected[BASE].vocabulary
        self.base, self.adapter = (self.model(self.expected[arm]) for arm in (BASE, ADAPTER))

    def position(self, place: int) -> tuple[int, int]:
        """Question of a place, and the index of the last token that is read."""
        question, step = self.places[place]
        return question, len(self.questions[question].prompt) - 1 + step

    @cached_property
    def _ids(self) -> list[Ids]:
        """Tokens of each place."""
        answered = [set[int]() for _ in self.places]
        if self.answers is not None:
            rows = [self.answers.base, self.answers.adapter, *self.answers.mixed.values()]
            for mine in (*rows, *(answer.rows for answer in self.answers.greedy)):
                for place, row in mine.items():
                    answered[place] |= row.keys()
            for answer in self.answers.greedy:
                length = len(self.questions[answer.question].answer)
                for place, token in enumerate(answer.tokens[:length], self.first(answer.question)):
                    answered[place].add(token)
        return [np.union1d(self.likely[place], np.array([*more], np.int64)) for place, more in enumerate(answered)]

    def model(self, expected: Expected) -> Model:
        """Logprobs of a model over the entire vocabulary, at the places where it was run."""
        rows, floors = [], []
        for place, ids in enumerate(self._ids):
            if self.position(place) not in expected:
                break
            logprobs = expected.at(*self.position(place))
            rows.append(row_of(logprobs, ids))
            floors.append(float(logprobs[ids].min()))
        return Model(rows, floors)

    def beside(self, answers: Answers) -> TorchModels:
        return replace(self, answers=answers)

    def with_weights(self, weights: ServedWeights) -> TorchModels:
        """Return the same as the models that run on the weights of a server."""
        kind = weights.number_format
        return replace(self, weights=weights.in_words, coarseness=kind, finest=kind)

    def text(self, place: int) -> str | None:
        return text_of(self._tokenizer, self.read(place))

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.variants.source)

    def rounding(self, number_format: str) -> float:
        model = self.model(self.variants.rounded(as_served(number_format, self.variants.dtype)))
        squares = [np.mean([(model.rows[p][i] - self.base.rows[p][i]) ** 2 for i in ids]) for p, ids in self._asked]
        return float(np.sqrt(np.mean(squares)))

    def bias(self, number_format: str) -> float:
        if number_format == "bf16":
            return self.bf16_strength
        format_ = as_served(number_format, self.variants.dtype)
        base, adapter = self.variants.rounded_both(format_, self.subject.deltas)
        return self.strength_of(self.model(base), self.model(adapter), self._asked)

    @property
    def _asked(self) -> list[tuple[int, Sequence[int]]]:
        """Places that the engine has answered, with its tokens there."""
        assert self.answers is not None
        rows = self.answers.base or self.answers.adapter
        return [(place, [*rows[place]]) for place in sorted(rows)]

    def strength_of(self, base: Model, adapter: Model, asked: Sequence[tuple[int, Sequence[int]]]) -> float:
        """Strength of the adapter in two models, along what it changes in the right ones, at places and tokens."""
        changes = []
        for place, ids in asked:
            one, two, right, base_right = (m.rows[place] for m in (base, adapter, self.adapter, self.base))
            pairs = [(two[i] - one[i], right[i] - base_right[i]) for i in ids]
            changes.append(projected(self.places[place][0], *zip(*pairs, strict=True)))
        return strength_along(changes).value

    def scaled(self, factor: float, questions: int | None = None) -> Model:
        return self.model(self.variants.adapted(FaultyAdapter("", "", rescaled(self.subject, factor)), questions))

    def adapter_faults(self) -> Iterator[FaultyModel]:
        for fault in FAULTS:
            for each in fault(self.subject):
                yield FaultyModel(each.fault, each.detail, partial(self._run, each))

    def _run(self, faulty: FaultyAdapter, questions: int | None) -> Model:
        return self.model(self.variants.adapted(faulty, questions))

    def base_faults(self) -> Iterator[FaultyModel]:
        def run(faulty: Callable[[int | None], Expected], questions: int | None) -> Model:
            return self.model(faulty(questions))

        for fault, detail, faulty in self.variants.base_faults():
            yield FaultyModel(fault, detail, partial(run, faulty))

    def with_coarse_caches(self) -> Iterator[Model]:
        return (self.model(expected) for _, expected in self.variants.with_coarse_caches())


def likeliest(logprobs: NDArray[np.float32], number: int) -> list[int]:
    """Ids of the likeliest tokens."""
    if number >= len(logprobs):
        return list(range(len(logprobs)))
    return [int(i) for i in np.argpartition(-logprobs, number)[:number]]


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

    The other arguments are those of `make_models`.

    Args:
        max_memory_gib: Largest size of the base model's weights in memory, in GiB; None: what the device has free.

    Returns:
        The base model, which is streamed if its weights are larger.
    """
    vocabulary = load_config(base).get_text_config().vocab_size
    held = sum(math.prod(shape) for shape in adapter.shapes.values())
    if device == "cpu":  # which has the logprobs in its memory
        held += HELD * len(prompts) * new_tokens * vocabulary
    if dtype in EXACT:  # several models run at once
        config = load_config(base).get_text_config()
        keys_and_values = 2 * config.num_hidden_layers
        held += TOKENS_AT_ONCE * (ACTIVATIONS + keys_and_values) * config.hidden_size + DELTAS_AT_ONCE // 4
    tokens = max(max(map(len, prompts)) + new_tokens, LOGITS_AT_ONCE // vocabulary)
    needs = Needs.of_model(base, adapters=held, tokens=tokens, logits=2)  # the model's, and these in float32
    place = {"device": device, "compute_dtype": dtype}
    return fit_base("PyTorch", base, needs=needs, say=report.line, max_memory_gib=max_memory_gib, **place)


def make_models(
    adapter: AdapterDir,
    base: ModelSource,
    prompts: Sequence[tuple[int, ...]],
    new_tokens: int,
    device: str,
    report: Reporter,
    dtype: str = "fp32",
    *,
    subject: RightAdapter,
    messages: Sequence[str] = (),
    answers_only: bool = False,
    weights: ServedWeights | None = None,
    loaded: Any = None,
    adapted: Any = None,
    advance: Advance = unseen,
) -> TorchModels:
    """Run the adapted model and the base model in PyTorch.

    A checkpoint's unfolded model applies the cores and never forms A and B; any other adapter is applied by PEFT.

    Args:
        prompts: Token ids of the prompts.
        new_tokens: Number of tokens of the greedy answers.
        dtype: Data type to run in: fp32, bf16, fp16 or fp64.
        subject: The adapter whose faults are looked for.
        messages: Message of each prompt's chat; empty if prompts are no chats.
        answers_only: Whether faults are run at the tokens of answers alone, as a server gives them.
        weights: Weights that a server has in the place of the base model's own.
        loaded: The base model with these weights, if it is loaded already.
        adapted: The adapted model on the same weights, as `reference_model` makes it, if it is made already.
        advance: See `RightModels.run`.

    Raises:
        ConfigError: Served weights that do not fit the base model, or one that is read from its files each time.
        CheckpointError: An adapter of another model, or one that PEFT refuses.
        EngineError: A model that PyTorch fails to run.
    """
    model = load_base(base, weights, dtype, device, report) if loaded is None else loaded
    name = reference_name(adapter)
    with reference_model(model, adapter) if adapted is None else nullcontext(adapted) as right:
        report.line(f"running {name} and the base model in PyTorch on {len(prompts)} prompts")
        both = RightModels(model, right, dtype, in_file=base.is_streamed)
        questions, exact, rounded, as_tree = both.run(prompts, messages, new_tokens, advance)
    how: dict[str, Any] = {"answers_only": answers_only, "loaded": model, "as_tree": as_tree}
    variants = Variants(adapter, base, device, questions, dtype, **how)
    models = TorchModels(name, questions, exact, 1.0, variants, subject, ends=end_tokens(load_config(base)))
    return _with_rounding(models if weights is None else models.with_weights(weights), rounded)


def load_base(base: ModelSource, weights: ServedWeights | None, dtype: str, device: str, report: Reporter) -> Any:
    """Load the base model, with the weights of a server in the place of its own if there are any."""
    report.line(f"loading the base model from {base.origin}")
    model = load_model(base, dtype=dtype, device=device)
    if weights is not None:
        if base.is_streamed:
            raise ConfigError(
                f"{weights.where}: these weights need a base model in memory, but it is read from its files as it is "
                f"used; allow more memory with {as_written('max_memory_gib')}, or take a machine with more of it."
            )
        report.line(f"putting the weights of {weights.where} into it ({weights.format})")
        weights.put_into(model)
    return model


def _with_rounding(models: TorchModels, rounded: Mapping[str, Expected]) -> TorchModels:
    """The models, with the strength of the adapter and the sensitivity that their rounded logprobs show."""
    kept = [(place, [*models.kept(place)]) for place in range(len(models.places))]
    bias = models.strength_of(models.model(rounded[BASE]), models.model(rounded[ADAPTER]), kept)
    places = [models.position(place) for place in range(len(models.places))]
    moved = {}
    for arm, exact in models.expected.items():
        squares = [float(np.mean(np.square(exact.at(*place) - rounded[arm].at(*place)))) for place in places]
        moved[arm] = math.sqrt(np.mean(squares))
    sensitivity = max(1.0, moved[ADAPTER] / moved[BASE]) if moved[BASE] > 0 else 1.0
    return replace(models, sensitivity=sensitivity, bf16_strength=bias or 1.0)
