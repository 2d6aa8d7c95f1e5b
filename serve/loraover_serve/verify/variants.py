"""The base model in PyTorch with a changed adapter, or with coarser numbers, as a fault of an engine computes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from loraover.checkpoint.checkpoint import Checkpoint
from loraover.checkpoint.exact_tensors import adapter_of, open_exact
from loraover.checkpoint.peft_adapter import AdapterDir
from loraover.checkpoint.unfolded_model import load_others, put_parameters, target_module
from loraover.models.load import ModelSource, load_model
from loraover_export.numerics.delta import read_deltas
from loraover_serve.engines.torch import model_logits
from loraover_serve.verify.answers import Expected, Question, window_rows

Round = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LowRank:
    """delta_W = B @ A of one module in float32, with the scaling in B.

    Args:
        a: A, (r, in_features); for an embedding one column for each token.
        b: scaling * B, (out_features, r).
        scaling: the scaling.
        is_embedding: whether the module is an embedding.
    """

    a: Tensor
    b: Tensor
    scaling: float
    is_embedding: bool = False

    def times(self, factor: float) -> LowRank:
        """The delta, multiplied by a factor."""
        return LowRank(self.a, self.b * factor, self.scaling, self.is_embedding)


Deltas = Mapping[str, LowRank]


@dataclass(frozen=True)
class Format:
    """A coarser number format.

    Args:
        weights: rounding of a weight matrix.
        outputs: rounding of each layer's outputs; None if only weights are rounded.
    """

    weights: Round
    outputs: Round | None = None


def _cast(dtype: torch.dtype) -> Round:
    return lambda x: x.to(dtype).to(x.dtype)


def _levels(largest: int, block: int | None) -> Round:
    """Rounding to whole multiples of a scale, one for each row, or for each block of so many elements of a row."""

    def round_(x: Tensor) -> Tensor:
        width = x.shape[-1]
        size = block or width
        blocks = nn.functional.pad(x, (0, -width % size)).reshape(*x.shape[:-1], -1, size)
        scale = blocks.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny) / largest
        return ((blocks / scale).round() * scale).flatten(-2)[..., :width].contiguous()

    return round_


FORMATS = {
    "fp16": Format(_cast(torch.float16), _cast(torch.float16)),
    "bf16": Format(_cast(torch.bfloat16), _cast(torch.bfloat16)),
    "int8": Format(_levels(127, None)),
    "int4": Format(_levels(7, 32)),
}
"""Number formats from fine to coarse: the floating-point ones round weights and layers' outputs, the others weights."""


def read_lora(source: Checkpoint | AdapterDir) -> dict[str, LowRank]:
    """The delta of every adapted module, by the module's path.

    Raises:
        ExportError: a LoRA with a bias.
    """
    config = adapter_of(source).config
    return {
        delta.module: LowRank(
            delta.a.value.float(), delta.b.value.float(), config.scaling(delta.module), delta.embedding
        )
        for delta in read_deltas(source)
    }


class Variants:
    """The base model, loaded when it is first needed, and run with changed adapters.

    Args:
        source: the checkpoint or adapter.
        base: the base model.
        device: device to run on.
        questions: tokens after which next tokens are compared.
    """

    def __init__(
        self, source: Checkpoint | AdapterDir, base: ModelSource, device: str, questions: Sequence[Question]
    ) -> None:
        self._source, self._base, self._device, self._questions = source, base, device, questions

    @cached_property
    def model(self) -> Any:
        """The base model."""
        return load_model(self._base, device=self._device)

    def adapted(self, deltas: Deltas, *, with_others: bool = True) -> Expected:
        """Logprobs of the base model with these deltas.

        Args:
            deltas: deltas by the paths of their modules.
            with_others: whether the adapter's fully trained parameters (`modules_to_save`) replace the base model's.
        """
        with _adding(self.model, deltas, adapter_of(self._source)), self._others(with_others):
            return self._run()

    def rounded(self, format_: Format) -> Expected:
        """Logprobs of the base model in a coarser number format."""
        with _rounding(self.model, format_):
            return self._run()

    @contextmanager
    def _others(self, are_used: bool) -> Iterator[None]:
        if not are_used:
            yield
            return
        with open_exact(self._source) as exact:
            saved = load_others(self.model, adapter_of(self._source), exact.plain)
        try:
            yield
        finally:
            put_parameters(self.model, saved)

    @torch.inference_mode()
    def _run(self) -> Expected:
        return Expected(
            [
                row
                for index, question in enumerate(self._questions)
                for row in window_rows(index, question, model_logits(self.model, question.tokens))
            ]
        )


@contextmanager
def _adding(model: nn.Module, deltas: Deltas, adapter: AdapterDir) -> Iterator[None]:
    handles = []
    try:
        for module, delta in deltas.items():
            target = target_module(model, module, delta.a.shape[1], delta.b.shape[0], adapter)
            handles.append(target.register_forward_hook(_adder(delta)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adder(delta: LowRank) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        a, b = delta.a.to(output), delta.b.to(output)
        if delta.is_embedding:
            scale = getattr(module, "embed_scale", 1.0)  # Gemma scales its embeddings inside the module
            return output + scale * (nn.functional.embedding(args[0], a.mT) @ b.mT)
        return output + (args[0] @ a.mT) @ b.mT

    return hook


@contextmanager
def _rounding(model: nn.Module, format_: Format) -> Iterator[None]:
    """Round each layer's weights while the layer runs, so that one rounded layer at a time is in memory."""
    handles = []
    exact: dict[nn.Module, nn.Parameter] = {}

    def before(module: Any, args: tuple[Any, ...]) -> None:
        exact[module] = module.weight
        module.weight = nn.Parameter(format_.weights(module.weight), requires_grad=False)

    def after(module: Any, args: tuple[Any, ...], output: Any) -> Any:
        module.weight = exact.pop(module)
        return output if format_.outputs is None else format_.outputs(output)

    try:
        for module in model.modules():
            if isinstance(getattr(module, "weight", None), nn.Parameter):
                handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, weight in exact.items():
            module.register_parameter("weight", weight)
