"""PyTorch's settings of the precision of float32 products, and their defaults."""

from __future__ import annotations

from typing import Any

import torch

from loraover.overparam.core_group import MATMULS

ALL: Any = torch.backends
BACKENDS: dict[str, Any] = {"all": ALL, **dict(zip(("cuda", "mkldnn"), MATMULS, strict=True))} if MATMULS else {}
"""Backends whose precision is an attribute; none before torch 2.9."""


def restore_default_precision() -> None:
    """Undo every way of asking for products of a lower precision."""
    torch.set_float32_matmul_precision("highest")
    if BACKENDS:
        ALL.mkldnn.set_flags(_fp32_precision="none")
    for backend in BACKENDS.values():
        backend.fp32_precision = "none"
