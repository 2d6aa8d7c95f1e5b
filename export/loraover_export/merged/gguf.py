"""Weights in a GGUF file by transformers' names, with the rows of queries and keys in transformers' order.

A quantised block holds integers q with a scale d and perhaps an offset m; its elements are d q + m. So the numbers
that it can hold are evenly spaced. The gguf package gives the smallest and the largest, by decoding the same block with
every q at its minimum or maximum. A merge was rounded to this grid, whichever tool chose d and m.

Source: ggml-common.h and ggml-quants.c of llama.cpp, for the places of q in a block.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from loraover.checkpoint.expert_stacks import ExpertWeight
from loraover.common.errors import CheckpointError, ConfigError, EngineError
from loraover.common.request import as_written
from loraover.models.load import ModelSource
from loraover_export.formats.gguf.header import GgufHeader, GgufTensor, read_header
from loraover_export.formats.gguf.target import FAMILIES, TENSORS, Family
from loraover_export.merged.matrices import FLOATS, Bytes, Numbers, Rounding, StoredMatrix, TensorPiece
from loraover_export.merged.tokenizer import Tokenizer, in_gguf
from loraover_export.merged.weights import EMBEDDING, EXPERT, HEAD, StoredWeights, Weights

INTEGERS = ("I8", "I16", "I32", "I64")
TOKENS = "tokenizer.ggml.tokens"


class Grid(NamedTuple):
    """Place of the integers in a block of a quantised format.

    Args:
        start: First byte of the integers.
        stop: First byte after them.
        steps: Number of steps from the smallest to the largest.
        least: Value of each of these bytes if all integers are the smallest.
        most: Value if they are the largest.
    """

    start: int
    stop: int
    steps: int
    least: int = 0x00
    most: int = 0xFF


GRIDS = {
    "Q4_0": Grid(2, 18, 15),
    "Q4_1": Grid(4, 20, 15),
    "Q5_0": Grid(2, 22, 31),
    "Q5_1": Grid(4, 24, 31),
    "Q8_0": Grid(2, 34, 254, 0x81, 0x7F),
    "Q2_K": Grid(16, 80, 3),
    "Q3_K": Grid(0, 96, 7),
    "Q4_K": Grid(16, 144, 15),
    "Q5_K": Grid(16, 176, 31),
    "Q6_K": Grid(0, 192, 63),
}

NORMS = (
    *("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"),
    *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)
"""Norms that a layer may have, by transformers' names; each family has some of them."""

ROTATED = {"self_attn.q_proj": "attention.head_count", "self_attn.k_proj": "attention.head_count_kv"}
"""Modules whose rows are reordered in some families, with the keys of their numbers of heads."""

_LAYER = re.compile(r"model\.layers\.\d+\.(.+)\.(?:weight|bias)")


@dataclass(frozen=True)
class GgufRows(StoredMatrix):
    """Rows of a tensor in a GGUF file: all of a matrix, or one expert's.

    Args:
        file: The open file.
        path: Its path.
        key: llama.cpp's name of the tensor.
        stored: Its layout.
        shape: Number of rows and columns.
        heads: Number of heads whose rows llama.cpp has reordered; None if it keeps the order.
        first: Index of the first of these rows in the tensor.
        added: Number that llama.cpp's converter has added to each element.
    """

    file: BinaryIO
    path: Path
    key: str
    stored: GgufTensor
    shape: tuple[int, int]
    heads: int | None = None
    first: int = 0
    added: float = 0.0

    @property
    def identity(self) -> tuple[str, int]:
        return self.name, self.first

    @property
    def name(self) -> str:  # type: ignore[override]
        """File and key."""
        return f"{self.path}: {self.key}"

    @property
    def type_name(self) -> str:  # type: ignore[override]
        """Storage type."""
        return self.stored.type_name

    @property
    def step(self) -> int:  # type: ignore[override]
        """Number of rows of a head, if these are reordered."""
        return 1 if self.heads is None else self.shape[0] // self.heads

    @property
    def is_quantised(self) -> bool:  # type: ignore[override]
        """Whether elements of a block share a scale."""
        return self.type_name not in FLOATS

    @property
    def unreadable(self) -> str | None:
        from gguf.quants import _type_traits as known

        names = {kind.name for kind in known}
        return None if self.type_name in FLOATS or self.type_name in names else f"{self.key} is {self.type_name}"

    def in_file_order(self) -> GgufRows | None:
        """Return the rows as llama.cpp orders them; None if this is transformers' order."""
        return None if self.heads is None else replace(self, heads=None)

    def order(self) -> NDArray[np.intp]:
        """Return the number in the file of each row in transformers' order."""
        rows = np.arange(self.shape[0])
        if self.heads is None:
            return rows
        found: NDArray[np.intp] = rows.reshape(self.heads, -1, 2).swapaxes(1, 2).reshape(-1)
        return found

    @property
    def row_bytes(self) -> int:
        return self.stored.row_bytes // self.shape[0] if self.shape[1] == 1 else self.stored.row_bytes

    def raw(self, start: int, stop: int, room: Bytes | None = None) -> Bytes:
        size = self.row_bytes
        data: Any = np.empty((stop - start) * size, np.uint8) if room is None else room[: (stop - start) * size]
        found = os.preadv(self.file.fileno(), [memoryview(data)], self.stored.start + (self.first + start) * size)
        if found != len(data):
            raise CheckpointError(f"{self.path}: it became shorter while it was read; copy or download it again.")
        rows: Bytes = data.reshape(stop - start, size)
        return rows if self.heads is None else rows[self.order()[start:stop] - start]

    def decode(self, raw: Bytes, out: Numbers) -> Rounding | None:
        kind, grid = FLOATS.get(self.type_name), GRIDS.get(self.type_name)
        if kind is not None:
            kind.decode(raw.reshape(-1), out)
            if not self.added:
                return kind.nearest
            out -= self.added
            return partial(_nearest_behind, kind.nearest, self.added)
        out[...] = self._decode(raw)
        if grid is None:
            return None
        least, most = (self._decode(raw, grid, fill).astype(out.dtype) for fill in (grid.least, grid.most))
        nearest = _on_grid(least, most, grid)
        nearest(out, out)  # which differ from the decoded numbers by rounding alone
        return nearest

    def _decode(self, raw: Bytes, grid: Grid | None = None, fill: int | None = None) -> Numbers:
        """Return the elements of some rows, or the elements with every integer set to the smallest or the largest."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize

        kind = GGMLQuantizationType[self.type_name]
        if grid is not None and fill is not None:
            blocks = raw.reshape(-1, GGML_QUANT_SIZES[kind][1]).copy()
            blocks[:, grid.start : grid.stop] = fill
            raw = blocks.reshape(raw.shape)
        found: Numbers = dequantize(raw, kind)
        return found


def _nearest_behind(nearest: Rounding, added: float, values: Numbers, out: Numbers) -> None:
    """Round numbers of which a format holds the sums with `added`."""
    np.add(values, added, out=out)
    nearest(out, out)
    out -= added


def _on_grid(least: Numbers, most: Numbers, grid: Grid) -> Rounding:
    """Return the rounding to a grid whose smallest and largest numbers are given at every place."""
    spacing = (most - least) / least.dtype.type(grid.steps)
    inverse = np.divide(1, spacing, out=np.zeros_like(spacing), where=spacing != 0)

    def nearest(values: Numbers, out: Numbers) -> None:
        np.subtract(values, least, out=out)
        out *= inverse
        np.rint(out, out=out)
        np.clip(out, 0, grid.steps, out=out)
        out *= spacing
        out += least

    return nearest


class GgufWeights(Weights):
    """Weights of a decoder in a GGUF file, of a family whose order of rows is known."""

    def __init__(self, path: Path, files: ExitStack) -> None:
        self.origin = f"file {path}"
        try:
            self.header: GgufHeader = read_header(path, (TOKENS,))
            self._file = files.enter_context(path.open("rb"))
        except (EngineError, OSError) as error:
            raise ConfigError(f"{error} Expected a GGUF file of a model.") from error
        if self.header.is_adapter:
            raise ConfigError(f"{path} holds an adapter; name the GGUF file of a merged model.")
        self.family = self._family(path)
        self._names = self._all_names()

    def check_exact(self) -> None:
        """Raise ConfigError if weights are quantised, so that they cannot be compared as a base model."""
        for key, tensor in self.header.tensors.items():
            if tensor.type_name not in (*FLOATS, *INTEGERS):
                raise ConfigError(
                    f"{self.header.path}: {key} is {tensor.type_name}. A quantised base model is rounded, so a merge "
                    "cannot be distinguished from this rounding; name the unquantised base model with "
                    f"{as_written('model')}: its safetensors files, or a GGUF file in F32, F16 or BF16."
                )

    def _family(self, path: Path) -> Family:
        found = [family for family in FAMILIES.values() if family.name == self.header.architecture]
        if not found:
            known = ", ".join(sorted({family.name for family in FAMILIES.values()}))
            raise ConfigError(
                f"{path}: its architecture is {self.header.architecture!r:.80}. The order in which llama.cpp keeps the "
                f"rows of its queries and keys is not known here; known are {known}. Compare the safetensors files "
                "that it was made from."
            )
        return found[0]

    def _number(self, key: str) -> int:
        found = self.header.fields.get(f"{self.family.name}.{key}")
        if not isinstance(found, int) or not 0 < found < 2**16:
            raise ConfigError(
                f"{self.header.path}: {self.family.name}.{key} is {found!r:.80}, expected a positive number; convert "
                "the model again."
            )
        return found

    def _all_names(self) -> dict[str, str]:
        """Return the llama.cpp name of every tensor in the file by its transformers name."""
        import gguf

        layers = self._number("block_count")
        kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == self.family.name)
        known = gguf.get_tensor_name_map(kind, layers)
        fused = "blk.0.ffn_gate.weight" not in self.header.tensors  # else llama.cpp's ffn_up is the up projection alone
        absent = "mlp.up_proj" if fused else "mlp.gate_up_proj"
        inner = [name for name in (*TENSORS, *NORMS) if ".experts." not in name and name != absent]
        paths = [f"model.layers.{k}.{name}" for k in range(layers) for name in inner]
        paths += [EMBEDDING.removesuffix(".weight"), HEAD.removesuffix(".weight"), "model.norm"]
        found: dict[str, str] = {}
        for path in paths:
            name = known.get_name(path)
            for part in ("weight", "bias"):
                if f"{name}.{part}" in self.header.tensors and f"{name}.{part}" not in found.values():
                    found[f"{path}.{part}"] = f"{name}.{part}"
        return found

    @property
    def embedding(self) -> str | None:
        return EMBEDDING if EMBEDDING in self._names else None

    def names(self) -> list[str]:
        used = {*self._names.values(), *(f"{name}.weight" for names in self._experts().values() for name in names)}
        return [*self._names, *(name for name in self.header.tensors if name not in used)]

    def tokenizer(self) -> Tokenizer | None:
        return in_gguf(self.header.fields, self.origin)

    def stacks(self) -> dict[str, int]:
        return {path: self.header.tensors[f"{names[0]}.weight"].shape[0] for path, names in self._experts().items()}

    def experts(self) -> Mapping[str, ExpertWeight]:
        found = {}
        for path, names in self._experts().items():
            stored = [self.header.tensors[f"{name}.weight"].shape for name in names]
            if any(len(shape) != 3 for shape in stored):
                raise ConfigError(f"{self.header.path}: {names[0]} has shape {stored[0]}, expected three dimensions.")
            rows = sum(shape[1] for shape in stored)
            found[path] = ExpertWeight(stored[0][0], (rows, stored[0][2]), is_transposed=False)
        return found

    def _experts(self) -> dict[str, tuple[str, ...]]:
        """Return llama.cpp's names of the tensors of each parameter of experts."""
        found: dict[str, tuple[str, ...]] = {}
        for layer in range(self._number("block_count")):
            for parameter, parts in {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}.items():
                names = tuple(f"blk.{layer}.ffn_{part}_exps" for part in parts)
                if all(f"{name}.weight" in self.header.tensors for name in names):
                    found[f"model.layers.{layer}.mlp.experts.{parameter}"] = names
        return found

    def find(self, name: str) -> StoredMatrix | None:
        key = self._names.get(name)
        if key is None and name == HEAD:
            return self.find(EMBEDDING) if self.embedding is not None else None
        stored = self.header.tensors.get(key or name)
        if stored is None:
            return None
        inner = _LAYER.fullmatch(name)
        heads = None
        if self.family.interleaved and inner is not None and inner[1] in ROTATED:
            heads = self._number(ROTATED[inner[1]])
        added = 1.0 if self.family.name.startswith("gemma") and name.endswith("norm.weight") else 0.0
        shape = (prod(stored.shape[:-1]), stored.shape[-1])
        if len(stored.shape) == 1:
            shape = (1, shape[1]) if heads is None else (shape[1], 1)
        if heads is not None and shape[0] % (2 * heads):
            raise ConfigError(f"{self.header.path}: {key} has {shape[0]} rows for {heads} heads; convert it again.")
        return GgufRows(self._file, self.header.path, key or name, stored, shape, heads, added=added)

    def module(self, path: str, shape: tuple[int, int]) -> list[TensorPiece]:
        found = self.find(f"{path}.weight")
        if found is not None:
            return [TensorPiece(found, False)]
        expert = EXPERT.fullmatch(path)
        names = () if expert is None else self._experts().get(f"{expert['owner']}.{expert['parameter']}", ())
        pieces = []
        for name in names:
            assert expert is not None, "it has names"
            stored, index = self.header.tensors[f"{name}.weight"], int(expert["index"])
            if len(stored.shape) != 3 or index >= stored.shape[0]:
                return []
            rows = (stored.shape[1], stored.shape[2])
            key = f"{name}.weight"
            pieces.append(
                TensorPiece(GgufRows(self._file, self.header.path, key, stored, rows, first=index * rows[0]), False)
            )
        return pieces


def is_gguf(name: str) -> bool:
    """Whether a text names a GGUF file."""
    return name.lower().endswith(".gguf")


@contextmanager
def open_weights(source: ModelSource | str) -> Iterator[Weights]:
    """Open the weights in a model's folder, or in a GGUF file of this machine."""
    with ExitStack() as files:
        yield GgufWeights(Path(source), files) if isinstance(source, str) else StoredWeights(source, files)
