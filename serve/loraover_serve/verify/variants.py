"""The base model in PyTorch with a changed adapter, or with coarser numbers, as a fault of an engine computes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from loraover.adapters.numerics.delta import read_deltas
from loraover.checkpoint.base_modules import load_others, put_parameters, target_module
from loraover.checkpoint.peft_adapter import AdapterDir
from loraover.models.load import ModelSource, load_model
from loraover_serve.comparison.rounding import NumberFormat, rounding
from loraover_serve.engines.answers import Expected
from loraover_serve.engines.torch import model_logits, tree_logits
from loraover_serve.judge.models import Question
from loraover_serve.judge.names import WINDOW
from loraover_serve.verify.base_variants import CACHE_ROUNDINGS, Change, base_faults, chain_of, coarse_cache


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


Deltas = Mapping[str, LowRankChange]


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
        as_tree: Whether a common beginning of questions is run only once, which not every model allows.
        pass_s: Seconds that the base model takes for all questions; 0 if that is not known.

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
        pass_s: float = 0.0,
    ) -> None:
        self._adapter, self.source, self._device, self._questions = adapter, base, device, questions
        self._positions = [question.answered if answers_only else question.window for question in questions]
        self.dtype, self._loaded, self._as_tree, self.pass_s = dtype, loaded, as_tree, pass_s

    @cached_property
    def model(self) -> Any:
        """The base model."""
        if self._loaded is not None:
            return self._loaded
        return load_model(self.source, dtype=self.dtype, device=self._device)

    @cached_property
    def _right(self) -> RightLayers:
        return RightLayers(chain_of(self.model))

    def adapted(
        self,
        deltas: Deltas,
        *,
        with_others: bool = True,
        prompts: int | None = None,
        source: AdapterDir | None = None,
        layer: int = 0,
    ) -> Expected:
        """Logprobs of the base model with these deltas.

        Args:
            deltas: Deltas by the paths of their modules.
            with_others: Whether the adapter's fully trained parameters (`modules_to_save`) replace the base model's.
            prompts: Number of prompts to run, the first ones; None means all.
            source: Adapter whose deltas these are; None for the one in question.
            layer: Index of the first layer whose deltas are not those of the adapter in question.
        """
        adapter = source or self._adapter
        with (
            adding(self.model, deltas, adapter, with_others=with_others),
            self._right.before(layer, ("adapter", prompts)),
        ):
            return self._run(prompts)

    def rounded(self, format_: NumberFormat, deltas: Deltas | None = None, *, prompts: int | None = None) -> Expected:
        """Logprobs of the base model in a coarser number format, with an adapter if deltas are given."""
        with rounding(self.model, format_):
            return self._run(prompts) if deltas is None else self.adapted(deltas, prompts=prompts)

    def with_coarse_caches(self) -> Iterator[tuple[str, Expected]]:
        """How keys and values are held in float8, and logprobs of the base model with them, for each way."""
        for way, held in CACHE_ROUNDINGS.items():
            with coarse_cache(self.model, held):
                yield way, self._run()

    def base_faults(self) -> Iterator[tuple[str, str, Callable[[int | None], Expected]]]:
        """Name of each fault of the base model, the fault in words, and a function that runs it on some prompts."""
        for fault, detail, changed, layer in self._base_faults():
            in_tree = self._as_tree and fault != WINDOW  # which makes a mask of its own
            yield fault, detail, partial(self._changed, changed, layer, in_tree)

    def first_layers(self) -> list[int]:
        """Index of the first layer that each fault of the base model changes."""
        return [layer for *_, layer in self._base_faults()]

    def _base_faults(self) -> Iterator[tuple[str, str, Change, int]]:
        return base_faults(self.model, max(len(question.tokens) for question in self._questions))

    def _changed(self, changed: Change, layer: int, in_tree: bool, prompts: int | None) -> Expected:
        with self._right.before(layer, ("base", prompts)), changed() as before:
            return self._run(prompts, before, in_tree=in_tree)

    @torch.inference_mode()
    def _run(self, prompts: int | None = None, before: Sequence[int] = (), *, in_tree: bool | None = None) -> Expected:
        sequences = [[*before, *question.tokens] for question in self._questions[:prompts]]
        positions = self._positions[:prompts]
        lasts = [len(mine) for mine in positions]
        if self._as_tree if in_tree is None else in_tree:
            found = tree_logits(self.model, sequences, lasts)
        else:
            found = model_logits(self.model, sequences, last=max(lasts))
        return Expected.of(positions, found, in_file=self.source.is_streamed)


@contextmanager
def adding(model: nn.Module, deltas: Deltas, adapter: AdapterDir, *, with_others: bool) -> Iterator[None]:
    """Add deltas to the outputs of a model's modules during a block, and put in an adapter's other trained parameters.

    Args:
        with_others: Whether these parameters (`modules_to_save`) replace the base model's.
    """

    def add(delta: LowRankChange, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        a, b = delta.a.to(output), delta.b.to(output)
        if delta.is_embedding:
            scale = getattr(module, "embed_scale", 1.0)  # Gemma scales its embeddings inside the module
            return output + scale * (nn.functional.embedding(args[0], a.mT) @ b.mT)
        return output + (args[0] @ a.mT) @ b.mT

    with ExitStack() as undo:
        for module, delta in deltas.items():
            target = target_module(model, adapter, module)
            undo.enter_context(target.register_forward_hook(partial(add, delta)))
        if with_others:
            with adapter.open() as exact:
                undo.callback(put_parameters, model, load_others(model, exact))
        yield


class RightLayers:
    """Outputs of layers that models share, run in the order of their first faulty layer: each starts at that layer.

    Only the outputs of that layer are held, so a fault in layer k costs the layers from k - 1 on.

    Args:
        layers: The layers in order, each a function of the output of the one before it; empty: all layers run.
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        self._layers = layers
        self._shared: object = None
        self._held: tuple[int, list[Any]] = -1, []

    @contextmanager
    def before(self, layer: int, shared: object) -> Iterator[None]:
        """Run the model in the block without the layers whose outputs are known.

        Args:
            layer: Index of the first layer that may have a fault.
            shared: What blocks must have in common to share outputs, such as the name of the model and the sequences.
        """
        last = min(layer, len(self._layers)) - 1
        if last < 0:
            yield
            return
        if shared != self._shared or self._held[0] > last:
            self._shared, self._held = shared, (-1, [])
        outputs: list[Any] = []
        with ExitStack() as changes:
            keep = self._layers[last].register_forward_hook(lambda module, args, output: outputs.append(output))
            changes.enter_context(keep)
            changes.enter_context(_giving(self._layers[: self._held[0] + 1], self._held[1]))
            yield
        self._held = (last, outputs) if outputs else (-1, [])


@contextmanager
def _giving(layers: nn.ModuleList, outputs: Sequence[Any]) -> Iterator[None]:
    """Let layers return the outputs, one for each run of the model, instead of computing them."""
    own = [vars(layer).get("forward") for layer in layers]
    coming = iter(outputs)
    given: Any = None

    def forward(*args: Any, is_first: bool, **kwargs: Any) -> Any:
        nonlocal given
        given = next(coming) if is_first else given
        return given

    for index, layer in enumerate(layers):
        layer.forward = partial(forward, is_first=index == 0)
    try:
        yield
    finally:
        for layer, before in zip(layers, own, strict=True):
            if before is None:
                del layer.forward
            else:
                layer.forward = before
