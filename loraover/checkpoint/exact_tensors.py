"""Every tensor of an adapter as exactly as its files hold it: cores where training left them, else stored values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loraover.checkpoint.checkpoint import META_FILE, Checkpoint, SiteRecord, read_checkpoint
from loraover.checkpoint.error_bounds import gamma, unit_roundoff
from loraover.checkpoint.peft_adapter import AdapterDir, read_adapter_dir, site_key, site_name
from loraover.checkpoint.tensor_file import TensorFile, open_tensors
from loraover.common.threads import one_thread
from loraover.overparam.decompositions import Decomposition


@dataclass(frozen=True)
class Exact:
    """One tensor in float64 (integers as they are).

    Args:
        value: the contraction of the cores, or the stored value.
        bound: of the error of each element: gamma_k(2^-53) |C_1| ... |C_K|, or zero for a stored value.
        site: its record, if it has cores.
    """

    value: Tensor
    bound: Tensor
    site: SiteRecord | None


@dataclass(frozen=True)
class Factor:
    """One A or B of shape (m, n) as training held it: its cores, or itself where `decomposition` is None."""

    decomposition: Decomposition | None
    cores: tuple[Tensor, ...]
    m: int
    n: int


class ExactAdapter:
    """The open files of an adapter; tensors are read on demand."""

    def __init__(self, adapter: AdapterDir, checkpoint: Checkpoint | None, plain: TensorFile, cores: TensorFile | None):
        self.adapter = adapter
        self.plain = plain
        self._checkpoint = checkpoint
        self._cores = cores

    def tensor(self, key: str) -> Exact:
        """A tensor by its key in the adapter's file.

        Raises:
            CheckpointError: NaN, or a stored matrix that contradicts its cores.
        """
        stored = self.plain.read(key)
        checkpoint, site = self._checkpoint, self._site(site_name(key))
        if checkpoint is None or self._cores is None or site is None:
            value = stored.double() if stored.is_floating_point() else stored
            return Exact(value, torch.zeros_like(value), None)
        with one_thread():
            value, magnitude = checkpoint.contract(checkpoint.read_cores(self._cores, site), site)
            checkpoint.check_stored(stored, value, magnitude, site)
        terms = checkpoint.decomposition.contraction_terms(site.m, site.n)
        return Exact(value, gamma(terms, unit_roundoff(torch.float64)) * magnitude, site)

    def factor(self, name: str) -> Factor:
        """A matrix by its site's name, without forming it."""
        checkpoint, site = self._checkpoint, self._site(name)
        if checkpoint is None or self._cores is None or site is None:
            matrix = self.plain.read(site_key(name))
            m, n = matrix.shape
            return Factor(None, (matrix,), m, n)
        return Factor(checkpoint.decomposition, checkpoint.read_cores(self._cores, site), site.m, site.n)

    def _site(self, name: str | None) -> SiteRecord | None:
        return None if self._checkpoint is None or name is None else self._checkpoint.sites.get(name)


def read_source(path: Path) -> Checkpoint | AdapterDir:
    """A LoRA-Over checkpoint where `path` holds one, else a plain LoRA adapter.

    Raises:
        CheckpointError: neither, or files that cannot be trusted.
    """
    return read_checkpoint(path) if (path / META_FILE).exists() else read_adapter_dir(path)


def adapter_of(source: Checkpoint | AdapterDir) -> AdapterDir:
    """The adapter directory of a source."""
    return source.adapter if isinstance(source, Checkpoint) else source


@contextmanager
def open_exact(source: Checkpoint | AdapterDir) -> Iterator[ExactAdapter]:
    """Open the files of a checkpoint or a plain adapter.

    Raises:
        CheckpointError: missing or damaged.
    """
    adapter = adapter_of(source)
    checkpoint = source if isinstance(source, Checkpoint) else None
    with (
        open_tensors(adapter.tensors_path) as plain,
        nullcontext() if checkpoint is None else open_tensors(checkpoint.cores_path) as cores,
    ):
        yield ExactAdapter(adapter, checkpoint, plain, cores)
