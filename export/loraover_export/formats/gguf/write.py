"""Write a GGUF adapter, and read it again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loraover.adapters.numerics.matrix_certificate import MatrixCertificate
from loraover.adapters.numerics.rounding import not_kept, round_exact
from loraover.adapters.uniform.folder import to_uniform
from loraover.checkpoint.peft_adapter import AdapterDir
from loraover.common.arrays import Array
from loraover.common.errors import FoldError
from loraover_export.formats.gguf.target import GgufTarget

GGUF_TYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
FILE_TYPES = {"fp32": "ALL_F32", "fp16": "MOSTLY_F16", "bf16": "MOSTLY_BF16"}


def write_adapter(
    adapter: AdapterDir,
    target: GgufTarget,
    path: Path,
    *,
    dtype: str,
    name: str,
    on_tensor: Callable[[int], None] = lambda done: None,
) -> list[MatrixCertificate]:
    """Write an adapter in the uniform form, in llama.cpp's names and order, and certify each matrix.

    llama.cpp multiplies B @ A by `adapter.lora.alpha` over the rank of the tensors, which is 1 here: the scaling is in
    B. The file is read back with `gguf.GGUFReader`, and must equal the certified tensors bit for bit.
    """
    form = to_uniform(adapter)
    rounded, certificates = round_exact(
        adapter,
        adapter.matrices,
        dtype,
        prepare=lambda key, exact: target.lay_out(*adapter.matrices[key], form(key, exact)),
        on_tensor=on_tensor,
    )
    names = {target.tensor_name(*adapter.matrices[key]): key for key in rounded if key not in adapter.parts}
    assert len(names) == len(rounded.keys() - adapter.parts.keys()), "an expert by itself is refused"
    tensors = {name: rounded[key] for name, key in names.items()}
    for stack in adapter.stacks:
        tensors |= target.pack_experts(stack, rounded)
    fields: dict[str, str | int | float] = {
        "general.type": "adapter",
        "general.name": name,
        "general.base_model.count": 1,
        "general.base_model.0.name": target.served.source.name,
        "adapter.type": "lora",
        "adapter.lora.alpha": float(adapter.rank),
    }
    _write(path, target.family.name, fields, tensors, dtype)
    _compare(path, {"general.architecture": target.family.name, **fields}, tensors, dtype)
    return certificates


def _write(
    path: Path, architecture: str, fields: Mapping[str, str | int | float], tensors: Mapping[str, Array], dtype: str
) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    try:
        writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[dtype]])
        for key, value in fields.items():
            if isinstance(value, str):
                writer.add_string(key, value)
            elif isinstance(value, int):
                writer.add_uint32(key, value)
            else:
                writer.add_float32(key, value)
        for tensor_name, matrix in tensors.items():
            kind = gguf.GGMLQuantizationType[GGUF_TYPES[dtype]]
            writer.add_tensor(tensor_name, _bytes(matrix).view(FileArray), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    except BaseException:
        with suppress(OSError):  # a full disk fails again when buffers are flushed
            writer.close()
        raise
    writer.close()


class FileArray(np.ndarray[Any, np.dtype[np.uint8]]):
    """An array that is written through Python's file: numpy's own `tofile` reports no full disk."""

    def tofile(self, fid: Any, sep: str = "", format: str = "%s") -> None:
        fid.write(self.data)


def _compare(path: Path, fields: Mapping[str, str | int | float], tensors: Mapping[str, Array], dtype: str) -> None:
    """Read the file with the gguf package, and compare it with what was to be written."""
    import gguf

    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError) as error:
        raise FoldError(f"{path}: cannot be read again ({error}); check the disk, or write elsewhere.") from error
    for key, value in fields.items():
        field = reader.get_field(key)
        if field is None or field.contents() != value:
            raise not_kept(key)
    found = {tensor.name: tensor for tensor in reader.tensors}
    for name, matrix in tensors.items():
        tensor = found.pop(name, None)
        if (
            tensor is None
            or tensor.tensor_type.name != GGUF_TYPES[dtype]
            or tuple(map(int, reversed(tensor.shape))) != tuple(matrix.shape)
            or not np.array_equal(
                np.ascontiguousarray(tensor.data).view(np.uint8).reshape(-1), _bytes(matrix).reshape(-1)
            )
        ):
            raise not_kept(name)
    assert not found, "the writer adds no tensors"


def _bytes(matrix: Array) -> npt.NDArray[np.uint8]:
    """Return a tensor's bytes, row by row, in the machine's order, which GGUF shares on every machine that runs it."""
    rows = np.ascontiguousarray(matrix)
    return rows.view(np.uint8).reshape(*rows.shape[:-1], -1)
