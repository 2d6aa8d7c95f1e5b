"""Correct rounding of float64 to the data types that adapters are stored in, of single tensors and of adapters.

The tensors of an adapter are rounded once from their exact values, certified, written and read back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np

from loraover.adapters.numerics.matrix_certificate import MatrixCertificate, certify
from loraover.checkpoint.error_bounds import format_of
from loraover.checkpoint.exact_tensors import ExactArray
from loraover.checkpoint.files import TENSORS_FILE
from loraover.checkpoint.peft_adapter import BASE_WEIGHT, AdapterDir, ExactAdapter, pack_stacks, site_name
from loraover.checkpoint.tensor_file import first_other, save_arrays
from loraover.common.arrays import BFLOAT16, Array, calculable, is_finite, is_floating, name_of, widened
from loraover.common.atomic_output import sync
from loraover.common.errors import FoldError
from loraover.common.threads import MAX_WORKERS, workers

STORAGE = {"fp32": np.dtype(np.float32), "bf16": BFLOAT16, "fp16": np.dtype(np.float16)}
"""Data types of NumPy by the names that commands use."""

SMALL = 2**15
"""Mean number of elements of matrices that one thread rounds as fast as several.

Between NumPy's calls only one thread runs, so threads mostly wait for one another.
"""


def narrowed(x: Array, dtype: np.dtype[Any]) -> Array:
    """Return a copy in a type as `round_array` does, with infinity for numbers that are too large."""
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype == BFLOAT16:
            return _short_of(x)
        return calculable(x).astype(dtype)


def round_array(x: Array, dtype: np.dtype[Any]) -> Array:
    """Round each element to the nearest number of a type, ties to even; a FoldError names one that is too large.

    NumPy converts float64 to float16 at once; bfloat16 is reached through float32, and so would be rounded twice.
    Rounding to odd at the first step makes the result of the second correct (Boldo and Melquiond 2008,
    doi:10.1109/TC.2007.70819).
    """
    rounded = narrowed(x, dtype)
    if not is_finite(rounded):
        numbers = widened(x)
        if np.isnan(numbers).any():
            raise FoldError("NaN among the elements; the training that made them had diverged.")
        raise FoldError(
            f"an element of {np.abs(numbers).max():.4g} exceeds the largest {name_of(dtype)} number, "
            f"{format_of(dtype).largest:.4g}; a wider type holds it."
        )
    return rounded


def _short_of(x: Array) -> Array:
    """Round to bfloat16, by the bits of float32; NaN and infinity stay no finite numbers."""
    if x.dtype == BFLOAT16:
        return x.copy()
    if x.dtype == np.float16:
        x = widened(x, np.float32)
    nearest = x.astype(np.float32)
    bits = nearest.view(np.uint32)
    if x.dtype == np.float64:
        wide = nearest.astype(np.float64)
        is_inexact = wide != x
        bits -= np.abs(wide) > np.abs(x)  # towards zero, and then odd
        bits |= is_inexact
    even = np.asarray((bits >> 16) & 1)  # of a single number, NumPy makes no array
    even += 0x7FFF
    even += bits
    even >>= 16
    even[np.isnan(nearest)] = 0x7FFF
    return even.astype(np.uint16).view(BFLOAT16)


def round_tensor(key: str, exact: Array, dtype: str) -> Array:
    """Round an array to the nearest numbers of fp32, bf16 or fp16; integers stay unchanged. The key is for messages."""
    if not is_floating(exact) or exact.dtype == STORAGE[dtype]:
        return np.asarray(exact, order="C")
    try:
        return np.asarray(round_array(exact, STORAGE[dtype]), order="C")
    except FoldError as error:
        raise FoldError(f"{key}: {error}") from error


def write_rounded(
    adapter: AdapterDir,
    keys: Iterable[str],
    directory: Path,
    dtype: str,
    *,
    prepare: Callable[[str, ExactArray], ExactArray] = lambda key, exact: exact,
    pack: Callable[[dict[str, Array]], dict[str, Array]] | None = None,
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


def save_and_compare(tensors: dict[str, Array], file: Path) -> None:
    """Write a safetensors file, and read it back; a FoldError if it does not hold the tensors bit for bit."""
    save_arrays(tensors, file)
    with workers() as threads:
        flushed = threads.start(sync, file)  # the disk works while the file is read back
        lost = first_other(file, tensors)
        flushed.result()
    if lost is not None:
        raise not_kept(lost)


def round_exact(
    adapter: AdapterDir,
    keys: Iterable[str],
    dtype: str,
    *,
    prepare: Callable[[str, ExactArray], ExactArray],
    on_tensor: Callable[[int], None],
    beside: Sequence[Callable[[Event], None]] = (),
) -> tuple[dict[str, Array], list[MatrixCertificate]]:
    """Return tensors of an adapter, rounded once from their exact values, and a certificate for each A and B.

    Args and errors are those of `write_rounded`.
    """

    def round_one(opened: ExactAdapter, key: str) -> tuple[Array, MatrixCertificate | None]:
        exact = prepare(key, opened.array(key))
        if key.endswith(BASE_WEIGHT):  # PEFT loads it over the base model's own
            return exact.value, None
        tensor, name = round_tensor(key, exact.value, dtype), site_name(key)
        with np.errstate(all="ignore"):  # what is not finite fails the certificate
            return tensor, None if name is None else certify(name, tensor, exact)

    rounded: dict[str, Array] = {}
    certificates = []
    keys = list(keys)
    are_small = sum(math.prod(adapter.shapes[key]) for key in keys) < SMALL * len(keys)
    with adapter.open() as opened, workers(1 if are_small else MAX_WORKERS) as threads:
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
