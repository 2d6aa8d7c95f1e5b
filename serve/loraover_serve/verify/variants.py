"""The base model in PyTorch with a changed adapter, or with coarser numbers, as a fault of an engine computes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import groupby, tee
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from loraover.adapters.numerics.delta import read_deltas
from loraover.checkpoint.base_modules import load_others, put_parameters, target_module
from loraover.checkpoint.peft_adapter import AdapterDir
from loraover.models.load import ModelSource, load_model
from loraover_serve.comparison.rounding import NumberFormat, rounding
from loraover_serve.engines.answers import Expected
from loraover_serve.engines.torch import LOGITS_AT_ONCE, TOKENS_AT_ONCE, TREE, model_logits, tree_rows, tree_tokens
from loraover_serve.judge.models import Question
from loraover_serve.judge.names import WINDOW
from loraover_serve.verify.base_variants import CACHE_ROUNDINGS, FaultyBase, base_faults, chain_of, coarse_cache
from loraover_serve.verify.layers import Edit, RightLayers, RowModel, RowsError, as_rows, at_input

DELTAS_AT_ONCE = 2**28
"""Bytes of the deltas of models that are run at once, beside those of the right adapter."""


@dataclass(frozen=True)
class LowRankChange:
    """delta_W = B @ A of one module in float32, with the scaling in B.

    Args:
        a: A, (r, in_features); for an embedding one column for each token.
        b: Scaling * B, (out_features, r).
        is_embedding: Whether the module is an embedding.
    """

    a: Tensor
    b: Tensor
    scaling: float
    is_embedding: bool = False

    def times(self, factor: float) -> LowRankChange:
        """The delta, multiplied by a factor."""
        return LowRankChange(self.a, self.b * factor, self.scaling, self.is_embedding)

    def __call__(self, module: nn.Module, given: Tensor, output: Tensor) -> None:
        """Add the delta to what a module has computed."""
        a, b = self.a.to(output), self.b.to(output)
        if self.is_embedding:
            scale = getattr(module, "embed_scale", 1.0)  # Gemma scales its embeddings inside the module
            output += scale * (nn.functional.embedding(given, a.mT) @ b.mT)
        else:  # without a tensor between them, of the output's size
            output.view(-1, len(b)).addmm_((given @ a.mT).flatten(0, -2), b.mT)


Deltas = Mapping[str, LowRankChange]


@dataclass(frozen=True)
class FaultyAdapter:
    """An adapter that an engine may have served instead.

    Args:
        detail: The fault in words.
        deltas: Deltas by the paths of their modules.
        with_others: Whether the adapter's fully trained parameters (`modules_to_save`) replace the base model's.
        source: Adapter whose deltas these are; None for the right one.
        layer: Index of the first layer whose deltas are not the right adapter's.
        factor: Factor on every delta_W, for a fault that is one.
    """

    fault: str
    detail: str
    deltas: Deltas
    with_others: bool = True
    source: AdapterDir | None = None
    layer: int = 0
    factor: float | None = None


def read_lora(adapter: AdapterDir) -> dict[str, LowRankChange]:
    """The delta of every adapted module, by the module's path."""
    modules = adapter.modules
    return {
        delta.module: LowRankChange(
            delta.a.value.float(), delta.b.value.float(), modules[delta.module].scaling, delta.embedding
        )
        for delta in read_deltas(adapter)
    }


class Variants:
    """The base model, loaded when it is first needed, and run with changed adapters.

    Args:
        questions: Tokens after which next tokens are compared.
        dtype: Data type to run in: fp32, bf16, fp16 or fp64.
        answers_only: Whether logprobs are wanted after the tokens of answers alone, as a server gives them.
        loaded: The base model, if it is loaded already.
        as_tree: Whether a common beginning of questions is run only once, and several models at once, which not every
            model allows.

    Attributes:
        source: The base model.
    """

    def __init__(
        self,
        adapter: AdapterDir,
        base: ModelSource,
        device: str,
        questions: Sequence[Question],
        dtype: str = "fp32",
        *,
        answers_only: bool = False,
        loaded: Any = None,
        as_tree: bool = False,
    ) -> None:
        self._adapter, self.source, self._device, self._questions = adapter, base, device, questions
        self._positions = [question.answered if answers_only else question.window for question in questions]
        self.dtype, self._loaded, self.as_tree = dtype, loaded, as_tree

    @cached_property
    def model(self) -> Any:
        """The base model."""
        if self._loaded is not None:
            return self._loaded
        return load_model(self.source, dtype=self.dtype, device=self._device)

    @cached_property
    def _right(self) -> RightLayers:
        return RightLayers(chain_of(self.model))

    def adapted(self, faulty: FaultyAdapter, prompts: int | None = None) -> Expected:
        """Logprobs of the base model with an adapter.

        Args:
            prompts: Number of prompts to run, the first ones; None means all.
        """
        ((_, found),) = self.adapted_each([faulty], {}, prompts)
        return found

    def adapted_each(
        self, faults: Iterable[FaultyAdapter], right: Deltas, prompts: int | None
    ) -> Iterator[tuple[FaultyAdapter, Expected]]:
        """Logprobs of the base model with each of several adapters, as many of which are run at once as memory holds.

        Args:
            faults: The adapters.
            right: Deltas of the right adapter, from which each adapter differs in its first layer and above alone.
            prompts: Number of prompts to run, the first ones; None means all.
        """
        for (source, with_others), alike in groupby(faults, lambda each: (each.source, each.with_others)):
            adapter, (held, models) = source or self._adapter, tee(alike)
            edits = partial(edits_of, self.model, adapter=adapter)
            rows = (RowModel(edits(each.deltas), each.layer) for each in models)
            with replacing(self.model, adapter) if with_others else nullcontext():
                start = RowModel(edits_of(self.model, right, self._adapter))
                yield from zip(held, self._each(rows, start, ("adapter", prompts), prompts), strict=True)

    def rounded(self, format_: NumberFormat) -> Expected:
        """Logprobs of the base model in a coarser number format."""
        with rounding(self.model, format_):
            (found,) = self._each([RowModel()], RowModel(), None, None)
        return found

    def rounded_both(
        self, format_: NumberFormat, deltas: Deltas, prompts: int | None = None
    ) -> tuple[Expected, Expected]:
        """Logprobs of the base model in a coarser number format, without an adapter and with it."""
        with rounding(self.model, format_):
            plain, adapted = RowModel(), RowModel(edits_of(self.model, deltas, self._adapter))
            if not self._adapter.others:
                base, found = self._each([plain, adapted], plain, None, prompts)
                return base, found
            (base,) = self._each([plain], plain, None, prompts)
            return base, self.adapted(FaultyAdapter("", "", deltas), prompts)

    def with_coarse_caches(self, prompts: int | None = None) -> Iterator[tuple[str, Expected]]:
        """How keys and values are held in float8, and logprobs of the base model with them, for each way."""
        for way, held in CACHE_ROUNDINGS.items():
            with coarse_cache(self.model, held):
                (found,) = self._each([RowModel()], RowModel(), None, prompts)
            yield way, found

    def base_faults(self) -> Iterator[tuple[str, str, Callable[[int | None], Expected]]]:
        """Name of each fault of the base model, the fault in words, and a function that runs it on some prompts."""
        for each in self._base_faults():
            yield each.fault, each.detail, partial(self._changed, each)

    def base_each(self, prompts: int | None) -> Iterator[tuple[str, str, Expected]]:
        """Name of each fault of the base model, the fault in words, and its logprobs; some are run at once."""
        for are_rows, alike in groupby(self._base_faults(), lambda each: each.edits is not None):
            faults = list(alike)
            if are_rows:
                rows = [RowModel(each.edits or {}, each.layer) for each in faults]
                found = self._each(rows, RowModel(), ("base", prompts), prompts)
            else:
                found = (self._changed(each, prompts) for each in faults)
            for each, model in zip(faults, found, strict=True):
                yield each.fault, each.detail, model

    def _base_faults(self) -> Iterator[FaultyBase]:
        return base_faults(self.model, max(len(question.tokens) for question in self._questions))

    def _changed(self, faulty: FaultyBase, prompts: int | None) -> Expected:
        """Logprobs of the base model with a fault that is run alone."""
        in_tree = self.as_tree and faulty.fault != WINDOW  # which makes a mask of its own
        with self._right.before(faulty.layer, ("base", prompts)), faulty.change() as before:
            return self._expected([each[0] for each in self._logits(prompts, before=before, in_tree=in_tree)])

    def _each(
        self, models: Iterable[RowModel], right: RowModel, shared: object, prompts: int | None
    ) -> Iterator[Expected]:
        """Logprobs of models; several of them are rows of one batch.

        Args:
            models: The models.
            right: The model from which each of them differs in its first layer and above alone.
            shared: See `RightLayers`.
            prompts: Number of prompts to run, the first ones; None means all.
        """
        if not self._right.layers:
            models = (replace(model, layer=0) for model in models)
        for batch in _batches(models, right, self._at_once(prompts)):
            try:
                found = self._rows(batch, right, shared, prompts)
            except RowsError:
                found = [row for model in batch for row in self._rows([model], right, shared, prompts)]
            yield from map(self._expected, found)

    def _at_once(self, prompts: int | None) -> int:
        """Number of models that are run at once."""
        if not self.as_tree:
            return 1
        tokens = tree_tokens(question.tokens for question in self._questions[:prompts])
        logits = sum(map(len, self._positions[:prompts])) * self.model.config.get_text_config().vocab_size
        return max(1, min(TOKENS_AT_ONCE // min(tokens, TREE), LOGITS_AT_ONCE // int(logits)))

    def _rows(
        self, batch: Sequence[RowModel], right: RowModel, shared: object, prompts: int | None
    ) -> list[list[NDArray[np.float32]]]:
        """Logits of each model of a batch, for each prompt."""
        joins = len(batch) > 1 and batch[-1].layer > 0
        models, last = ([right, *batch], batch[-1].layer) if joins else (batch, None)
        with (
            self._right.before(batch[0].layer, shared, last=last),
            as_rows(self.model, self._right.layers, models),
        ):
            found = self._logits(prompts, rows=at_input(models))
        return [[each[row] for each in found] for row in range(len(batch))]

    @torch.inference_mode()
    def _logits(
        self, prompts: int | None, *, before: Sequence[int] = (), rows: int = 1, in_tree: bool | None = None
    ) -> list[NDArray[np.float32]]:
        """Logits after the last tokens of each prompt, (models, tokens, vocabulary)."""
        sequences = [[*before, *question.tokens] for question in self._questions[:prompts]]
        lasts = [len(mine) for mine in self._positions[:prompts]]
        if self.as_tree if in_tree is None else in_tree:
            return list(tree_rows(self.model, sequences, lasts, rows))
        return [logits[None] for logits in model_logits(self.model, sequences, last=max(lasts))]

    def _expected(self, logits: Sequence[NDArray[np.float32]]) -> Expected:
        return Expected.of(self._positions[: len(logits)], logits, in_file=self.source.is_streamed)


def _batches(models: Iterable[RowModel], right: RowModel, most: int) -> Iterator[list[RowModel]]:
    """Yield models in batches of at most so many, whose own deltas have at most DELTAS_AT_ONCE bytes."""
    batch, held = list[RowModel](), 0
    for model in models:
        mine = [each for module, each in model.edits.items() if each is not right.edits.get(module)]
        size = sum(4 * (each.a.numel() + each.b.numel()) for each in mine if isinstance(each, LowRankChange))
        if batch and (len(batch) == most or held + size > DELTAS_AT_ONCE or model.layer < batch[-1].layer):
            yield batch
            batch, held = [], 0
        batch.append(model)
        held += size
    if batch:
        yield batch


def edits_of(model: nn.Module, deltas: Deltas, adapter: AdapterDir) -> dict[nn.Module, Edit]:
    """The deltas of an adapter by a model's modules."""
    return {target_module(model, adapter, module): delta for module, delta in deltas.items()}


@contextmanager
def replacing(model: nn.Module, adapter: AdapterDir) -> Iterator[None]:
    """Put an adapter's fully trained parameters (`modules_to_save`) into a model for a block."""
    with ExitStack() as undo:
        with adapter.open() as exact:
            undo.callback(put_parameters, model, load_others(model, exact))
        yield


@contextmanager
def adding(model: nn.Module, deltas: Deltas, adapter: AdapterDir, *, with_others: bool) -> Iterator[None]:
    """Add deltas to the outputs of a model's modules during a block, and put in an adapter's other trained parameters.

    Args:
        with_others: Whether these parameters (`modules_to_save`) replace the base model's.
    """
    with (
        as_rows(model, nn.ModuleList(), [RowModel(edits_of(model, deltas, adapter))]),
        replacing(model, adapter) if with_others else nullcontext(),
    ):
        yield
