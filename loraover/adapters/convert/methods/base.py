"""Port of the kinds of adapters: tensors, fields of the configuration, and the delta of a module."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Generic

from loraover.adapters.convert.source import Adapter, Config, Module
from loraover.adapters.uniform.refusals import TRAINING_ONLY, VARIANTS
from loraover.checkpoint.error_bounds import U64, gamma
from loraover.common.later import torch

if TYPE_CHECKING:
    from torch import Tensor

INERT = TRAINING_ONLY | {
    *("init_weights", "module_dropout", "rank_dropout", "rank_dropout_scale"),
    *("layers_pattern", "progressbar", "random_seed"),
}
"""Fields of many methods that have no effect once an adapter is trained."""

OTHER_KINDS = VARIANTS | {
    "trainable_token_indices": "an adapter with single trained tokens, which are converted beside a LoRA only",
    "use_dora": "a DoRA of another kind than LoRA",
}
"""Descriptions of fields that make an adapter another kind, which is refused."""


ROUNDINGS = 16
"""Most roundings of float64 on the way to an element of delta_W, in units of the sum of its dimensions and rank."""


def rounding(*lengths: int) -> float:
    """Return a bound of the rounding in a matrix, in units of the norm of all that is added up in it."""
    return gamma(ROUNDINGS * sum(lengths), U64)


@dataclass(frozen=True)
class LowRank:
    """delta_W = b @ a, in float64.

    Args:
        b: Left factor, (out_features, k).
        a: Right factor, (k, in_features).
        left_out: Bound of the Frobenius norm of what the factors do not hold of delta_W: parts that were rounded away,
            or that depend on the machine on which PEFT computes them.
    """

    b: Tensor
    a: Tensor
    left_out: float = 0.0

    def transposed(self) -> LowRank:
        """Return the transposed matrix."""
        return LowRank(self.a.mT.contiguous(), self.b.mT.contiguous(), self.left_out)


@dataclass(frozen=True)
class Dense:
    """delta_W as a float64 matrix, in general of full rank, and the norm of operands that cancel in it, or 0."""

    value: Tensor
    operands: float = 0.0

    @property
    def size(self) -> float:
        """Frobenius norm by which its rounding is measured."""
        return 2 * self.operands + float(self.value.norm())


@dataclass(frozen=True)
class Place:
    """A module of the base model that an adapter changes; delta_W of an embedding has shape (dimension, tokens)."""

    path: str
    embedding: bool
    delta: Callable[[], LowRank | Dense]


class ConversionMethod(ABC, Generic[Config]):
    """Kind of adapter.

    Attributes:
        config: Class of its configuration.
        tensors: Names of the tensors of a module.
        shared: Names of the tensors that belong to all modules.
        inert: Fields of the configuration that have no effect once the adapter is trained, besides `INERT`.
        rank: Rank of delta_W in words, for documentation.
        needs_weights: Whether delta_W depends on the base model's weights.
        embeddings: Whether it also adapts embeddings.
        starts_in_stored: Whether PEFT starts it from base weights in the data type that it loads them in, so that
            delta_W is that of a base model that is loaded in the data type of its files.
    """

    config: type[Config]
    tensors: ClassVar[tuple[str, ...]]
    shared: ClassVar[tuple[str, ...]] = ()
    inert: ClassVar[frozenset[str]] = frozenset()
    rank: ClassVar[str]
    needs_weights: ClassVar[bool] = False
    embeddings: ClassVar[bool] = False
    starts_in_stored: ClassVar[bool] = False

    def reads_weights(self, config: Config) -> bool:
        """Return whether delta_W of an adapter with this configuration depends on the base model's weights."""
        return self.needs_weights

    def is_exact(self, config: Config) -> bool:
        """Return whether the configuration gives delta_W a low rank, so that a LoRA can hold it exactly."""
        return not self.rank.startswith("full")

    def named(self, adapter: Adapter[Config]) -> list[str]:
        """Return the adapted modules that the configuration has to name as its target modules."""
        return list(adapter.layout.modules)

    def places(self, adapter: Adapter[Config]) -> Iterator[Place]:
        """Yield the modules of the base model whose weights the adapter changes."""
        for path in adapter.layout.modules:
            yield from self.place(adapter, path)

    def place(self, adapter: Adapter[Config], path: str) -> Iterator[Place]:
        """Yield one adapted module with the result of `delta`."""
        module = adapter.module(path)
        if module.is_embedding and not self.embeddings:
            raise module.refuse("it is an embedding, which is converted for LoRA and trained tokens only.")
        yield Place(path, module.is_embedding, partial(self.delta, module))

    def trained_tokens(self, config: Config) -> set[int]:
        """Return the tokens that were trained alone, which a check has to run on."""
        return set()

    @abstractmethod
    def delta(self, module: Module[Config]) -> LowRank | Dense:
        """Return what the adapter adds to the weight of a module.

        Raises:
            CheckpointError: Tensors that are missing, or contradict one another.
            ExportError: An adapter that changes more than the weight, or depends on what its files do not hold.
        """


AnyMethod = ConversionMethod[Any]


@dataclass(frozen=True)
class Refused:
    """A kind that changes no weights, or not by its files alone, and why; the reason follows "a NAME adapter"."""

    reason: str


def block_diag(blocks: Iterable[Tensor]) -> Tensor:
    """Return the matrix that has some matrices on its diagonal, and zeros elsewhere."""
    found: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return found
