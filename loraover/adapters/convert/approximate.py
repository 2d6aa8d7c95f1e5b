"""The factors that are written for one module: exact where its rank allows it, else the best of a smaller rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from loraover.adapters.convert.methods.base import LowRank, Place, rounding
from loraover.adapters.convert.report import VllmFit
from loraover.adapters.convert.request import ConvertRequest
from loraover.adapters.convert.source import AdapterLayout
from loraover.adapters.numerics.delta import Delta
from loraover.adapters.numerics.low_rank import SingularValues, decompose, dense_svd, product_norm
from loraover.adapters.uniform.write_lora import Approximation, Work
from loraover.common.errors import ExportError


class FullRankError(ExportError):
    """An adapter that changes a weight by a matrix of full rank, where the exact LoRA was asked for."""


def approximations(
    places: Sequence[Place], layout: AdapterLayout[Any], rank: int | None, ranks: dict[str, int]
) -> Iterator[Work]:
    """Yield the computation of each module's factors, which any thread may run.

    Args:
        places: Modules that the adapter changes.
        layout: The adapter, for messages.
        rank: Largest rank of the result; None means exact.
        ranks: Receives the exact rank of each module, by its path.
    """
    return (partial(_approximate, place, layout, rank, ranks) for place in places)


def _approximate(place: Place, layout: AdapterLayout[Any], rank: int | None, ranks: dict[str, int]) -> Approximation:
    found = place.delta()
    factors = (found.b, found.a) if isinstance(found, LowRank) else (found.value,)
    if not all(bool(torch.isfinite(factor).all()) for factor in factors):
        raise ExportError(f"{layout.tensors_path}: {place.path}: delta_W is not finite; train the adapter again.")
    if isinstance(found, LowRank):
        b, a = found.b, found.a
        noise = found.left_out + rounding(len(b), a.shape[1], len(a)) * float(b.norm()) * float(a.norm())
        if len(a) > min(len(b), a.shape[1]):
            b, a = _square(b @ a)
        norm = product_norm(b, a)
        exact = ranks[place.path] = len(a) if norm else 0
        if rank is not None and exact > rank:
            return _truncated(place, decompose(b, a), rank, noise)
        return _exact(place, b, a, norm, noise)
    norm = float(found.value.norm())
    exact = ranks[place.path] = min(found.value.shape) if norm else 0
    if rank is None and exact:
        raise FullRankError(
            f"{layout.tensors_path}: {place.path}: this {layout.config.peft_type} adapter changes the weight by a "
            f"matrix of full rank, {exact}. Ask for its best approximation of a rank R with "
            f"{ConvertRequest.named('approximate_to_rank')} R; its error is shown. With rank {exact}, "
            f"{VllmFit.of(exact).in_words()}."
        )
    noise = rounding(*found.value.shape) * found.size
    if rank is not None and exact > rank:
        return _truncated(place, dense_svd(found.value), rank, noise)
    return _exact(place, *_square(found.value), norm, noise)


def _exact(place: Place, b: Tensor, a: Tensor, norm: float, noise: float) -> Approximation:
    """Return factors as they are, or of rank 0 if the norm of their product is zero."""
    kept = slice(None) if norm else slice(0)
    delta = Delta.of_factors(place.path, place.embedding, b[:, kept], a[kept])
    return Approximation(delta, norm, arithmetic_bound=noise)


def _square(value: Tensor) -> tuple[Tensor, Tensor]:
    """Return B and A of the smallest rank that any matrix of this shape needs, one of them the identity."""
    m, n = value.shape
    eye = torch.eye(min(m, n), dtype=value.dtype)
    return (value, eye) if n <= m else (eye, value)


def _truncated(place: Place, svd: SingularValues, rank: int, noise: float) -> Approximation:
    kept = svd.truncate(rank)
    return Approximation(kept.delta(place.path, place.embedding), svd.norm, kept.error, kept.bound + noise)
