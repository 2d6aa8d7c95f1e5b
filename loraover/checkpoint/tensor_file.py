"""Safetensors files, read with errors that name the file, the key and what to do."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraover.common.errors import CheckpointError, DivergedError

FLOATS = ("F64", "F32", "F16", "BF16")
INTEGERS = ("I64", "I32", "I16", "I8", "U8", "BOOL")


class NonFiniteError(CheckpointError, DivergedError):
    """A tensor with NaN or infinity in it; the run that wrote it had diverged."""


class TensorFile:
    """An open safetensors file; tensors are read on demand, and only then."""

    def __init__(self, path: Path, handle: Any) -> None:
        self.path = path
        self._handle = handle
        self.keys: dict[str, None] = dict.fromkeys(handle.keys())

    def keys_below(self, prefix: str) -> list[str]:
        return [key for key in self.keys if key.startswith(prefix)]

    def dtype(self, key: str) -> str:
        """As the format spells it, e.g. "F32"."""
        return str(self._slice(key).get_dtype())

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._slice(key).get_shape())

    def read(self, key: str) -> Tensor:
        """One tensor, on the CPU.

        Raises:
            CheckpointError: no such key, or an unusual dtype.
            NonFiniteError: NaN or infinity in it, which is a CheckpointError, too.
        """
        if self.dtype(key) not in (*FLOATS, *INTEGERS):
            raise CheckpointError(f"{self.path}: {key} is {self.dtype(key)}, which adapters do not hold.")
        tensor: Tensor = self._handle.get_tensor(key)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(f"{self.path}: {key} holds NaN or infinity; the run that wrote it had diverged.")
        return tensor

    def _slice(self, key: str) -> Any:
        if key not in self.keys:
            raise CheckpointError(f"{self.path}: no tensor {key!r}; the file is incomplete or belongs elsewhere.")
        return self._handle.get_slice(key)


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """Open a safetensors file.

    Raises:
        CheckpointError: missing, present only as a pickle, truncated or damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        pickles = [p.name for p in path.parent.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
        hint = (
            f" There is {', '.join(sorted(pickles)[:3])}, but pickles can run code and are never read: "
            "save the adapter again with safetensors."
            if pickles
            else " Is this the folder of a checkpoint?"
        )
        raise CheckpointError(f"{path}: no such file.{hint}")
    try:
        path.open("rb").close()  # safetensors takes a file without permission for a missing one
        with safe_open(path, framework="pt") as handle:
            yield TensorFile(path, handle)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error}); copy or save it again.") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}.") from error


def sha256_of(path: Path) -> str:
    """Checksum of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file in one go; callers pair it with `atomic_output`, which names the destination.

    Raises:
        OSError: the disk is full or the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path.name}: {error}") from error
