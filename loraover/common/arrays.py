"""Arrays of the types that adapters are stored in: those of NumPy, and bfloat16, which NumPy lacks.

An array of bfloat16 has the type BFLOAT16, whose elements are the 16 bits of a number. NumPy copies, pads and reorders
such arrays as any others, and refuses to calculate with them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Array: TypeAlias = NDArray[Any]
Numbers: TypeAlias = NDArray[np.float64]

BFLOAT16: np.dtype[Any] = np.dtype([("bfloat16", "<u2")])
DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "F16": np.dtype(np.float16),
    "BF16": BFLOAT16,
    "I32": np.dtype(np.int32),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
}
"""NumPy's data types by those of safetensors, in the order of the safetensors library, which writes the last first."""

LARGEST_FINITE_BITS = {np.dtype(np.float16): 0x7BFF, BFLOAT16: 0x7F7F}
SHORT_SIGN = 0x7FFF


def is_floating(array: Array) -> bool:
    """Whether an array holds floating-point numbers."""
    return array.dtype == BFLOAT16 or array.dtype.kind == "f"


def name_of(dtype: Any) -> str:
    """Return the name of a NumPy data type, "bfloat16" for BFLOAT16."""
    return "bfloat16" if dtype == BFLOAT16 else str(dtype)


def widened(array: Array, dtype: Any = np.float64) -> Array:
    """Return floating-point numbers in float64 or float32, which hold them exactly; a copy only if the type changes."""
    return calculable(array).astype(dtype, copy=False)


def calculable(array: Array) -> Array:
    """Return numbers in a type that NumPy calculates with: bfloat16 in float32, all others as they are.

    NumPy widens float32 while it calculates in float64, so that no copy in float64 is made first.
    """
    if array.dtype == BFLOAT16:
        return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return array


def sizes(array: Array) -> Array:
    """Return the magnitudes of 16-bit or 32-bit numbers as integers that are in the same order; NaN is the largest."""
    if array.dtype.itemsize == 2:
        return array.view(np.uint16) & np.uint16(SHORT_SIGN)
    return array.view(np.uint32) & np.uint32(0x7FFFFFFF)


def extreme_sizes(array: Array) -> tuple[float, float]:
    """Return the smallest and the largest magnitude among 16-bit or 32-bit numbers; NaN is the largest."""
    bits = sizes(array)
    both = np.array([bits.min(), bits.max()]).view(array.dtype)
    smallest, largest = widened(both)
    return float(smallest), float(largest)


def is_finite(array: Array) -> bool:
    """Whether an array holds neither NaN nor infinity; of 16-bit numbers the bits are compared, which is faster."""
    if not is_floating(array) or array.size == 0:
        return True
    if array.dtype in LARGEST_FINITE_BITS:
        return int(sizes(array).max()) <= LARGEST_FINITE_BITS[array.dtype]
    return bool(np.isfinite(array).all())


def have_same_bits(one: Array, other: Array) -> bool:
    """Whether two arrays have the same shape, dtype and bits."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    one_bytes, other_bytes = (bytes_of(array) for array in (one, other))
    return np.array_equal(one_bytes, other_bytes)


def bytes_of(array: Array) -> NDArray[np.uint8]:
    """Return the bytes of an array's elements in order, a copy only if they do not lie so."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def as_tensor(array: Array) -> Tensor:
    """Return PyTorch's tensor of an array, which shares its memory."""
    import torch

    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def as_array(tensor: Tensor) -> Array:
    """Return the array of a tensor on the CPU, which shares its memory."""
    import torch

    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        bits: Array = tensor.view(torch.int16).numpy()
        return bits.view(BFLOAT16)
    found: Array = tensor.numpy()
    return found
