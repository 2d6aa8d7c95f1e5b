"""Contract the cores of a checkpoint into a plain LoRA adapter, and measure what was written."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Event

from loraover.adapters.numerics.matrix_certificate import MatrixCertificate
from loraover.adapters.numerics.rounded_adapter import write_rounded
from loraover.checkpoint.adapter_config import write_config
from loraover.checkpoint.checkpoint import Checkpoint
from loraover.checkpoint.files import CONFIG_FILE


def write_folded(
    checkpoint: Checkpoint,
    directory: Path,
    dtype: str,
    on_tensor: Callable[[int], None] = lambda done: None,
    beside: Sequence[Callable[[Event], None]] = (),
) -> list[MatrixCertificate]:
    """Write the folded adapter, an ordinary PEFT folder, and certify each matrix.

    Each over-parameterised matrix is the float64 contraction of its cores, rounded once to `dtype`; every
    other floating-point tensor is rounded from its stored value, but that of a frozen base weight, which PEFT saves
    beside an adapted embedding and loads over the base model's, is written as it is stored. The bound is derived
    element by element: gamma_k(2^-53) |C_1| ... |C_K| for the contraction, plus u |M| for the rounding, or half a
    subnormal below the type's normal numbers. The file is read back, and must equal the certified tensors bit for bit.

    Args:
        checkpoint: The checkpoint, read site by site; only the folded tensors are held in memory.
        directory: An empty folder.
        dtype: Data type to store: fp32, bf16 or fp16.
        on_tensor: Called with the number of tensors so far.
        beside: Functions to run at the same time, as in `write_rounded`.

    Returns:
        One certificate per A and B matrix, in file order.

    Raises:
        CheckpointError: Cores with NaN, or a stored matrix that contradicts its cores.
        FoldError: An element beyond the range of `dtype`, or a file that does not hold what was written.
        OutputError: The folder cannot be written.
    """
    keys = checkpoint.shapes
    certificates = write_rounded(checkpoint, keys, directory, dtype, on_tensor=on_tensor, beside=beside)
    config = json.loads((checkpoint.path / CONFIG_FILE).read_bytes())
    write_config(config | {"inference_mode": True}, directory)
    return certificates
