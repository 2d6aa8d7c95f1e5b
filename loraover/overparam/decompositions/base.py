"""Interface of all decompositions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from math import prod
from typing import TYPE_CHECKING, Annotated, Any, cast

from pydantic import ConfigDict, Field, WrapValidator

from loraover.common.arrays import Array
from loraover.common.errors import ShapeError
from loraover.common.later import torch
from loraover.overparam.block_bases import SideBases

if TYPE_CHECKING:
    from torch import Tensor

MAX_CORES = 64


def _as_given(value: Any, check: Callable[[Any], Any]) -> Any:
    check(value)
    return value


Ratio = Annotated[float, Field(strict=True, ge=1, le=1000), WrapValidator(_as_given)]
"""Ratio of sizes. The integer 2 does not become 2.0, since studies identify a decomposition by its `repr`."""


class Decomposition(ABC):
    """Differentiable map from cores to a matrix, batched over G matrices of one shape.

    Each core is kept as a 2-D unfolding, with the batch dimension in front: core k has shape
    (G, *core_shapes(m, n)[k]). Concrete classes are pydantic's frozen dataclasses. Their fields are the options that a
    recipe or a checkpoint gives, and `name`, by which it chooses the class.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    @abstractmethod
    def core_shapes(self, m: int, n: int) -> tuple[tuple[int, int], ...]:
        """Return the 2-D shape of each core of an m x n matrix.

        Raises:
            ShapeError: The options do not fit an m x n matrix.
        """

    @abstractmethod
    def centre(self, m: int, n: int) -> int:
        """Return the index of the centre core, which holds the matrix; the others are auxiliary cores."""

    def of_site(self, name: str) -> Decomposition:
        """Return the decomposition with the options that a site of this name takes."""
        return self

    @property
    def bases(self) -> SideBases | None:
        """The auxiliary cores as orthogonal bases that are measured or follow gradients; None: they are trained."""
        return None

    @property
    def trains_all(self) -> bool:
        """Whether the optimizer steps every core."""
        return self.bases is None or self.bases.are_stepped

    def trained(self, m: int, n: int) -> tuple[int, ...]:
        """Indices of the cores that the optimizer steps; the others are bases."""
        return tuple(range(len(self.core_shapes(m, n)))) if self.trains_all else (self.centre(m, n),)

    def init(self, matrices: Tensor, generators: Sequence[torch.Generator]) -> tuple[Tensor, ...]:
        """Make float64 cores (G, p_k, q_k) whose contraction is `matrices` (G, m, n), up to rounding.

        A zero matrix gets a zero centre core and isometric auxiliary cores, so that the product is zero but the
        centre's gradient is not. Each matrix has a generator of its own, and nothing else is random, so that every
        process and every grouping of the matrices makes the same cores.
        """
        # One by one: a batched factorisation rounds differently, depending on where a matrix lies in memory.
        each = [self.init_one(matrix.clone(), g) for matrix, g in zip(matrices, generators, strict=True)]
        return tuple(torch.stack(cores) for cores in zip(*each, strict=True))

    @abstractmethod
    def init_one(self, matrix: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Make the cores of one matrix (m, n), as `init` does; core k has shape (p_k, q_k)."""

    @abstractmethod
    def contract(self, cores: Sequence[Tensor], m: int, n: int) -> Tensor:
        """Return the matrices (G, m, n) that the cores represent, in the cores' dtype.

        It is written in what tensors and NumPy's arrays have in common.

        Raises:
            ShapeError: A core's shape differs from `core_shapes(m, n)`.
        """

    def contract_arrays(self, cores: Sequence[Array], m: int, n: int) -> Array:
        """Return what `contract` returns, by NumPy."""
        found: Any = self.contract(cast(Any, cores), m, n)
        return cast(Array, found)

    @abstractmethod
    def apply(self, cores: Sequence[Tensor], x: Tensor, m: int, n: int) -> Tensor:
        """Return `x @ matrices.mT`, computed core by core without forming the matrices.

        Args:
            cores: Cores; core k has shape (G, p_k, q_k).
            x: Inputs (G, tokens, n), in the cores' dtype.
            m: Rows of the matrices.
            n: Columns of the matrices.

        Returns:
            Outputs (G, tokens, m).
        """

    def multiplications(self, m: int, n: int, tokens: int) -> int:
        """Number of multiplications that `apply` takes: here one for each token and element of a core."""
        return tokens * sum(prod(shape) for shape in self.core_shapes(m, n))

    @abstractmethod
    def frames(self, cores: Sequence[Tensor], m: int, n: int) -> tuple[Tensor, Tensor]:
        """Contract the auxiliary cores left of the centre core, and those right of it.

        Returns:
            Two tensors, (G, p, b) and (G, d, q). They are isometries when the cores are made: all singular values
            are 1.
        """

    @abstractmethod
    def to_centre(self, cores: Sequence[Tensor], matrices: Tensor, m: int, n: int, *, squared: bool = False) -> Tensor:
        """Convert gradients of the matrices into gradients of the centre core.

        The result is J^T vec(dL/dM), with J = d vec(M) / d vec(centre).

        Args:
            cores: Cores; core k has shape (G, p_k, q_k).
            matrices: Gradients dL/dM (G, m, n), in the cores' dtype.
            m: Rows of the matrices.
            n: Columns of the matrices.
            squared: Whether to square J's elements, which converts variances of independent gradients.

        Returns:
            Gradients (G, p, q), of the centre core's shape.
        """

    @abstractmethod
    def contraction_terms(self, m: int, n: int) -> int:
        """Return the longest chain of rounded operations that leads to one element of the contraction.

        It is the k of the error bound gamma_k = k u / (1 - k u), which multiplies the contraction of the cores'
        absolute values and holds for every order of summation (Higham 2002, Accuracy and Stability of Numerical
        Algorithms, 3.1 and 3.5).
        """

    def num_parameters(self, m: int, n: int) -> int:
        """Number of trained parameters behind one m x n matrix."""
        shapes = self.core_shapes(m, n)
        return sum(prod(shapes[k]) for k in self.trained(m, n))

    def check(self, cores: Sequence[Tensor], m: int, n: int) -> None:
        """Raise ShapeError unless the cores fit an m x n matrix."""
        expected = self.core_shapes(m, n)
        found = tuple(tuple(core.shape[1:]) for core in cores)
        if found != expected:
            raise ShapeError(
                f"{type(self).__name__} cores of a {m} x {n} matrix must have shapes {list(expected)}, "
                f"found {list(found)}."
            )


def random_coisometry(generator: torch.Generator, rows: int, columns: int) -> Tensor:
    """Draw a Haar-distributed float64 matrix P (rows, columns) with P P^T = I from a CPU generator."""
    q, r = torch.linalg.qr(torch.randn(columns, rows, generator=generator, dtype=torch.float64))
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)
    coisometry: Tensor = (q * signs).mT
    return coisometry
