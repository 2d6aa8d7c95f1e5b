"""What every decomposition supplies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from math import prod
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field, WrapValidator
from torch import Tensor

from loraover.common.errors import ShapeError

MAX_CORES = 64


def _as_given(value: Any, check: Callable[[Any], Any]) -> Any:
    check(value)
    return value


Ratio = Annotated[float, Field(strict=True, ge=1, le=1000), WrapValidator(_as_given)]
"""How much larger; a 2 does not become a 2.0, since a study knows a decomposition by its `repr`."""


class Decomposition(ABC):
    """A differentiable map from cores to a matrix, batched over G matrices of one shape.

    Cores are kept as 2-D unfoldings with the group in front: core k has shape
    (G, *core_shapes(m, n)[k]). Concrete classes are frozen dataclasses of pydantic. Their fields are the
    options that a recipe or a checkpoint names, and `name`, by which it chooses the class.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    @abstractmethod
    def core_shapes(self, m: int, n: int) -> tuple[tuple[int, int], ...]:
        """2-D shape of each core of an m x n matrix.

        Raises:
            ShapeError: the options do not fit an m x n matrix.
        """

    @abstractmethod
    def centre(self, m: int, n: int) -> int:
        """Index of the centre core, the one that holds the matrix; the others are auxiliary."""

    def trained(self, m: int, n: int) -> tuple[int, ...]:
        """Indices of the cores that the optimizer steps; the others follow statistics of the gradients."""
        return tuple(range(len(self.core_shapes(m, n))))

    @property
    def calibrates(self) -> bool:
        """Whether auxiliary cores are measured on calibration batches at injection."""
        return False

    def gauge_numbers(self, m: int, n: int) -> int:
        """Numbers kept for one m x n matrix that are not trained: cores that follow statistics, and these."""
        return 0

    def init(self, matrices: Tensor, generators: Sequence[torch.Generator]) -> tuple[Tensor, ...]:
        """Cores whose contraction is `matrices`, up to rounding.

        A zero matrix gets a zero centre core among isometric auxiliary cores: its product is zero
        and the centre's gradient is not.

        Args:
            matrices: (G, m, n), float64.
            generators: one CPU generator per matrix; they alone decide the random draws, so that
                every process and every grouping of the matrices makes the same cores.

        Returns:
            One (G, p_k, q_k) float64 tensor per core.
        """
        # One by one: batched factorisations round differently with the place of a matrix in memory.
        each = [self.init_one(matrix.clone(), g) for matrix, g in zip(matrices, generators, strict=True)]
        return tuple(torch.stack(cores) for cores in zip(*each, strict=True))

    @abstractmethod
    def init_one(self, matrix: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """`init` of one (m, n) matrix; core k has shape (p_k, q_k)."""

    @abstractmethod
    def contract(self, cores: Sequence[Tensor], m: int, n: int) -> Tensor:
        """The matrices (G, m, n) that the cores represent, in the cores' dtype.

        Raises:
            ShapeError: a core's shape differs from `core_shapes(m, n)`.
        """

    @abstractmethod
    def apply(self, cores: Sequence[Tensor], x: Tensor, m: int, n: int) -> Tensor:
        """`x @ matrices.mT` core by core, never forming the matrices.

        Args:
            cores: core k (G, p_k, q_k).
            x: (G, tokens, n), in the cores' dtype.

        Returns:
            (G, tokens, m).
        """

    @abstractmethod
    def frames(self, cores: Sequence[Tensor], m: int, n: int) -> tuple[Tensor, Tensor]:
        """What the auxiliary cores left and right of the centre contract to.

        Returns:
            (G, p, b) and (G, d, q); isometries at injection, so that all their singular values are 1.
        """

    @abstractmethod
    def to_centre(self, cores: Sequence[Tensor], matrices: Tensor, m: int, n: int, *, squared: bool = False) -> Tensor:
        """The centre core's gradient where dL/dM is `matrices`: J^T vec(M), with J = d vec(M) / d vec(centre).

        Args:
            matrices: (G, m, n), in the cores' dtype.
            squared: use J's elements squared, which turn variances of independent gradients into the centre's.

        Returns:
            (G, p, q), of the centre core's shape.
        """

    @abstractmethod
    def contraction_terms(self, m: int, n: int) -> int:
        """Longest chain of rounded operations behind one element of the contraction.

        The k of the error bound gamma_k = k u / (1 - k u), which multiplies the contraction of the
        cores' absolute values (Higham 2002, Accuracy and Stability of Numerical Algorithms, 3.1 and
        3.5); it holds for every order of summation.
        """

    def num_parameters(self, m: int, n: int) -> int:
        """Trained numbers behind one m x n matrix."""
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
    """Random P with P P^T = I.

    Returns:
        (rows, columns), float64, Haar-distributed; needs columns >= rows.
    """
    q, r = torch.linalg.qr(torch.randn(columns, rows, generator=generator, dtype=torch.float64))
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)
    coisometry: Tensor = (q * signs).mT
    return coisometry
