"""LoRA-Over checkpoints: a PEFT adapter and, beside it, the cores of its matrices.

    adapter_config.json, adapter_model.safetensors   as PEFT writes them
    loraover.json                                    sites, shapes, decomposition, versions, checksums
    loraover.safetensors                             cores, and the optimizer's state of them

A checkpoint whose A and B are not the contraction of its cores is refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from math import inf, log2
from pathlib import Path
from threading import Event
from typing import NamedTuple, final

import numpy as np

from loraover.checkpoint.error_bounds import U64, gamma, smallest_subnormal, unit_roundoff
from loraover.checkpoint.exact_tensors import ExactArray, Factor
from loraover.checkpoint.files import CONFIG_FILE, CORES_FILE, META_FILE, TENSORS_FILE
from loraover.checkpoint.metadata import Meta, SiteRecord, read_metadata
from loraover.checkpoint.peft_adapter import AdapterDir, ExactAdapter, read_adapter_dir, site_key, site_name
from loraover.checkpoint.tensor_file import TensorFile, open_tensors, sha256_of
from loraover.common.arrays import Array, Numbers, as_tensor, calculable, name_of, widened
from loraover.common.errors import CheckpointError, LoraOverError
from loraover.common.paths import kind_of
from loraover.common.request import as_written
from loraover.common.threads import one_thread
from loraover.overparam.decompositions import Decomposition

SEAL_FILE = "complete.json"
"""Marks a Trainer's checkpoint as complete, see `SealCheckpoints`."""
HASHED_LATER = (TENSORS_FILE, CORES_FILE)
SCORE_PREFIX = "score."


@final
@dataclass(frozen=True)
class Checkpoint(AdapterDir):
    """A LoRA-Over checkpoint on disk whose checksums, metadata and layout have been checked.

    `read_checkpoint` makes it; `open_checkpoint` leaves the checksums of the tensors to `check_sum`. Tensors are read
    only when they are asked for, one matrix at a time, so that a large checkpoint needs little memory.

    It extends a class that is not abstract, because its folder is a PEFT adapter, which any reader of adapters can
    take; what it overrides is where exact values come from.

    Args:
        meta: Contents of `loraover.json`.
    """

    meta: Meta = field(kw_only=True)

    @property
    def cores_path(self) -> Path:
        """File that holds the cores."""
        return self.path / CORES_FILE

    @cached_property
    def decomposition(self) -> Decomposition:
        """Decomposition that the cores belong to."""
        return self.meta.config.make_decomposition()

    @cached_property
    def sites(self) -> dict[str, SiteRecord]:
        """Records of the matrices that have cores, by name."""
        return {site.name: site for site in self.meta.sites}

    @property
    def is_run_by_peft(self) -> bool:
        return False

    @contextmanager
    def open(self) -> Iterator[ExactAdapter]:
        """Open the files, to read tensors; a matrix that has cores is their contraction in float64.

        Raises:
            CheckpointError: A file is missing or damaged.
        """
        with open_tensors(self.tensors_path) as plain, open_tensors(self.cores_path) as cores:
            yield ExactCheckpoint(self, plain, cores)

    def check_sum(self, name: str, ending: Event | None = None) -> None:
        """Compare a file's SHA-256 with the one in the metadata; `ending` stops the comparison without a result.

        Raises:
            CheckpointError: The file is damaged, or was changed after training.
        """
        found = sha256_of(self.path / name, ending)
        if found != self.meta.sha256.get(name) and not (ending is not None and ending.is_set()):
            raise CheckpointError(
                f"{self.path / name}: its SHA-256 differs from the one in {META_FILE}; it is damaged or was changed "
                "after training. Copy or save the checkpoint again."
            )

    def read_cores(self, file: TensorFile, site: SiteRecord) -> tuple[Array, ...]:
        """Read the cores of one matrix; core k has shape (1, p_k, q_k) and the checkpoint's `core_dtype`."""
        dtype = self.meta.core_dtype
        cores = []
        for k, shape in enumerate(self.decomposition.of_site(site.name).core_shapes(site.m, site.n)):
            core = file.array(site.core_key(k))
            if core.shape != shape or name_of(core.dtype) != dtype:
                raise CheckpointError(
                    f"{file.path}: {site.core_key(k)} is {name_of(core.dtype)} {core.shape}, expected {dtype} {shape}; "
                    "the file is damaged or belongs to another checkpoint."
                )
            cores.append(core[None])
        return tuple(cores)

    def contract(self, cores: Sequence[Array], site: SiteRecord) -> tuple[Numbers, Magnitude]:
        """Contract the cores of one matrix in float64.

        Returns:
            The contraction (m, n), and the magnitude that scales its error bounds.
        """
        decomposition = self.decomposition.of_site(site.name)
        matrix = decomposition.contract_arrays([widened(core) for core in cores], site.m, site.n)[0]
        return np.ascontiguousarray(matrix), magnitude(decomposition, cores, site.m, site.n)

    def check_stored(self, stored: Array, cores: Sequence[Array], site: SiteRecord) -> tuple[Numbers, Magnitude]:
        """Contract the cores of one matrix, and check that its stored values can be what training wrote.

        Training contracts in the cores' dtype, on any device and in any order, and then casts. The first of these two
        steps changes an element by at most gamma_k(u_core) * |C_1| ... |C_K|, the second by at most u_stored * |M|. A
        device may also set what lies below float32's normal range to zero.

        Args:
            stored: The matrix (m, n) as the adapter's file holds it.
            cores: Cores of the matrix, as `read_cores` returns them.
            site: Record of the matrix.

        Returns:
            What `contract` returns.

        Raises:
            CheckpointError: An element of the stored matrix is further from the contraction than this.
        """
        terms = self.decomposition.of_site(site.name).contraction_terms(site.m, site.n)
        matrix, magnitude = self.contract(cores, site)
        contraction = gamma(terms, unit_roundoff(cores[0].dtype))
        lost = lost_to_underflow(terms, cores) if cores[0].dtype == np.float32 else 0.0
        cast = unit_roundoff(stored.dtype)
        unavoidable = lost * (1 + cast) + smallest_subnormal(stored.dtype)
        excess = calculable(stored) - matrix
        np.abs(excess, out=excess)
        excess -= magnitude.times(contraction * (1 + cast))
        if excess.max() > unavoidable:
            excess -= cast * np.abs(matrix)  # rarely more than the rest
        if excess.max() > unavoidable:
            row, column = divmod(int(excess.argmax()), site.n)
            raise CheckpointError(
                f"{self.tensors_path}: {site_key(site.name)} contradicts its cores: element ({row}, {column}) "
                f"is {widened(stored)[row, column]:.9g}, the cores give {matrix[row, column]:.9g}. A or B was "
                "changed outside the optimizer step; save the checkpoint again."
            )
        return matrix, magnitude


@final
class ExactCheckpoint(ExactAdapter):
    """The open files of a checkpoint; a matrix that has cores is their contraction."""

    def __init__(self, checkpoint: Checkpoint, plain: TensorFile, cores: TensorFile):
        super().__init__(checkpoint, plain)
        self._checkpoint, self._cores = checkpoint, cores

    def array(self, key: str) -> ExactArray:
        site = self._checkpoint.sites.get(site_name(key) or key)
        if site is None:
            return super().array(key)
        checkpoint, stored = self._checkpoint, self.stored(key)
        with one_thread():
            value, magnitude = checkpoint.check_stored(stored, checkpoint.read_cores(self._cores, site), site)
        terms = checkpoint.decomposition.of_site(site.name).contraction_terms(site.m, site.n)
        return ExactArray(value, magnitude.times(gamma(terms, U64)), site)

    def factor(self, name: str) -> Factor:
        site = self._checkpoint.sites.get(name)
        if site is None:
            return super().factor(name)
        cores = tuple(map(as_tensor, self._checkpoint.read_cores(self._cores, site)))
        return Factor(self._checkpoint.decomposition.of_site(name), cores, site.m, site.n)


def read_checkpoint(directory: str | os.PathLike[str]) -> Checkpoint:
    """Open a LoRA-Over checkpoint and check its files.

    Checksums, metadata and the shapes of all tensors are checked now; tensors are read later. `Checkpoint.check_stored`
    then compares a matrix with its cores.

    Args:
        directory: Folder of the checkpoint: the `adapter` folder of `loraover train`, or, after training with
            `LoraOverCallback`, the Trainer's `output_dir` or one of its `checkpoint-N` folders.

    Returns:
        The checked checkpoint.

    Raises:
        CheckpointError: A file is missing, truncated, damaged or of an unknown version, or files contradict one
            another.
    """
    checkpoint = open_checkpoint(directory)
    for name in HASHED_LATER:
        checkpoint.check_sum(name)
    return checkpoint


def open_checkpoint(directory: str | os.PathLike[str]) -> Checkpoint:
    """Open a LoRA-Over checkpoint as `read_checkpoint` does, but without comparing the checksums of its tensors.

    The caller compares them with `check_sum` for each file in HASHED_LATER, beside its work with the tensors, and keeps
    nothing of this work if a file is refused.
    """
    path = Path(directory)
    if kind_of(path) != "folder":
        raise CheckpointError(f"{path}: no such folder; expected a LoRA-Over checkpoint.")
    if kind_of(path / META_FILE) != "file":
        with open_tensors(path / TENSORS_FILE):
            pass
        raise CheckpointError(
            f"{path / META_FILE}: no such file. This folder holds a plain LoRA without the cores of its training, "
            "which can be served as it is, or the saving of a checkpoint was interrupted. After training with "
            "LoraOverCallback, the Trainer's output_dir and its checkpoint-N folders hold cores: name one of those to "
            "fold with a certificate or to resume."
        )
    meta = read_metadata(path / META_FILE)
    adapter = read_adapter_dir(path)
    if adapter.config.base_model_name_or_path != meta.base_model:
        raise CheckpointError(
            f"{path / CONFIG_FILE}: base_model_name_or_path is {adapter.config.base_model_name_or_path!r}, but the "
            f"cores were trained on {meta.base_model!r}; undo the edit and use "
            f"{as_written('model')} to name a copy of that model."
        )
    checkpoint = Checkpoint(adapter.path, adapter.config, adapter.shapes, adapter.stacks, meta=meta)
    _check_layout(checkpoint)
    checkpoint.check_sum(CONFIG_FILE)
    return checkpoint


def _check_layout(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless the files hold the matrix and all cores of every site, in the right shapes."""
    if len(checkpoint.sites) != len(checkpoint.meta.sites):
        raise CheckpointError(f"{checkpoint.path / META_FILE}: sites: a site is listed twice.")
    if not checkpoint.sites and checkpoint.meta.config.schedule != "dynamic":
        raise CheckpointError(
            f"{checkpoint.path / META_FILE}: sites: is empty; only a dynamic schedule may have no sites."
        )
    with open_tensors(checkpoint.cores_path) as file:
        shapes = {key: file.shape(key) for key in file.keys}
    for site in checkpoint.meta.sites:
        key = site_key(site.name)
        if checkpoint.shapes.get(key) != (site.m, site.n):
            found = checkpoint.shapes.get(key, "nothing")
            raise CheckpointError(
                f"{checkpoint.tensors_path}: {key} is {found}, but {META_FILE} gives shape {(site.m, site.n)}."
            )
        try:
            expected = checkpoint.decomposition.of_site(site.name).core_shapes(site.m, site.n)
        except LoraOverError as error:
            raise CheckpointError(f"{checkpoint.path / META_FILE}: {site.name}: {error}") from error
        for k, name in site.shares.items():
            owner, bases = checkpoint.sites.get(name), checkpoint.decomposition.of_site(site.name).bases
            if bases is None or k not in bases.shareable(site.m, site.n):
                reason = f"core {k} cannot be shared"
            elif owner is None:
                reason = f"there is no site {name!r}"
            elif (owner.m, owner.n, owner.step) != (site.m, site.n, site.step):
                reason = f"{name} has another shape or step"
            elif owner.shares.get(k) != name:
                reason = f"{name} does not store core {k} itself"
            else:
                continue
            raise CheckpointError(f"{checkpoint.path / META_FILE}: {site.name}: shares: {reason}; the file is damaged.")
        for k, shape in enumerate(expected):
            if shapes.get(site.core_key(k)) != shape:
                found = shapes.get(site.core_key(k), "missing")
                raise CheckpointError(f"{checkpoint.cores_path}: {site.core_key(k)} is {found}, expected {shape}.")


LARGEST_LOSS = 2.0**-104
"""Loss whose part in a certificate, gamma_k(2^-53) times it, is below half of float32's smallest number, 2^-150."""


class Magnitude(NamedTuple):
    """Upper bounds of |C_1| ... |C_K|, the contraction of a matrix's cores' absolute values: slack (computed + lost).

    Args:
        computed: The contraction (m, n) in float32 or float64.
        slack: 1 + gamma_k(u), by what the contraction and `times` may have rounded away.
        lost: What an element of `computed` may have lost below the normal range.
    """

    computed: Array
    slack: float
    lost: float

    def times(self, factor: float) -> Numbers:
        """Return the bounds multiplied by a number, (m, n) in float64."""
        found: Numbers = np.multiply(self.computed, self.slack * factor, dtype=np.float64)
        if self.lost:
            found += self.slack * factor * self.lost
        return found


def magnitude(decomposition: Decomposition, cores: Sequence[Array], m: int, n: int) -> Magnitude:
    """Bound |C_1| ... |C_K| of the cores (1, p_k, q_k) of one matrix, see `docs/error-bounds.md`.

    It is contracted in the cores' dtype. Cores in float32 that could overflow, or lose more than would be noticed, are
    contracted in float64.
    """
    sizes = [np.abs(core) for core in cores]
    terms = decomposition.contraction_terms(m, n)
    roundoff, lost = unit_roundoff(cores[0].dtype), 0.0
    computed = None
    if cores[0].dtype == np.float32:
        lost = lost_to_underflow(terms, cores)
        if lost <= LARGEST_LOSS:
            with np.errstate(over="ignore"):
                computed = decomposition.contract_arrays(sizes, m, n)
    if computed is None or not np.isfinite(computed.max()):
        roundoff, lost = U64, 0.0
        computed = decomposition.contract_arrays([widened(size) for size in sizes], m, n)
    return Magnitude(computed[0], 1 + gamma(terms + 4, roundoff), lost)  # four more for sums and products of `times`


def lost_to_underflow(terms: int, cores: Sequence[Array]) -> float:
    """Return a bound of what an element of a float32 contraction of k terms can lose below the normal range.

    Each of K cores lies on at most N = (k / (K - 1))^(K - 1) paths to an element, and each product on a path loses at
    most the smallest normal number, times the numbers that follow it on the path.
    """
    products = max(len(cores) - 1, 1)
    exponent = 1 + log2(len(cores)) + products * log2(terms / products) - 126
    exponent += sum(log2(max(1.0, float(core.max()), -float(core.min()))) for core in cores)
    return 2.0**exponent if exponent < 1024 else inf
