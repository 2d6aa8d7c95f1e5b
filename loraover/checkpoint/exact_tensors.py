"""Tensors of an adapter as exactly as its files hold them: contracted from cores if there are any, else as stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from loraover.checkpoint.checkpoint import META_FILE, Checkpoint, SiteRecord, read_checkpoint
from loraover.checkpoint.error_bounds import gamma, unit_roundoff
from loraover.checkpoint.expert_stacks import ExpertWeight
from loraover.checkpoint.peft_adapter import AdapterDir, read_adapter_dir, read_on_base, site_key, site_name
from loraover.checkpoint.tensor_file import TensorFile, open_tensors
from loraover.common.paths import kind_of
from loraover.common.threads import one_thread
from loraover.overparam.decompositions import Decomposition

STACKS = 4
"""Stacks of experts that stay in memory, so that they are not read again for every expert."""


@dataclass(frozen=True)
class Exact:
    """One tensor in float64; a tensor of integers keeps its type.

    Args:
        value: Contraction of the cores, or the stored value, which `tensor` can leave in float32.
        bound: Bound of each element's error: gamma_k(2^-53) |C_1| ... |C_K|, or zero for a stored value.
        site: Record of the matrix if it has cores, else None.
    """

    value: Tensor
    bound: Tensor
    site: SiteRecord | None


@dataclass(frozen=True)
class Factor:
    """One A or B as training held it.

    Args:
        decomposition: Decomposition of its cores; None if it has none.
        cores: Its cores, or the matrix itself if it has none.
        m: Number of rows.
        n: Number of columns.
    """

    decomposition: Decomposition | None
    cores: tuple[Tensor, ...]
    m: int
    n: int


class ExactAdapter:
    """The open files of an adapter, from which tensors are read one at a time.

    Args:
        adapter: Layout of the adapter.
        checkpoint: The checkpoint that holds its cores; None for a plain adapter.
        plain: The adapter's open file.
        cores: The open file of the cores; None for a plain adapter.
    """

    def __init__(self, adapter: AdapterDir, checkpoint: Checkpoint | None, plain: TensorFile, cores: TensorFile | None):
        self.adapter = adapter
        self.plain = plain
        self._checkpoint = checkpoint
        self._cores = cores
        self._stack = lru_cache(maxsize=STACKS)(plain.read)

    def stored(self, key: str) -> Tensor:
        """Return a tensor by its key as the file holds it; the A or B of one expert is taken from its stack.

        Raises:
            CheckpointError: The tensor, or another of its stack, holds NaN or infinity.
        """
        part = self.adapter.parts.get(key)
        return self.plain.read(key) if part is None else part.of(self._stack(part.key)).contiguous()

    def tensor(self, key: str, *, widen: bool = True) -> Exact:
        """Return a tensor by its key in the adapter's file.

        Args:
            key: The key.
            widen: Whether a stored value is converted to float64; else float32 is enough for types that it includes.

        Raises:
            CheckpointError: The tensor holds NaN or infinity, or contradicts its cores.
        """
        stored = self.stored(key)
        checkpoint, site = self._checkpoint, self._site(site_name(key))
        if checkpoint is None or self._cores is None or site is None:
            value = stored
            if stored.is_floating_point():
                value = stored.double() if widen or stored.dtype == torch.float64 else stored.float()
            return Exact(value, value.new_zeros(()).expand_as(value), None)
        with one_thread():
            value, magnitude = checkpoint.check_stored(stored, checkpoint.read_cores(self._cores, site), site)
        terms = checkpoint.decomposition.of_site(site.name).contraction_terms(site.m, site.n)
        return Exact(value, magnitude.mul_(gamma(terms, unit_roundoff(torch.float64))), site)

    def factor(self, name: str) -> Factor:
        """Return a matrix by its site's name, without contracting its cores."""
        checkpoint, site = self._checkpoint, self._site(name)
        if checkpoint is None or self._cores is None or site is None:
            matrix = self.stored(site_key(name))
            m, n = matrix.shape
            return Factor(None, (matrix,), m, n)
        decomposition = checkpoint.decomposition.of_site(site.name)
        return Factor(decomposition, checkpoint.read_cores(self._cores, site), site.m, site.n)

    def _site(self, name: str | None) -> SiteRecord | None:
        return None if self._checkpoint is None or name is None else self._checkpoint.sites.get(name)


def read_source(path: Path) -> Checkpoint | AdapterDir:
    """Read the LoRA-Over checkpoint in a folder, or the plain LoRA adapter if it holds no cores.

    Raises:
        CheckpointError: The folder holds neither, or its files cannot be trusted.
    """
    return read_checkpoint(path) if kind_of(path / META_FILE) is not None else read_adapter_dir(path)


def adapter_of(source: Checkpoint | AdapterDir) -> AdapterDir:
    """Return the adapter of a checkpoint, or the plain adapter itself."""
    return source.adapter if isinstance(source, Checkpoint) else source


def on_base(source: Checkpoint | AdapterDir, weights: Mapping[str, ExpertWeight]) -> Checkpoint | AdapterDir:
    """Return a source whose experts' A take the inputs of a base model; see `read_on_base`.

    Args:
        source: Checkpoint or plain adapter.
        weights: Parameters of the base model's experts, by path.
    """
    adapter = read_on_base(adapter_of(source), weights)
    return replace(source, adapter=adapter) if isinstance(source, Checkpoint) else adapter


@contextmanager
def open_exact(source: Checkpoint | AdapterDir) -> Iterator[ExactAdapter]:
    """Open the files of a checkpoint or a plain adapter.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    adapter = adapter_of(source)
    checkpoint = source if isinstance(source, Checkpoint) else None
    with (
        open_tensors(adapter.tensors_path) as plain,
        nullcontext() if checkpoint is None else open_tensors(checkpoint.cores_path) as cores,
    ):
        yield ExactAdapter(adapter, checkpoint, plain, cores)
