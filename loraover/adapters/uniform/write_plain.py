"""The uniform form of a plain LoRA, written with NumPy where PyTorch is not installed: the same file, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loraover.adapters.numerics.delta import is_power_of_two
from loraover.adapters.numerics.matrix_certificate import Errors, MatrixCertificate, Underflow, certify_parts
from loraover.checkpoint.error_bounds import U64, gamma
from loraover.checkpoint.peft_adapter import AdapterDir, site_name
from loraover.checkpoint.tensor_file import header_of, open_tensors
from loraover.common.atomic_output import sync
from loraover.common.errors import ExportError, FoldError
from loraover.common.extras import install

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class _Storage:
    """A data type that adapters are stored in.

    Args:
        name: Name of it in safetensors files.
        roundoff: Largest relative error of rounding to nearest, u.
        normal: Smallest normal number.
    """

    name: str
    roundoff: float
    normal: float

    @property
    def subnormal(self) -> float:
        """Spacing of the numbers near zero."""
        return self.normal * 2 * self.roundoff


STORAGE = {
    "fp32": _Storage("F32", 2.0**-24, 2.0**-126),
    "bf16": _Storage("BF16", 2.0**-8, 2.0**-126),
    "fp16": _Storage("F16", 2.0**-11, 2.0**-14),
}


def write_plain(
    adapter: AdapterDir, file: Path, dtype: str, on_tensor: Callable[[int], None] = lambda done: None
) -> list[MatrixCertificate]:
    """Write A and B of a plain LoRA with one rank and scaling 1, each rounded once, and certify each matrix.

    Raises:
        CheckpointError: A file that cannot be read, or holds NaN.
        ExportError: An adapter of stacked experts.
        FoldError: An element beyond the range of `dtype`, or a file that does not hold what was written.
    """
    if adapter.stacks:
        raise ExportError(f"{adapter.path}: it adapts stacked experts, which needs PyTorch: {install('torch')}")
    storage, certificates = STORAGE[dtype], []
    written: dict[str, NDArray[np.generic]] = {}
    with open_tensors(adapter.tensors_path) as source:
        for key, (module, side) in adapter.matrices.items():
            stored, scaling = source.numbers(key), module.scaling if side == "B" else 1.0
            exact = stored * scaling
            is_exact = scaling == 0 or (is_power_of_two(scaling) and np.array_equal(exact / scaling, stored))
            bound = np.zeros_like(exact) if is_exact else gamma(1, U64) * np.abs(exact)
            missing = adapter.rank - module.rank
            padding = ((0, missing), (0, 0)) if side == "A" else ((0, 0), (0, missing))
            exact, bound = np.pad(exact, padding), np.pad(bound, padding)
            bits = _rounded(key, exact, dtype)
            errors = _errors(_widened(bits), exact, bound, storage)
            name = site_name(key)
            assert name is not None, "of a key of A or B"
            m, n = exact.shape
            certificates.append(certify_parts(name, (m, n), [errors], over_parameterised=False))
            written[key] = bits
            on_tensor(len(written))
    _save(written, file, storage.name)
    return certificates


def _save(written: dict[str, NDArray[np.generic]], file: Path, dtype: str) -> None:
    """Write a safetensors file in the order of the safetensors library, and read it back."""
    entries = sorted(written.items())
    with file.open("wb") as target:
        target.write(header_of((key, dtype, bits.shape, bits.nbytes) for key, bits in entries))
        target.writelines(np.ascontiguousarray(bits).data.cast("B") for _, bits in entries)
    sync(file)
    with open_tensors(file) as kept:
        lost = next((key for key, bits in entries if kept.bytes(key) != bits.tobytes()), None)
    if lost is not None:
        raise FoldError(f"{lost}: the file does not hold what was written to it; check the disk, or write elsewhere.")


def _rounded(key: str, exact: Numbers, dtype: str) -> NDArray[np.generic]:
    """Round to the nearest numbers of a type, ties to even; those of bf16 are returned as their bits.

    NumPy has no bfloat16. Rounding to odd at float32 makes the second rounding correct (Boldo and Melquiond 2008,
    doi:10.1109/TC.2007.70819).
    """
    with np.errstate(over="ignore"):
        nearest = exact.astype(np.float16 if dtype == "fp16" else np.float32)
    rounded: NDArray[np.generic] = nearest
    if dtype == "bf16":
        wide, bits = nearest.astype(np.float64), nearest.view(np.uint32)
        bits = (bits - (np.abs(wide) > np.abs(exact))) | (wide != exact)
        bits = bits.astype(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    if not np.isfinite(_widened(rounded)).all():
        raise FoldError(
            f"{key}: an element of {np.abs(exact).max():.4g} exceeds the largest {STORAGE[dtype].name} number; a wider "
            "type holds it."
        )
    return rounded


def _widened(rounded: NDArray[np.generic]) -> Numbers:
    if rounded.dtype == np.uint16:
        return (rounded.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return rounded.astype(np.float64)


def _errors(written: Numbers, exact: Numbers, bound: Numbers, storage: _Storage) -> Errors:
    """Measure errors against their bounds: the product's, and one rounding to the storage type."""
    size = np.abs(exact)
    allowed = np.maximum((size + bound) * storage.roundoff, storage.subnormal / 2) + bound
    error = np.abs(written - exact)
    is_zero = written == 0
    lost = Underflow(int((is_zero & (exact != 0)).sum()), int((~is_zero & (np.abs(written) < storage.normal)).sum()))
    norm, error_norm, bound_norm = (float(np.linalg.norm(x)) for x in (exact, error, allowed))
    return Errors(norm, error_norm, bound_norm, float((error / allowed).max(initial=0.0)), lost)
