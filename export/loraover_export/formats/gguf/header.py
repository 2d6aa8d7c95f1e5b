"""The header of a GGUF file, read with a check of every length, since libllama trusts what it reads."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from loraover.common.errors import EngineError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMENSIONS = 4
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Format characters of `struct`, by GGUF's number of the type."""
STRING, ARRAY = 8, 9
MAX_NESTING = 4


@dataclass(frozen=True)
class GgufTensor:
    """Tensor of a GGUF file.

    Args:
        shape: Shape as PyTorch orders it, rows first.
        type_name: Name of the storage type, such as "F32" or "Q4_K".
        start: Place of its first byte in the file.
        row_bytes: Number of bytes of a row.
    """

    shape: tuple[int, ...]
    type_name: str
    start: int
    row_bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """Contents of a GGUF file apart from its tensors' data.

    Args:
        path: The file.
        fields: Metadata by key; arrays are left out, but for the lists of texts that were asked for.
        tensors: Tensors by name.
    """

    path: Path
    fields: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture; empty if the file names none."""
        return str(self.fields.get("general.architecture", ""))

    @property
    def is_adapter(self) -> bool:
        """Whether the file holds an adapter instead of a model."""
        return self.fields.get("general.type") == "adapter"

    @property
    def weight_types(self) -> list[str]:
        """Storage types of the matrices, in alphabetical order."""
        return sorted({tensor.type_name for tensor in self.tensors.values() if len(tensor.shape) > 1})


def read_header(path: Path, lists: Collection[str] = ()) -> GgufHeader:
    """Read the metadata and the tensor layout of a GGUF file, with the lists of texts under some keys."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Reader(path, content, lists).header()
    except OSError as error:
        raise EngineError(f"{path}: cannot be read: {error.strerror or error}.") from error
    except ValueError as error:  # an empty file cannot be mapped
        raise EngineError(f"{path}: not a GGUF file, or not a complete one ({error}).") from error


class _Reader:
    def __init__(self, path: Path, content: mmap.mmap, lists: Collection[str]) -> None:
        self._path = path
        self._lists = lists
        self._content = content
        self._at = 0

    def header(self) -> GgufHeader:
        if self._content[:4] != MAGIC:
            raise ValueError(f"it begins with {self._content[:4]!r}, expected {MAGIC!r}")
        self._at = 4
        version = self._number("I")
        if version not in VERSIONS:
            raise ValueError(f"its version is {version}, expected 2 or 3, with the low byte first")
        tensors, fields = self._count(), self._count()
        found: dict[str, Any] = {}
        for _ in range(fields):
            key = self._text()
            value = self._value(self._number("I"), is_kept=key in self._lists)
            if value is not None:
                found[key] = value
        return GgufHeader(self._path, found, self._tensors(tensors, found.get("general.alignment", 32)))

    def _tensors(self, count: int, alignment: Any) -> dict[str, GgufTensor]:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment is {alignment!r}, expected a power of two")
        found: dict[str, GgufTensor] = {}
        end = 0
        for _ in range(count):
            name, dimensions = self._text(), self._number("I")
            if not 1 <= dimensions <= MAX_DIMENSIONS:
                raise ValueError(f"{name!r} has {dimensions} dimensions")
            shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]
            kind = GGMLQuantizationType(self._number("I"))
            block, size = GGML_QUANT_SIZES[kind]
            offset = self._number("Q")
            if name in found:
                raise ValueError(f"{name!r} is listed twice")
            if 0 in shape or shape[-1] % block or offset % alignment:
                raise ValueError(f"{name!r} has shape {shape} and begins at {offset}, which {kind.name} cannot have")
            found[name] = GgufTensor(shape, kind.name, offset, shape[-1] // block * size)
            end = max(end, offset + prod(shape) // block * size)
        start = -(-self._at // alignment) * alignment
        if found and start + end > len(self._content):
            raise ValueError(f"it has {len(self._content)} bytes, its tensors need {start + end}; copy it again")
        return {name: replace(tensor, start=start + tensor.start) for name, tensor in found.items()}

    def _take(self, size: int) -> int:
        """Skip some bytes, and return where they begin."""
        begin, self._at = self._at, self._at + size
        if self._at > len(self._content):
            raise ValueError(f"it ends after {len(self._content)} bytes, in the middle of its header")
        return begin

    def _number(self, kind: str) -> Any:
        return struct.unpack_from(f"<{kind}", self._content, self._take(struct.calcsize(f"<{kind}")))[0]

    def _count(self) -> int:
        count: int = self._number("Q")
        if count > len(self._content):
            raise ValueError(f"it counts {count} entries in {len(self._content)} bytes")
        return count

    def _text(self) -> str:
        size = self._number("Q")
        begin = self._take(size)
        return self._content[begin : begin + size].decode("utf-8")

    def _value(self, kind: int, nesting: int = 0, *, is_kept: bool = False) -> Any:
        """Read a value; arrays are skipped and give None, but for a list of texts that is to be kept."""
        if kind == STRING:
            return self._text()
        if kind in SCALARS:
            return self._number(SCALARS[kind])
        if kind != ARRAY or nesting == MAX_NESTING:
            raise ValueError(f"its metadata has a value of the unknown type {kind}")
        inner, count = self._number("I"), self._count()
        if inner in SCALARS:
            self._take(count * struct.calcsize(f"<{SCALARS[inner]}"))
            return None
        if inner == STRING and is_kept:
            return [self._text() for _ in range(count)]
        for _ in range(count):
            if inner == STRING:
                self._take(self._number("Q"))
            else:
                self._value(inner, nesting + 1)
        return None
