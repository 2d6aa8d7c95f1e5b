"""Correct rounding of float64 to the data types that adapters are stored in, of single tensors and of adapters.

The tensors of an adapter are rounded once from their exact values, certified, written and read back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from threading import Event

import torch
from torch import Tensor

from loraover.adapters.numerics.matrix_certificate import MatrixCertificate, certify
from loraover.checkpoint.exact_tensors import Exact
from loraover.checkpoint.files import TENSORS_FILE
from loraover.checkpoint.peft_adapter import BASE_WEIGHT, AdapterDir, ExactAdapter, pack_stacks, site_name
from loraover.checkpoint.tensor_file import first_difference, is_finite, save_tensors
from loraover.common.atomic_output import sync
from loraover.common.errors import FoldError
from loraover.common.threads import workers

STORAGE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def round_nearest(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round each element to the nearest number of `dtype`, ties to even; a FoldError names one that is too large.

    PyTorch converts float64 to bfloat16 and float16 through float32, and so rounds twice. Rounding to odd at the first
    step makes the result of the second correct (Boldo and Melquiond 2008, doi:10.1109/TC.2007.70819).
    """
    is_direct = x.dtype != torch.float64 or dtype in (torch.float32, torch.float64)
    rounded = (x if is_direct else _round_to_odd(x)).to(dtype, copy=True)
    if not is_finite(rounded):
        if bool(torch.isnan(x).any()):
            raise FoldError("NaN among the elements; the training that made them had diverged.")
        raise FoldError(
            f"an element of {x.abs().max():.4g} exceeds the largest {str(dtype).removeprefix('torch.')} number, "
            f"{torch.finfo(dtype).max:.4g}; a wider type holds it."
        )
    return rounded


def round_randomly(x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Round each float64 element at random to one of the two numbers of `dtype` around it, the nearer more often.

    The error has no bias, and on average twice the variance of `round_nearest`'s.
    """
    nearest = round_nearest(x, dtype)
    error = x - nearest.double()
    towards = torch.where(error > 0, torch.inf, -torch.inf).to(dtype)
    other = torch.nextafter(nearest, towards)
    gap = (other.double() - nearest.double()).abs()
    chance = torch.where(gap > 0, error.abs() / gap.clamp_min(5e-324), 0.0)
    draw = torch.rand(x.shape, generator=generator, dtype=torch.float64)
    return torch.where(draw < chance, other, nearest)


def _round_to_odd(x: Tensor) -> Tensor:
    """Round to float32 towards zero, and set the last bit where that was inexact."""
    nearest = x.to(torch.float32)
    wide = nearest.double()
    bits = nearest.view(torch.int32)
    inexact = wide != x
    bits.sub_((wide.abs_() > x.abs()).to(torch.int32)).bitwise_or_(inexact)
    return nearest


def round_tensor(key: str, exact: Tensor, dtype: str) -> Tensor:
    """Round a tensor to the nearest numbers of fp32, bf16 or fp16; integers stay unchanged. The key is for messages."""
    if not exact.is_floating_point() or exact.dtype == STORAGE_DTYPES[dtype]:
        return exact.contiguous()
    try:
        return round_nearest(exact, STORAGE_DTYPES[dtype]).contiguous()
    except FoldError as error:
        raise FoldError(f"{key}: {error}") from error


def write_rounded(
    adapter: AdapterDir,
    keys: Iterable[str],
    directory: Path,
    dtype: str,
    *,
    prepare: Callable[[str, Exact], Exact] = lambda key, exact: exact,
    pack: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
    on_tensor: Callable[[int], None] = lambda done: None,
    beside: Sequence[Callable[[Event], None]] = (),
) -> list[MatrixCertificate]:
    """Write tensors of an adapter, each rounded once from its exact value, and certify the A and B matrices.

    Copies of the base model's frozen weights keep their type.

    Args:
        adapter: The adapter that holds the exact values.
        keys: Keys of the tensors, in the order of the certificates.
        directory: An empty folder.
        dtype: Data type to store: fp32, bf16 or fp16.
        prepare: Change of an exact tensor before the rounding; returns it with the bound of its new error. Several
            threads call it.
        pack: Change of the rounded tensors to those of the file; None means PEFT's stacks of experts.
        on_tensor: Called with the number of tensors so far.
        beside: Functions to run at the same time, such as the comparison of checksums. What one of them raises is
            raised before any other error. Each is given an event that is set when it should stop.

    Returns and raises as `write_folded` does.
    """
    rounded, certificates = round_exact(adapter, keys, dtype, prepare=prepare, on_tensor=on_tensor, beside=beside)
    save_and_compare(pack_stacks(adapter.stacks, rounded) if pack is None else pack(rounded), directory / TENSORS_FILE)
    return certificates


def save_and_compare(tensors: dict[str, Tensor], file: Path) -> None:
    """Write a safetensors file, and read it back; a FoldError if it does not hold the tensors bit for bit."""
    save_tensors(tensors, file)
    with workers() as threads:
        flushed = threads.start(sync, file)  # the disk works while the file is read back
        lost = first_difference(file, tensors)
        flushed.result()
    if lost is not None:
        raise not_kept(lost)


def round_exact(
    adapter: AdapterDir,
    keys: Iterable[str],
    dtype: str,
    *,
    prepare: Callable[[str, Exact], Exact],
    on_tensor: Callable[[int], None],
    beside: Sequence[Callable[[Event], None]] = (),
) -> tuple[dict[str, Tensor], list[MatrixCertificate]]:
    """Return tensors of an adapter, rounded once from their exact values, and a certificate for each A and B.

    Args and errors are those of `write_rounded`.
    """

    def round_one(opened: ExactAdapter, key: str) -> tuple[Tensor, MatrixCertificate | None]:
        exact = prepare(key, opened.tensor(key, widen=False))
        if key.endswith(BASE_WEIGHT):  # PEFT loads it over the base model's own
            return exact.value, None
        tensor, name = round_tensor(key, exact.value, dtype), site_name(key)
        return tensor, None if name is None else certify(name, tensor, exact)

    rounded: dict[str, Tensor] = {}
    certificates = []
    with adapter.open() as opened, workers() as threads:
        others = [threads.start(function, threads.ending) for function in beside]
        folds = {key: threads.start(round_one, opened, key) for key in keys}
        try:
            for key, fold in folds.items():
                rounded[key], certificate = fold.result()
                certificates += [] if certificate is None else [certificate]
                on_tensor(len(rounded))
        except Exception:
            _wait(others)  # a damaged file explains every other error
            raise
        _wait(others)
    return rounded, certificates


def _wait(futures: Iterable[Future[None]]) -> None:
    """Wait until functions have ended, and raise what the first of them has raised."""
    for future in futures:
        future.result()


def not_kept(name: str) -> FoldError:
    """Return the error for a tensor or field that a file does not hold as it was written."""
    return FoldError(f"{name}: the file does not hold what was written to it; check the disk, or write elsewhere.")
