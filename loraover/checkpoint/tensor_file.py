"""Safetensors files, read with errors that name the file and the key, and say what to do."""

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
    """A tensor that holds NaN or infinity, because the run that wrote it had diverged."""


class TensorFile:
    """An open safetensors file, whose tensors are read only when they are asked for.

    Attributes:
        path: The file.
        keys: Keys of its tensors, in order.
    """

    def __init__(self, path: Path, handle: Any) -> None:
        self.path = path
        self._handle = handle
        self.keys: dict[str, None] = dict.fromkeys(handle.keys())

    def keys_below(self, prefix: str) -> list[str]:
        """Return the keys that begin with a prefix."""
        return [key for key in self.keys if key.startswith(prefix)]

    def dtype(self, key: str) -> str:
        """Return a tensor's dtype as safetensors spells it, e.g. "F32"."""
        return str(self._slice(key).get_dtype())

    def shape(self, key: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return tuple(self._slice(key).get_shape())

    def read(self, key: str) -> Tensor:
        """Read one tensor, onto the CPU.

        Raises:
            CheckpointError: The file has no such key, or the tensor has a dtype that adapters do not use.
            NonFiniteError: The tensor holds NaN or infinity. It is also a CheckpointError.
        """
        if self.dtype(key) not in (*FLOATS, *INTEGERS):
            raise CheckpointError(f"{self.path}: {key} is {self.dtype(key)}, which adapters do not hold.")
        tensor: Tensor = self._handle.get_tensor(key)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(f"{self.path}: {key} holds NaN or infinity; the run that wrote it had diverged.")
        return tensor

    def _slice(self, key: str) -> Any:
        if key not in self.keys:
            raise CheckpointError(f"{self.path}: no tensor {key!r}; the file is incomplete or of another checkpoint.")
        return self._handle.get_slice(key)


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """Open a safetensors file.

    Raises:
        CheckpointError: The file is missing (perhaps there is a pickle instead), truncated or damaged.
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
        raise CheckpointError(f"{path}: not a complete safetensors file ({error}); copy or save it again.") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}.") from error


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: tuple[str, str] = ("format", "pt")) -> None:
    """Write a safetensors file; callers use it through `atomic_output`, whose errors name the destination.

    Args:
        tensors: Tensors by key.
        path: The file to write.
        metadata: Key and value of its metadata. safetensors 0.8 writes several in random order.

    Raises:
        OSError: The disk is full or the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata=dict([metadata]))
    except SafetensorError as error:
        raise OSError(f"{path.name}: {error}") from error
