"""Linear layers in float32 by oneDNN, on processors where it is faster than the library that PyTorch chooses.

PyTorch multiplies matrices in float32 by MKL, which has no kernels of AVX-512 for AMD's processors. oneDNN, which
PyTorch has as well, does have them: on a Zen 5 it takes less than half of the time. Both compute in float32.
"""

from __future__ import annotations

import platform
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

CPU_FILE = Path("/proc/cpuinfo")
AMD = "AuthenticAMD"


class OneDnnLinear(TorchFunctionMode):
    """Context manager in which oneDNN computes linear layers in float32 on the CPU where no gradients are kept."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear and not kwargs and not torch.is_grad_enabled() and all(map(_is_plain, args)):
            x, weight, bias = (*args, None)[:3]
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return func(*args, **(kwargs or {}))


def fast_linear() -> AbstractContextManager[Any]:
    """Context manager in which linear layers are computed by the faster library, without gradients."""
    return OneDnnLinear() if _is_faster() else nullcontext()


def _is_plain(tensor: Any) -> bool:
    """Whether it is an ordinary tensor in float32 on the CPU, and not one that is read from a file; or no tensor."""
    if tensor is None:
        return True
    return type(tensor) in (Tensor, nn.Parameter) and tensor.dtype == torch.float32 and tensor.device.type == "cpu"


@cache
def _is_faster() -> bool:
    """Whether the processor is AMD's with AVX-512, and PyTorch has both libraries."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):  # type: ignore[no-untyped-call]
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    vendor = platform.processor()
    with suppress(OSError):
        vendor += CPU_FILE.read_text()
    return AMD in vendor and hasattr(torch.ops.mkldnn, "_linear_pointwise")
