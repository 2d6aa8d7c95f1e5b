"""Recording of an adapter whose answers are vectors, classes or scores: what the checker compares a server with."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, repeat
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraover.adapters.prompts import prompt_lines
from loraover.checkpoint.peft_adapter import AdapterDir, saved_labels
from loraover.common.errors import ConfigError, DataError
from loraover.models.device import choose_device
from loraover.models.load import ModelSource, load_config, load_tokenizer
from loraover_serve.comparison.rounding import FORMATS, as_served
from loraover_serve.judge.case import strength_along
from loraover_serve.judge.evidence import Change, projected
from loraover_serve.judge.limits import ADAPTER, BASE
from loraover_serve.judge.models import Row
from loraover_serve.judge.names import (
    ADDED_PREFIX,
    CUT,
    HEAD,
    ONLY_HEAD,
    POOLING,
    PREFIX,
    SCALED,
    SPECIAL,
    multiplied,
)
from loraover_serve.judge.vectors.reference import KIND, LEVELS, MOST_SENSITIVE, SIZE, VectorReference, VectorTask
from loraover_serve.verify.power import power_of
from loraover_serve.verify.request import RecordRequest
from loraover_serve.verify.vector_models import NO_LIMIT, Reading, Rows, VectorRunner, read_reading
from loraover_serve.verify.work import ROUNDED, TRIED, Advance, Work, each_done, time_passes

TEXTS = 32
"""Number of texts, unless a file has others."""
RUN_FAULTY = 16
"""Number of the first texts on which faults and number formats are run; the longest texts are among them."""
JOINED = (40, 38, 36, 20, 12, 8, 6, 4, 3, 2)
"""Numbers of lines that are joined into the first texts, which a server may cut off: some 370 tokens and less."""
CUTS = (16, 32, 64, 128, 256)
"""Numbers of tokens at which servers may cut their inputs off."""
VECTOR_FACTORS = (0.25, 0.5, 0.8, 1.25, 1.6, 2.0, 2.8, 4.0)
"""Factors on every delta_W that are recorded; between them a checker interpolates."""
TINY = 1e-9
"""Least distance of a number format, where it changes nothing."""
OF_VECTORS_ALONE = ("pooling", "normalised", "prefix", "pairs")
"""Fields of a request that only adapters of vectors, classes or scores have."""

Texts = Sequence[tuple[str, str | None]]


def check_no_vectors(request: RecordRequest) -> None:
    """Refuse options that an adapter of a causal language model does not have."""
    for name in OF_VECTORS_ALONE:
        if getattr(request, name) is not None:
            raise ConfigError(
                f"{request.named(name)} is for adapters of vectors, classes or scores, and {request.adapter} generates "
                "text; leave it out."
            )


def record_vectors(
    request: RecordRequest, adapter: AdapterDir, base: ModelSource, digests: Mapping[str, Any]
) -> dict[str, Any]:
    """Contents of the reference; see docs/formats.md.

    Args:
        digests: Digests of everything that is recorded.

    Raises:
        ConfigError: Options of text that is generated, or a model that cannot be recorded.
        DataError: A file of prompts that cannot be read.
    """
    for name in ("long", "earlier", "sealed"):
        if getattr(request, name):
            raise ConfigError(f"{request.named(name)} is for generated text, and this adapter has none; leave it out.")
    if ignored := request.given("new_tokens", "max_memory_gib"):
        raise ConfigError(f"{ignored}: not for adapters of vectors, classes or scores; leave it out.")
    return content_of(load_recording(request, adapter, base), request, base, digests)


def load_recording(request: RecordRequest, adapter: AdapterDir, base: ModelSource) -> VectorRecording:
    """Load the models and texts that are recorded; see `record_vectors`."""
    device = str(choose_device(request.device))
    task = find_vector_task(request, adapter, base)
    reading = read_reading(base, task, request.pooling, request.normalised, request.prefix)
    tokenizer, runner = load_tokenizer(base), VectorRunner(adapter, base, task, device, request.compute_dtype)
    if not runner.model.config.is_encoder_decoder and tokenizer.padding_side:
        tokenizer.padding_side = "right"
    texts = read_texts(request, is_pair=task == "score")
    texts = check_lengths(texts, reading, tokenizer, is_own=request.prompts is not None)
    return VectorRecording(runner, tokenizer, reading, texts)


def content_of(
    recording: VectorRecording, request: RecordRequest, base: ModelSource, digests: Mapping[str, Any]
) -> dict[str, Any]:
    """Contents of the reference of loaded models and texts; see `record_vectors`.

    Raises:
        ConfigError: Models whose answers no reference can hold.
    """
    say, reading = request.report.line, recording.reading
    work, few = recording.plan(), recording.few
    say(f"recording {len(recording.texts)} texts takes about {work.seconds:.0f} s: {words_of(reading)}")
    with work.shown(request.report, "recording, passes of the model over a text") as advance:
        right = recording.right()
        advance(work.right)
        content = _first_contents(recording, request, base, digests, right)
        try:
            reference = VectorReference(content)
        except ValueError as error:
            raise ConfigError(
                f"{request.adapter}: {base.name} and the adapter cannot be recorded: {error}. Give each class its own "
                f"name in id2label of config.json, and try {request.named('compute_dtype', 'fp32')}."
            ) from error
        say(f"running both models in {', '.join(FORMATS)}, and the known faults of serving")
        measured = _measure(recording, reference, request.compute_dtype, advance)
        settings = chain(recording.poolings(), each_done(recording.settings(), repeat(2 * few), advance))
        variants = each_done(recording.variants(), repeat(few), advance)
        found = {"settings": [*filter(None, settings)], "variants": [*filter(None, variants)]}
    return content | measured | found


def _first_contents(
    recording: VectorRecording,
    request: RecordRequest,
    base: ModelSource,
    digests: Mapping[str, Any],
    right: Mapping[str, Rows],
) -> dict[str, Any]:
    """Contents of the reference before number formats and faults are known."""
    device = str(choose_device(request.device))
    runner, reading = recording.runner, recording.reading
    numbers = [len(row) for row in right[BASE]]
    return {
        "schema_version": 1,
        "kind": KIND,
        "adapter": request.adapter.resolve().name,
        "base_model": base.name,
        "digests": dict(digests),
        "task": reading.task,
        "labels": runner.labels,
        "activation": runner.activation,
        "normalised": reading.is_normalised,
        "pooling": reading.pooling,
        "prefix": reading.prefix,
        "questions": [
            {"text": text, "pair": pair, "tokens": int(ids["input_ids"].shape[1]), "numbers": number}
            for (text, pair), ids, number in zip(recording.texts, recording.inputs(reading), numbers, strict=True)
        ],
        "rows": {arm: _floats(rows) for arm, rows in right.items()},
        "sensitivity": 1.0,
        "formats": {name: {"distance": 1.0, "strength": 1.0} for name in FORMATS},
        "settings": [],
        "variants": [],
        "words": words_of(reading),
        "made": {"device": device},
    }


def find_vector_task(request: RecordRequest, adapter: AdapterDir, base: ModelSource) -> VectorTask:
    """Task of an adapter: a classifier with one label scores pairs, unless told otherwise."""
    named = adapter.config.task_type
    is_one = named == "SEQ_CLS" and (saved_labels(adapter.shapes) or load_config(base).num_labels) == 1
    if request.pairs and not is_one:
        raise ConfigError(f"{request.named('pairs')}: {request.adapter} does not have one label; leave it out.")
    for name in ("pooling", "normalised"):
        if named in ("SEQ_CLS", "TOKEN_CLS") and getattr(request, name) is not None:
            raise ConfigError(
                f"{request.named(name)} is for vectors, and {request.adapter} gives classes; leave it out."
            )
    if named == "TOKEN_CLS":
        return "token_classify"
    if named == "SEQ_CLS":
        return "score" if is_one and request.pairs is not False else "classify"
    return "embed"


def read_texts(request: RecordRequest, *, is_pair: bool) -> Texts:
    """Texts of a file, or built-in ones, of which the first are long.

    Raises:
        DataError: A file that cannot be read, or a pair without a tab.
    """
    if request.prompts is not None:
        lines = prompt_lines(request.prompts)
        if len(lines) < 2:
            raise DataError(f"{request.prompts}: holds {len(lines)} prompts, expected two or more, one a line.")
        if not is_pair:
            return [(line, None) for line in lines]
        found = [line.split("\t") for line in lines]
        wrong = next((line for line, parts in zip(lines, found, strict=True) if len(parts) != 2), None)
        if wrong is not None:
            raise DataError(f"{request.prompts}: {wrong!r:.60} is not a pair; put a tab between its two texts.")
        return [(one, other) for one, other in found]
    lines = Path(__file__).with_name("questions.txt").read_text(encoding="utf-8").splitlines()
    joined, at = list[str](), 0
    for number in JOINED:
        joined.append(" ".join((lines[at:] + lines[:at])[:number]))
        at = (at + number) % len(lines)
    singles = [line for line in lines if line not in joined]
    texts = (joined + singles)[:TEXTS]
    return [(text, texts[(index + 7) % len(texts)] if is_pair else None) for index, text in enumerate(texts)]


def check_lengths(texts: Texts, reading: Reading, tokenizer: Any, *, is_own: bool) -> Texts:
    """The texts, which the model reads whole: some servers refuse longer ones, and others cut them off.

    Built-in texts that are too long lose their last words.

    Raises:
        DataError: A text of the user's that is too long.
    """
    found, whole = list[tuple[str, str | None]](), replace(reading, longest=NO_LIMIT)

    def tokens_of(text: str, pair: str | None) -> int:
        return max(ids.shape[1] for ids in whole.encode(tokenizer, text, pair).values())

    for number, (text, pair) in enumerate(texts, 1):
        tokens = tokens_of(text, pair)
        if is_own and tokens > reading.longest:
            raise DataError(f"text {number} has {tokens} tokens, and the model reads {reading.longest}; shorten it.")
        while tokens_of(text, pair) > reading.longest and " " in text + (pair or ""):
            text, pair = _shortened(text), None if pair is None else _shortened(pair)
        found.append((text, pair))
    return found


def _shortened(text: str) -> str:
    words = text.split(" ")
    return " ".join(words[: max(1, len(words) * 9 // 10)])


def words_of(reading: Reading) -> str:
    """Task of a server, in words."""
    if reading.task != "embed":
        return {"classify": "classes of texts", "score": "scores of pairs"}.get(reading.task, "classes of tokens")
    length = "of the length 1" if reading.is_normalised else "not normalised"
    prefix = f", behind the prefix {reading.prefix!r}" if reading.prefix else ""
    return f"vectors by the pooling {reading.pooling}, {length}{prefix}"


@dataclass
class VectorRecording:
    """The rows of texts, of right and of faulty models.

    Args:
        runner: The models.
        reading: How a right server reads texts.
        texts: The texts.
    """

    runner: VectorRunner
    tokenizer: Any
    reading: Reading
    texts: Texts
    _pooled: dict[str, dict[str, Rows]] = field(default_factory=dict)

    def inputs(self, reading: Reading, number: int | None = None) -> list[Any]:
        """Inputs of the first texts, or of all."""
        return [reading.encode(self.tokenizer, *each) for each in self.texts[:number]]

    @property
    def few(self) -> int:
        """Number of texts on which faults and number formats are run."""
        return min(RUN_FAULTY, len(self.texts))

    def plan(self) -> Work:
        """The work of a recording, with the time of a pass, which is measured on the last texts."""
        tried = [self.reading.encode(self.tokenizer, *each) for each in self.texts[-TRIED:]]
        heads = 2 if self.runner.has_head else 0
        return Work(
            pass_s=time_passes(lambda: self.runner.rows(self.runner.model, tried, self.reading), len(tried)),
            right=2 * len(self.texts),
            formats=len(FORMATS) * 2 * (self.few + ROUNDED),
            faults=[2 * self.few] * len([*self._readings()]) + [self.few] * (len(VECTOR_FACTORS) + heads),
        )

    def right(self) -> dict[str, Rows]:
        """Rows of both right models, by arm; those by other poolings are kept for `settings`."""
        self._pooled = self._both(self.reading)
        return {arm: found[self._name] for arm, found in self._pooled.items()}

    @property
    def _name(self) -> str:
        return self.reading.pooling or self.reading.task

    def _both(self, reading: Reading, number: int | None = None) -> dict[str, dict[str, Rows]]:
        inputs = self.inputs(reading, number)
        base = self.runner.rows(self.runner.model, inputs, reading)
        with self.runner.right() as model:
            return {BASE: base, ADAPTER: self.runner.rows(model, inputs, reading)}

    def poolings(self) -> Iterator[dict[str, Any]]:
        """Other poolings of servers, as the file has them."""
        right = {arm: found[self._name] for arm, found in self._pooled.items()}
        for how in self._pooled[BASE]:
            if how != self._name:
                rows = {arm: found[how] for arm, found in self._pooled.items()}
                detail = f"vectors are made by the pooling {how}, and not {self._name}"
                yield _packed(right, rows, POOLING, detail)

    def settings(self) -> Iterator[dict[str, Any]]:
        """Other ways of servers to read texts, as the file has them."""
        right = {arm: found[self._name] for arm, found in self._pooled.items()}
        for fault, detail, reading in self._readings():
            found = self._both(reading, self.few)
            rows = {arm: each[self._name] for arm, each in found.items()}
            if all(len(a) == len(b) for arm in rows for a, b in zip(rows[arm], right[arm], strict=False)):
                yield _packed(right, rows, fault, detail)

    def _readings(self) -> Iterator[tuple[str, str, Reading]]:
        mine = self.reading
        lengths = [ids["input_ids"].shape[1] for ids in self.inputs(mine, self.few)]
        if mine.prefix:
            yield PREFIX, f"inputs come without the prefix {mine.prefix!r}", replace(mine, prefix="")
        for text in mine.prompts[:3]:
            yield ADDED_PREFIX, f"inputs come behind the prefix {text!r}", replace(mine, prefix=text)
        bare = replace(mine, with_special=False)
        if any(a["input_ids"].shape[1] != n for a, n in zip(self.inputs(bare, self.few), lengths, strict=True)):
            yield SPECIAL, "inputs come without the special tokens of the tokenizer", bare
        for tokens in CUTS:
            if tokens < mine.longest and sum(each > tokens for each in lengths) >= 2:
                yield CUT, f"inputs are cut off after {tokens} tokens", replace(mine, longest=tokens)

    def variants(self) -> Iterator[dict[str, Any]]:
        """Faults of the adapter alone, as the file has them."""
        inputs = self.inputs(self.reading, self.few)
        right = {ADAPTER: self._pooled[ADAPTER][self._name]}

        def rows(model: Any) -> dict[str, Rows]:
            return {ADAPTER: self.runner.rows(model, inputs, self.reading)[self._name]}

        for factor in VECTOR_FACTORS:
            with self.runner.scaled(factor) as model:
                yield _packed(right, rows(model), SCALED, multiplied(factor), factor)
        if self.runner.has_head:
            with self.runner.scaled(1.0, with_others=False) as model:
                detail = "the trained head (modules_to_save) is not loaded, and the base model's is used"
                yield _packed(right, rows(model), HEAD, detail)
            with self.runner.scaled(0.0) as model:
                detail = "only the trained head (modules_to_save) is applied, and no delta_W"
                yield _packed(right, rows(model), ONLY_HEAD, detail)

    def rounded(self, name: str, dtype: str) -> dict[str, Rows]:
        """Rows of the first texts in a number format, by arm."""
        inputs = self.inputs(self.reading, self.few)
        found = {}
        for arm in (BASE, ADAPTER):
            with self.runner.rounded(as_served(name, dtype), adapted=arm == ADAPTER) as model:
                found[arm] = self.runner.rows(model, inputs, self.reading)[self._name]
        return found


def _measure(recording: VectorRecording, reference: VectorReference, dtype: str, advance: Advance) -> dict[str, Any]:
    """Changes by number formats, how much more they move the adapted model, and how well the texts decide."""
    models = reference.models()
    right = {BASE: models.base.rows, ADAPTER: models.adapter.rows}
    formats, ratio, half = dict[str, Any](), 1.0, math.inf
    for name in FORMATS:
        found = recording.rounded(name, dtype)
        advance(2 * (recording.few + ROUNDED))
        if not _are_finite(found):  # the model overflows in this format, which then explains no server's answers
            formats[name] = {"distance": TINY, "strength": 1.0, "sensitivity": 1.0}
            continue
        rows = {arm: [models.row(reference.answer(row.tolist())) for row in each] for arm, each in found.items()}
        off = {arm: _far(rows[arm], right[arm]) / SIZE for arm in rows}
        strength = strength_along(_changes(rows, right))
        further = min(max(1.0, off[ADAPTER] / off[BASE]), MOST_SENSITIVE) if off[BASE] > 0 else 1.0
        formats[name] = {"distance": max(off[BASE], TINY), "strength": strength.value, "sensitivity": further}
        if name == "bf16":
            ratio = further
            half = strength.half * math.sqrt(len(rows[BASE]) / len(recording.texts))
    power = power_of(len(recording.texts), half, formats["bf16"]["strength"])
    effect = _far(right[ADAPTER], right[BASE]) / SIZE
    return {"formats": formats, "sensitivity": ratio, "effect": effect, "power": power}


def _changes(rows: Mapping[str, Sequence[Row]], right: Mapping[str, Sequence[Row]]) -> list[Change]:
    """Changes by an adapter in some rows, along those in the right rows."""
    changes = []
    for index, (base, adapter) in enumerate(zip(rows[BASE], rows[ADAPTER], strict=True)):
        change = [adapter[i] - base[i] for i in base]
        changes.append(projected(index, change, [right[ADAPTER][index][i] - right[BASE][index][i] for i in base]))
    return changes


def _far(rows: Sequence[Row], right: Sequence[Row]) -> float:
    """RMS difference of the components of rows from those of the first right ones."""
    pairs = zip(rows, right, strict=False)
    return math.sqrt(fmean(fmean((one[i] - other[i]) ** 2 for i in one) for one, other in pairs))


def _floats(rows: Sequence[NDArray[np.float64]]) -> str:
    """Rows in float32, the lowest byte first, in base64."""
    return base64.b64encode(np.concatenate(rows).astype("<f4").tobytes()).decode()


def _are_finite(found: Mapping[str, Rows]) -> bool:
    return all(np.isfinite(row).all() for rows in found.values() for row in rows)


def _packed(
    right: Mapping[str, Rows], found: Mapping[str, Rows], fault: str, detail: str, factor: float | None = None
) -> dict[str, Any]:
    """A fault as the file has it: for each arm a scale for each row, and the differences in its 127ths.

    It is empty if the model overflows.
    """
    if not _are_finite(found):
        return {}
    packed: dict[str, Any] = {"fault": fault, "detail": detail, "factor": factor}
    for arm, rows in found.items():
        off = [row - exact for row, exact in zip(rows, right[arm], strict=False)]
        scales = [float(np.float32(np.abs(row).max())) for row in off]
        levels = [np.rint(row / (scale or 1.0) * LEVELS) for row, scale in zip(off, scales, strict=True)]
        numbers = np.clip(np.concatenate(levels), -LEVELS, LEVELS).astype(np.int8)
        packed |= {
            "questions": len(rows),
            arm: {"scales": _floats([np.array(scales)]), "levels": base64.b64encode(numbers.tobytes()).decode()},
        }
    return packed
