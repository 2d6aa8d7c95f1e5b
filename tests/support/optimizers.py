"""Optimizers that some releases of their libraries lack, or that LoRA-Over refuses there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import nn

from support.versions import TORCH


def muon(parameters: Any, **options: Any) -> Any:
    if Version("2.9") > TORCH:
        pytest.skip("torch before 2.9 has no Muon")
    return torch.optim.Muon(parameters, **options)


def adagrad(parameters: Any, **options: Any) -> Any:
    if Version("2.12") > TORCH:
        pytest.skip("Adagrad of torch before 2.12 is refused: it gives no state to parameters that it meets later")
    return torch.optim.Adagrad(parameters, **options)


def adamw_8bit(parameters: Any) -> Any:
    """AdamW of bitsandbytes, whose states are 8-bit for all tensors of 16 numbers or more."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    try:
        bitsandbytes.functional.create_dynamic_map()
        probe = nn.Parameter(torch.ones(16, 16))
        probe.grad = torch.ones(16, 16)
        bitsandbytes.optim.AdamW8bit([probe], min_8bit_size=16).step()
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        pytest.skip(f"bitsandbytes has no 8-bit AdamW on this CPU: {error}")
    return bitsandbytes.optim.AdamW8bit(parameters, lr=1e-2, min_8bit_size=16)
