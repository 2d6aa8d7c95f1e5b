"""Safetensors files written one tensor at a time, so that a model of any size needs the memory of one tensor."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from loraover.adapters.numerics.delta import read_delta
from loraover.adapters.numerics.rounded_adapter import not_kept
from loraover.adapters.numerics.rounding import round_nearest
from loraover.checkpoint.peft_adapter import ExactAdapter
from loraover.checkpoint.tensor_file import COPIED_AT_ONCE, TensorFile, header_of, open_tensors, torch_dtype
from loraover.common.errors import FoldError
from loraover.common.threads import Workers
from loraover_export.merge.arithmetic import certify_merge, merge_rows, out_by_in, row_blocks
from loraover_export.merge.plan import PlannedTensor
from loraover_export.merge.report import MergedWeight
from loraover_export.merge.rounding_loss import Lost, lost_by_four_bits, lost_by_rounding

Merged = tuple[MergedWeight, Lost, Lost]
"""A weight's entry in the report, with the sums of what storage and a quantiser lose."""


def write_shard(
    path: Path,
    source: TensorFile,
    tensors: Sequence[PlannedTensor],
    adapter: ExactAdapter,
    threads: Workers,
    on_tensor: Callable[[], None],
) -> list[Merged]:
    """Write one file of the merged model, tensor by tensor, and read back what was changed.

    Args:
        path: The new file.
        source: The base model's file.
        tensors: The new file's tensors.
        adapter: The adapter's open files.
        threads: Threads, each of which merges some rows.
        on_tensor: Called after each tensor.

    Raises:
        FoldError: An element beyond the range of its data type, or a file that does not hold what was written.
        OSError: The file cannot be written.
    """
    found: list[Merged] = []
    with path.open("w+b") as file:
        read = ((planned.key, planned.read) for planned in tensors)
        file.write(header_of((key, source.dtype(old), source.shape(old), source.size(old)) for key, old in read))
        for planned in tensors:
            if planned.changes:
                try:
                    tensor, merged = _changed(planned, source, adapter, threads)
                except FoldError as error:
                    raise FoldError(
                        f"{planned.key}: {error} A merged weight keeps the base model's type; save the base model in "
                        "bfloat16 or float32 first, and merge into that."
                    ) from error
                _write(file, tensor, planned.key)
                found += [] if merged is None else [merged]
            else:
                source.copy(planned.read, file)
            on_tensor()
    with open_tensors(path):  # the safetensors library checks the header
        return found


def _changed(
    planned: PlannedTensor, source: TensorFile, adapter: ExactAdapter, threads: Workers
) -> tuple[Tensor, Merged | None]:
    """Return a tensor that differs from the base model's."""
    name, dtype = source.dtype(planned.read), torch_dtype(source.dtype(planned.read))
    if planned.replaced is None:
        weight = source.read(planned.read)
    else:
        stored = adapter.plain.read(planned.replaced)
        weight = stored if stored.dtype == dtype else round_nearest(stored.double(), dtype)
    if planned.module is None or planned.layer is None:
        return weight, None
    delta, rows_first = read_delta(adapter, planned.module), out_by_in(planned.layer, weight)
    four_bit = lost_by_four_bits(rows_first, delta)
    parts = list(threads.map(lambda rows: merge_rows(rows_first, delta, rows), row_blocks(rows_first, delta)))
    m, n = rows_first.shape
    stored_loss, matrix = lost_by_rounding(parts), certify_merge(delta, (m, n), parts)
    size = sum(part.errors.norm**2 for part in parts) ** 0.5
    entry = MergedWeight(
        matrix=matrix,
        dtype=name,
        delta_to_weight=stored_loss.squares**0.5 / (size or 1.0),
        stored=stored_loss.result(),
        four_bit=four_bit.result(),
    )
    return weight, (entry, stored_loss, four_bit)


def _write(file: BinaryIO, tensor: Tensor, key: str) -> None:
    """Append a tensor's bytes, and read them back."""
    data: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    start, rest = file.tell(), memoryview(data)
    file.write(rest)
    file.flush()
    while rest:
        piece = os.pread(file.fileno(), COPIED_AT_ONCE, start)
        if not piece or piece != rest[: len(piece)]:
            raise not_kept(key)
        start, rest = start + len(piece), rest[len(piece) :]
