"""Safetensors files, read with errors that name the file and the key, and say what to do."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from loraover.common import arrays
from loraover.common.arrays import Array
from loraover.common.errors import CheckpointError, DivergedError
from loraover.common.paths import one_below

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
INTEGERS = {"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}
"""PyTorch's names of data types, by those of safetensors. PyTorch is imported where tensors are read: it takes seconds,
and a look at the headers does not need it."""
HASHED_AT_ONCE = 2**20  # bytes
COPIED_AT_ONCE = 2**24  # bytes
SHORT_BYTES = 2
READ_AT_ONCE = 2**30  # bytes; not every system reads 2 GiB at once
ALIGNMENT = 8
"""Bytes to whose multiple a header is padded, as the safetensors library does."""


class NonFiniteError(CheckpointError, DivergedError):
    """A tensor that holds NaN or infinity, because the run that wrote it had diverged."""


class TensorFile:
    """An open safetensors file, whose tensors are read only when they are asked for, by any thread.

    A tensor is copied from the file. Mapped into memory, its pages would count as this process's until the file is
    closed.

    Args:
        path: The file.
        file: The file, open for reading.
        header: Its header, which the safetensors library has checked: dtype, shape and place of each tensor.
        start: Place of the first tensor in the file, in bytes.

    Attributes:
        path: The file.
        keys: Keys of its tensors, in order.
    """

    def __init__(self, path: Path, file: BinaryIO, header: dict[str, Any], start: int) -> None:
        self.path = path
        self.keys: dict[str, None] = dict.fromkeys(sorted(header, key=lambda key: header[key]["data_offsets"]))
        self._file, self._header, self._start = file, header, start

    def keys_below(self, prefix: str) -> list[str]:
        """Return the keys that begin with a prefix."""
        return [key for key in self.keys if key.startswith(prefix)]

    def renamed(self, keys: Mapping[str, str]) -> TensorFile:
        """Return the same open file, with other keys for some of its tensors: new keys by those in the file."""
        header = {keys.get(key, key): entry for key, entry in self._header.items()}
        return TensorFile(self.path, self._file, header, self._start)

    def dtype(self, key: str) -> str:
        """Return a tensor's dtype as safetensors spells it, e.g. "F32"."""
        return str(self._entry(key)["dtype"])

    def shape(self, key: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return tuple(self._entry(key)["shape"])

    def size(self, key: str) -> int:
        """Return a tensor's size in the file, in bytes."""
        begin, end = self._place(key)
        return end - begin

    def read(self, key: str) -> Tensor:
        """Read one tensor, onto the CPU.

        Raises:
            CheckpointError: The file has no such key, or the tensor has a dtype that adapters do not use.
            NonFiniteError: The tensor holds NaN or infinity. It is also a CheckpointError.
        """
        tensor = self._stored(key)
        if not is_finite(tensor):
            raise self._not_finite(key)
        return tensor

    def array(self, key: str) -> Array:
        """Read one tensor into a NumPy array of its own type, without PyTorch.

        Raises:
            CheckpointError: The file has no such key, or the tensor has a dtype that adapters do not use.
            NonFiniteError: The tensor holds NaN or infinity. It is also a CheckpointError.
        """
        found = self._array(key)
        if not arrays.is_finite(found):
            raise self._not_finite(key)
        return found

    def holds_array(self, key: str, array: Array) -> bool:
        """Whether the file holds an array under a key bit for bit."""
        return key in self.keys and arrays.have_same_bits(self._array(key), array)

    def holds(self, key: str, tensor: Tensor) -> bool:
        """Whether the file holds a tensor under a key bit for bit."""
        return key in self.keys and have_same_bits(self._stored(key), tensor)

    def _array(self, key: str) -> Array:
        self._check_dtype(key)
        found: Array = np.empty(self.shape(key), dtype=arrays.DTYPES[self.dtype(key)])
        data: Any = found.reshape(-1).view(np.uint8)
        self._fill(memoryview(data), self._place(key)[0])
        return found

    def _check_dtype(self, key: str) -> None:
        if self.dtype(key) not in arrays.DTYPES:
            raise CheckpointError(f"{self.path}: {key} is {self.dtype(key)}, which adapters do not hold.")

    def _stored(self, key: str) -> Tensor:
        import torch

        self._check_dtype(key)
        tensor = torch.empty(self.shape(key), dtype=torch_dtype(self.dtype(key)))
        data: Any = tensor.reshape(-1).view(torch.uint8).numpy()
        self._fill(memoryview(data), self._place(key)[0])
        return tensor

    def bytes(self, key: str) -> bytearray:
        """Return a tensor's bytes, of any dtype and any values."""
        data = bytearray(self.size(key))
        self._fill(memoryview(data), self._place(key)[0])
        return data

    def part(self, key: str, start: int, size: int, room: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
        """Return some of a tensor's bytes, of any dtype and any values: `size` of them, from the byte `start` on.

        They are written into the first bytes of `room`, or into new memory if it is None.
        """
        data: Any = np.empty(size, dtype=np.uint8) if room is None else room[:size]
        self._fill(memoryview(data), self._place(key)[0] + start)
        found: NDArray[np.uint8] = data
        return found

    def numbers(self, key: str) -> NDArray[np.float64]:
        """Read one tensor of floating-point numbers into NumPy's float64, without PyTorch.

        Raises:
            CheckpointError: The file has no such key, or the tensor holds something else.
            NonFiniteError: The tensor holds NaN or infinity. It is also a CheckpointError.
        """
        stored = self._numbers(key)
        if stored is None:
            raise CheckpointError(f"{self.path}: {key} is {self.dtype(key)}, expected floating-point numbers.")
        if not np.isfinite(stored).all():
            raise self._not_finite(key)
        return stored.astype(np.float64).reshape(self.shape(key))

    def is_finite(self, key: str) -> bool:
        """Return whether a tensor holds neither NaN nor infinity, without PyTorch; those of other numbers never do."""
        stored = self._numbers(key)
        return stored is None or bool(np.isfinite(stored).all())

    def _numbers(self, key: str) -> NDArray[np.floating[Any]] | None:
        """Return the elements of a tensor of floating-point numbers, 16-bit ones as float32; None for other types."""
        dtype, data = self.dtype(key), self.bytes(key)
        if dtype == "BF16":
            return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
        return np.frombuffer(data, f"<f{int(dtype[1:]) // 8}") if dtype in FLOATS else None

    def _not_finite(self, key: str) -> NonFiniteError:
        return NonFiniteError(f"{self.path}: {key} holds NaN or infinity; the run that wrote it had diverged.")

    def _place(self, key: str) -> tuple[int, int]:
        """Return where a tensor begins and ends in the file."""
        begin, end = self._entry(key)["data_offsets"]
        return self._start + begin, self._start + end

    def _fill(self, rest: memoryview, at: int) -> None:
        """Fill memory with the file's bytes from a place on."""
        while rest:
            try:
                count = os.preadv(self._file.fileno(), [rest[:READ_AT_ONCE]], at)
            except OSError as error:
                raise CheckpointError(f"{self.path}: cannot be read: {error.strerror or error}.") from error
            if count == 0:
                raise CheckpointError(f"{self.path}: it became shorter while it was read; copy or save it again.")
            rest, at = rest[count:], at + count

    def copy(self, key: str, target: BinaryIO) -> None:
        """Append a tensor's bytes, of any dtype and any values, to an open file."""
        begin, end = self._place(key)
        for at in range(begin, end, COPIED_AT_ONCE):
            piece = bytearray(min(COPIED_AT_ONCE, end - at))
            self._fill(memoryview(piece), at)
            target.write(piece)

    def _entry(self, key: str) -> Any:
        if key not in self._header:
            raise CheckpointError(f"{self.path}: no tensor {key!r}; the file is incomplete or of another checkpoint.")
        return self._header[key]


def torch_dtype(name: str) -> torch.dtype:
    """Return PyTorch's data type for safetensors' name of one."""
    import torch

    found: torch.dtype = getattr(torch, (FLOATS | INTEGERS)[name])
    return found


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity.

    A sum that is finite has only finite terms, and takes one pass over the memory; finite terms whose sum is not are
    rare, and then looked at one by one. Of 16-bit numbers, the bits are compared, which is faster still.
    """
    import torch

    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.element_size() == SHORT_BYTES:
        return math.isfinite(extreme_sizes(tensor)[1])
    total = tensor.sum(dtype=None if tensor.dtype == torch.float64 else torch.float32)
    return math.isfinite(float(total)) or bool(torch.isfinite(tensor).all())


def extreme_sizes(tensor: Tensor) -> tuple[float, float]:
    """Return the smallest and the largest magnitude among 16-bit or 32-bit floating-point numbers; NaN is the largest.

    The bits of magnitudes are in the order of the numbers, and PyTorch compares integers several times as fast.
    """
    import torch

    bits = tensor.abs().view(torch.int16 if tensor.element_size() == SHORT_BYTES else torch.int32)
    smallest, largest = torch.aminmax(bits)
    return float(smallest.view(tensor.dtype)), float(largest.view(tensor.dtype))


def have_same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors on the CPU have the same shape, dtype and bits; NumPy compares them ten times as fast."""
    import torch

    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    one_bytes, other_bytes = (tensor.flatten().view(torch.uint8).numpy() for tensor in (one, other))
    return np.array_equal(one_bytes, other_bytes)


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """Open a safetensors file; a CheckpointError if it is missing (perhaps there is a pickle), truncated or damaged."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        pickles = [p.name for p in path.parent.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
        hint = (
            f" There is {', '.join(sorted(pickles)[:3])}, but pickles can run code and are never read: "
            "save the adapter again with safetensors."
            if pickles
            else one_below(path) or " Is this the folder of a checkpoint?"
        )
        raise CheckpointError(f"{path}: no such file.{hint}")
    with ExitStack() as opened:
        try:
            file = opened.enter_context(
                path.open("rb")
            )  # safetensors takes a file without permission for a missing one
            with safe_open(path, framework="np"):  # which checks the header
                length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        except SafetensorError as error:
            raise CheckpointError(
                f"{path}: not a complete safetensors file ({error}); copy or save it again."
            ) from error
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}.") from error
        header.pop("__metadata__", None)
        yield TensorFile(path, file, header, 8 + length)


def sha256_of(path: Path, ending: Event | None = None) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits; `ending` stops it early, with the bytes so far."""
    digest, block = hashlib.sha256(), bytearray(HASHED_AT_ONCE)
    with path.open("rb", buffering=0) as file:
        while (count := file.readinto(block)) and not (ending is not None and ending.is_set()):
            digest.update(memoryview(block)[:count])
    return digest.hexdigest()


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: tuple[str, str] = ("format", "pt")) -> None:
    """Write a safetensors file; callers use it through `atomic_output`, whose errors name the destination.

    `metadata` has one key, since safetensors 0.8 writes several in random order.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata=dict([metadata]))
    except SafetensorError as error:
        raise OSError(f"{path.name}: {error}") from error


def save_arrays(tensors: Mapping[str, Array], path: Path) -> None:
    """Write a safetensors file as the safetensors library does, without a copy of the tensors in memory."""
    order = {dtype: (-place, name) for place, (name, dtype) in enumerate(arrays.DTYPES.items())}
    entries = sorted(tensors.items(), key=lambda entry: (order[entry[1].dtype][0], entry[0]))
    with path.open("wb") as target:
        target.write(header_of((key, order[array.dtype][1], array.shape, array.nbytes) for key, array in entries))
        for _, array in entries:
            target.write(arrays.bytes_of(array).data)


def header_of(tensors: Iterable[tuple[str, str, Sequence[int], int]]) -> bytes:
    """Return the beginning of a safetensors file, after which the tensors' bytes follow in the same order.

    Of each tensor it is given the key, safetensors' name of the data type, the shape and the size in bytes.
    """
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for key, dtype, shape, size in tensors:
        content[key] = {"dtype": dtype, "shape": shape, "data_offsets": (start, start + size)}
        start += size
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def first_other(path: Path, tensors: Mapping[str, Array]) -> str | None:
    """Return what `first_difference` returns, of NumPy's arrays."""
    with open_tensors(path) as written:
        return next((key for key, array in tensors.items() if not written.holds_array(key, array)), None)


def first_difference(path: Path, tensors: Mapping[str, Tensor]) -> str | None:
    """Return the key of the first tensor that a safetensors file does not hold bit for bit; None if it holds all."""
    with open_tensors(path) as written:
        return next((key for key, tensor in tensors.items() if not written.holds(key, tensor)), None)
