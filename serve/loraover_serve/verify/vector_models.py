"""Models of vectors, classes and scores in PyTorch: which one an adapter belongs to, and its rows of texts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraover.checkpoint.peft_adapter import AdapterDir, saved_labels
from loraover.common.errors import ConfigError, DataError
from loraover.common.request import as_written
from loraover.models.load import AUTO_CLASSES, ModelSource, load_config, load_encoder, load_model
from loraover.models.model_file import MODULES_FILE, embeds_texts, find_model_file
from loraover.reference import reference_model
from loraover_serve.comparison.adapters import OF_VECTORS
from loraover_serve.comparison.rounding import NumberFormat, rounding
from loraover_serve.judge.vectors.reference import POOLINGS, VectorReference, VectorTask
from loraover_serve.verify.variants import adding, read_lora

OF_POOLING = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_max_tokens": "max",
}
"""Poolings by the names that sentence-transformers gives them in 1_Pooling/config.json."""

PROMPTS_FILE, LENGTH_FILE = "config_sentence_transformers.json", "sentence_bert_config.json"
KNOWN_PARTS = ("Transformer", "Pooling", "Normalize")
NO_LIMIT = 2**20
"""Tokens of the longest text, where a model's files name no limit."""

Rows = list[NDArray[np.float64]]


def has_vectors(adapter: AdapterDir, base: ModelSource) -> bool:
    """Whether an adapter's task is one of vectors, classes or scores; without a task, its base model decides."""
    task = adapter.config.task_type
    return task in OF_VECTORS or (task is None and embeds_texts(base))


@dataclass(frozen=True)
class Reading:
    """How texts become vectors, or logits.

    Args:
        task: What is asked for.
        pooling: One of POOLINGS; None for classes and scores.
        is_normalised: Whether vectors get the length 1.
        prefix: Text that the server puts before each input.
        prompts: Other prefixes that the model knows.
        longest: Number of tokens that the model reads; further ones are cut off.
        with_special: Whether the tokenizer adds its special tokens.
    """

    task: VectorTask
    pooling: str | None = None
    is_normalised: bool = False
    prefix: str = ""
    prompts: tuple[str, ...] = ()
    longest: int = NO_LIMIT
    with_special: bool = True

    def encode(self, tokenizer: Any, text: str, pair: str | None) -> dict[str, Tensor]:
        """Inputs of the model for a text or a pair, each of shape (1, tokens).

        Raises:
            DataError: A text without tokens.
        """
        texts = [self.prefix + text] if pair is None else [self.prefix + text, pair]
        found = tokenizer(
            *texts,
            return_tensors="pt",
            truncation=True,
            max_length=self.longest,
            add_special_tokens=self.with_special,
        )
        if not found["input_ids"].shape[1]:
            raise DataError(f"the text {text!r:.60} has no tokens; give other prompts.")
        return {name: ids for name, ids in found.items() if ids.shape[1]}


def read_reading(
    base: ModelSource,
    task: VectorTask,
    pooling: str | None,
    normalised: bool | None,
    prefix: str | None,
) -> Reading:
    """How texts become vectors: as sentence-transformers saved it, or else as vLLM does, unless told otherwise.

    Args:
        task: What is asked for.
        pooling: The pooling; None finds out.
        normalised: Whether vectors get the length 1; None finds out.
        prefix: Text that the server puts before each input; None means none, since servers add none by themselves.

    Raises:
        ConfigError: A model with parts that cannot be run here, such as a dense layer after the pooling.
    """
    config = load_config(base)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or NO_LIMIT
    longest = min(int(_file(base, LENGTH_FILE).get("max_seq_length") or limit), int(limit))
    if getattr(config, "model_type", "") in ("roberta", "xlm-roberta", "camembert"):
        longest = min(longest, int(limit) - 2)  # whose positions begin behind that of padding
    if task != "embed":
        return Reading(task, prefix=prefix or "", longest=longest)
    parts = _file(base, MODULES_FILE) if embeds_texts(base) else []
    names = [str(part["type"]).rpartition(".")[2] for part in parts]
    unknown = [name for name in names if name not in KNOWN_PARTS]
    if unknown:
        raise ConfigError(
            f"model: {base.origin}: {MODULES_FILE} has the part {unknown[0]}, and only {', '.join(KNOWN_PARTS)} can be "
            "recorded; compare its vectors with those of sentence-transformers."
        )
    saved = _file(base, PROMPTS_FILE)
    prompts = {str(name): str(text) for name, text in (saved.get("prompts") or {}).items() if text}
    known = {prompts.get(str(saved.get("default_prompt_name")), ""): None} | dict.fromkeys(prompts.values())
    chosen = prefix or ""
    _check_prefix(base, parts, chosen)
    how = pooling or _pooling(base, parts) or ("last" if _is_decoder(config) else "cls")
    is_normalised = ("Normalize" in names if names else True) if normalised is None else normalised
    others = tuple(text for text in known if text and text != chosen)
    return Reading(task, how, is_normalised, chosen, others, longest)


def reading_of(reference: VectorReference) -> Reading:
    """How the texts of a reference were read; the model read all of them whole."""
    return Reading(reference.task, reference.pooling, reference.is_normalised, reference.prefix)


def _check_prefix(base: ModelSource, parts: Sequence[Mapping[str, Any]], prefix: str) -> None:
    """Refuse a prefix whose tokens are left out of the pooling, since they are not left out here."""
    for part in (part for part in parts if prefix and str(part["type"]).endswith(".Pooling")):
        if _file(base, f"{part['path']}/config.json").get("include_prompt") is False:
            raise ConfigError(
                f"model: {base.origin}: {part['path']}/config.json leaves the tokens of a prompt out of the pooling "
                f"(include_prompt: false), which cannot be recorded; leave out {as_written('prefix')}."
            )


def _pooling(base: ModelSource, parts: Sequence[Mapping[str, Any]]) -> str | None:
    """The pooling that sentence-transformers saved; None if it saved none."""
    part = next((part for part in parts if str(part["type"]).endswith(".Pooling")), None)
    if part is None:
        return None
    found = _file(base, f"{part['path']}/config.json")
    named = [found["pooling_mode"]] if isinstance(found.get("pooling_mode"), str) else []
    named += [how for key, how in OF_POOLING.items() if found.get(key)]
    named = list(dict.fromkeys("last" if how == "lasttoken" else how for how in named))
    if len(named) != 1 or named[0] not in POOLINGS:
        raise ConfigError(
            f"model: {base.origin}: {part['path']}/config.json names the poolings {', '.join(named) or 'none'}, "
            f"expected one of {', '.join(POOLINGS)}."
        )
    return str(named[0])


def _file(base: ModelSource, name: str) -> Any:
    """Contents of a JSON file of a model; empty if it has none."""
    path = find_model_file(base, name)
    try:
        return {} if path is None else json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"model: {base.origin}: {name} cannot be read: {error}; save the model again.") from error


def _is_decoder(config: Any) -> bool:
    from transformers.models.auto import modeling_auto as classes

    kind = config.model_type
    is_encoder = kind in classes.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return kind in classes.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not (is_encoder and not config.is_decoder)


def _check_head(adapter: AdapterDir, base: ModelSource, labels: int | None) -> None:
    """Refuse a base model without a head of its own: what it answers without the adapter would be random."""
    auto = AUTO_CLASSES[adapter.config.task_type or ""]
    architecture = (load_config(base).architectures or ["model of no named class"])[0]
    if not architecture.endswith(("ForSequenceClassification", "ForTokenClassification")):
        number = "N" if labels is None else labels
        raise ConfigError(
            f"model: {base.origin} is a {architecture}, whose head for classes would be random. Save it with the head "
            f"that servers get ({auto}.from_pretrained(..., num_labels={number}).save_pretrained(FOLDER)), and name "
            f"the folder with {as_written('model')}."
        )


class VectorRunner:
    """A base model with an adapter, which gives the rows of texts.

    Args:
        task: What is asked for.
        device: Device to run on.
        dtype: Data type to compute in.

    Attributes:
        model: The base model.
        has_head: Whether the adapter has fully trained parameters.
    """

    def __init__(self, adapter: AdapterDir, base: ModelSource, task: VectorTask, device: str, dtype: str) -> None:
        self._adapter, self._task = adapter, task
        if task == "embed":
            self.model = load_encoder(base, adapter.modules, dtype=dtype, device=device)
        else:
            named, labels = adapter.config.task_type, saved_labels(adapter.shapes)
            _check_head(adapter, base, labels)
            self.model = load_model(base, dtype=dtype, device=device, task_type=named, num_labels=labels)
        self._deltas = read_lora(adapter)
        self.has_head = any(not key.endswith(".bias") for key in adapter.others)

    @property
    def labels(self) -> list[str]:
        """Names of the classes; empty for vectors."""
        if self._task == "embed":
            return []
        names = self.model.config.id2label
        return [str(names[index]) for index in range(self.model.config.num_labels)]

    @property
    def activation(self) -> str | None:
        """Function of logits that servers apply unless told otherwise; None for vectors, and for a regression."""
        if self._task == "embed" or self.model.config.problem_type == "regression":
            return None
        several = self.model.config.problem_type == "multi_label_classification"
        return "sigmoid" if several or self.model.config.num_labels == 1 else "softmax"

    @contextmanager
    def right(self) -> Iterator[Any]:
        """The adapted model, by code that shares nothing with an export where it can."""
        with reference_model(self.model, self._adapter) as model:
            yield model

    @contextmanager
    def scaled(self, factor: float, *, with_others: bool = True) -> Iterator[Any]:
        """The model with a factor on every delta_W, and with the adapter's fully trained parameters or without them."""
        deltas = {path: delta.times(factor) for path, delta in self._deltas.items()}
        with adding(self.model, deltas, self._adapter, with_others=with_others):
            yield self.model

    @contextmanager
    def rounded(self, format_: NumberFormat, *, adapted: bool) -> Iterator[Any]:
        """The base model in a coarser number format, with the adapter or without it."""
        with rounding(self.model, format_), self.scaled(1.0) if adapted else nullcontext(self.model) as model:
            yield model

    @torch.inference_mode()
    def rows(self, model: Any, inputs: Sequence[Mapping[str, Tensor]], reading: Reading) -> dict[str, Rows]:
        """Rows of texts by the pooling; those of classes and scores have the name of their task.

        Args:
            model: The model, as this object yields it.
            inputs: Inputs of each text.
            reading: How they become rows.
        """
        found: dict[str, Rows] = {}
        for each in inputs:
            on_device = {name: ids.to(self.model.device) for name, ids in each.items()}
            for name, row in self._row(model, on_device, reading).items():
                found.setdefault(name, []).append(row.detach().cpu().double().numpy())
        return found

    def _row(self, model: Any, inputs: Mapping[str, Tensor], reading: Reading) -> dict[str, Tensor]:
        if reading.task != "embed":
            return {reading.task: model(**inputs).logits[0].flatten()}
        output = model(**inputs, output_hidden_states=True)
        hidden = getattr(output, "last_hidden_state", None)
        return pooled(output.hidden_states[-1][0] if hidden is None else hidden[0])


def pooled(hidden: Tensor) -> dict[str, Tensor]:
    """The vector of a text by each pooling, from the hidden states of its tokens, (tokens, numbers)."""
    return {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1], "max": hidden.amax(0)}
