"""Tensors of an adapter, each rounded once from its exact value, certified, written and read back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from threading import Event

from torch import Tensor

from loraover.adapters.numerics.matrix_certificate import MatrixCertificate, certify
from loraover.adapters.numerics.rounding import round_tensor
from loraover.checkpoint.exact_tensors import Exact
from loraover.checkpoint.files import TENSORS_FILE
from loraover.checkpoint.peft_adapter import BASE_WEIGHT, AdapterDir, ExactAdapter, pack_stacks, site_name
from loraover.checkpoint.tensor_file import first_difference, save_tensors
from loraover.common.atomic_output import sync
from loraover.common.errors import FoldError
from loraover.common.threads import workers


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
    """Write a safetensors file, and read it back.

    Raises:
        FoldError: The file does not hold the tensors bit for bit.
    """
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
    """Round tensors of an adapter once from their exact values, and certify the A and B matrices.

    Args and errors are those of `write_rounded`.

    Returns:
        The rounded tensors by key, and one certificate for each A and B.
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
