"""Contract the cores of a checkpoint into a plain LoRA adapter, and measure what was written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from loraover.adapter_dir import CONFIG_FILE, TENSORS_FILE, site_name
from loraover.checkpoint import Checkpoint, SiteRecord
from loraover.error_bounds import gamma, smallest_subnormal, unit_roundoff
from loraover.errors import FoldError
from loraover.tensor_file import TensorFile, open_tensors, save_tensors
from loraover_export.certificate import MatrixCertificate
from loraover_export.rounding import STORAGE_DTYPES, round_nearest, underflow

Progress = Callable[[], None]


def write_folded(checkpoint: Checkpoint, directory: Path, dtype: str, on_matrix: Progress = lambda: None) -> None:
    """Write the folded adapter: a PEFT directory in which nothing tells of LoRA-Over.

    Each over-parameterised matrix is the float64 contraction of its cores, rounded once to `dtype`; every
    other floating-point tensor is rounded from its stored value.

    Args:
        checkpoint: read site by site; only the folded tensors are held in memory.
        directory: an empty folder.
        dtype: fp32, bf16 or fp16.
        on_matrix: called after each tensor.
    Raises:
        CheckpointError: cores with NaN, or a stored matrix that contradicts its cores.
        FoldError: an element beyond the range of `dtype`.
        OutputError: the folder cannot be written.
    """
    folded: dict[str, Tensor] = {}
    with open_tensors(checkpoint.cores_path) as cores, open_tensors(checkpoint.adapter.tensors_path) as plain:
        for key in plain.keys:
            exact, _, _ = exact_matrix(checkpoint, key, cores, plain, check_stored=True)
            try:
                folded[key] = round_nearest(exact, STORAGE_DTYPES[dtype]) if exact.is_floating_point() else exact
            except FoldError as error:
                raise FoldError(f"{key}: {error}") from error
            on_matrix()
    save_tensors(folded, directory / TENSORS_FILE)
    config = json.loads((checkpoint.path / CONFIG_FILE).read_bytes())
    config["inference_mode"] = True
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def certify_matrices(
    checkpoint: Checkpoint, directory: Path, on_matrix: Progress = lambda: None
) -> list[MatrixCertificate]:
    """Read the written adapter back and compare every A and B with the cores.

    The bound is derived element by element: gamma_k(2^-53) |C_1| ... |C_K| for the float64 contraction, plus
    u |M| for the one rounding to the storage type, or half a subnormal where the type ends.

    Returns:
        One certificate per matrix, in file order.
    """
    by_key = {key: name for name, key in checkpoint.adapter.sites.items()}
    certificates = []
    with (
        open_tensors(checkpoint.cores_path) as cores,
        open_tensors(checkpoint.adapter.tensors_path) as plain,
        open_tensors(directory / TENSORS_FILE) as written,
    ):
        for key, name in by_key.items():
            exact, magnitude, site = exact_matrix(checkpoint, key, cores, plain, check_stored=False)
            certificates.append(_certify(name, written.read(key), exact, magnitude, checkpoint, site))
            on_matrix()
    return certificates


def exact_matrix(
    checkpoint: Checkpoint, key: str, cores: TensorFile, plain: TensorFile, *, check_stored: bool
) -> tuple[Tensor, Tensor, SiteRecord | None]:
    """One tensor of the adapter in float64, the magnitude of its contraction, and its site if it has cores."""
    site = checkpoint.sites.get(site_name(key) or "")
    if site is None:
        stored = plain.read(key)
        exact = stored.double() if stored.is_floating_point() else stored
        return exact, torch.zeros_like(exact), None
    exact, magnitude = checkpoint.contract(checkpoint.read_cores(cores, site), site)
    if check_stored:
        checkpoint.check_stored(plain.read(key), exact, magnitude, site)
    return exact, magnitude, site


def _certify(
    name: str, written: Tensor, exact: Tensor, magnitude: Tensor, checkpoint: Checkpoint, site: SiteRecord | None
) -> MatrixCertificate:
    terms = 0 if site is None else checkpoint.decomposition.contraction_terms(site.m, site.n)
    contraction = gamma(terms, unit_roundoff(torch.float64)) * magnitude
    tiny = smallest_subnormal(written.dtype) / 2
    bound = contraction + (unit_roundoff(written.dtype) * (exact.abs() + contraction)).clamp_min(tiny)
    error = (written.double() - exact).abs()
    norm = float(exact.norm()) or 1.0
    lost = underflow(exact, written)
    m, n = exact.shape
    return MatrixCertificate(
        name=name,
        shape=(m, n),
        over_parameterised=site is not None,
        relative_error=float(error.norm()) / norm,
        relative_bound=float(bound.norm()) / norm,
        worst_to_bound=float((error / bound).max()),
        flushed_to_zero=lost.to_zero,
        subnormal=lost.to_subnormal,
    )
