"""Names of the data types that weights are stored and computed in."""

from __future__ import annotations

from loraover.common.errors import ConfigError

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Data types that weights are stored in."""

COMPUTE_DTYPES = {**DTYPES, "fp64": "float64"}
"""Data types that a model can be run in."""


def short_dtype(name: str) -> str:
    """Return the short name of a data type, given that name or PyTorch's.

    Args:
        name: Name of the data type, e.g. "bf16" or "bfloat16".

    Raises:
        ConfigError: The name is unknown.
    """
    short = {long: short for short, long in DTYPES.items()}.get(name, name)
    if short not in DTYPES:
        known = ", ".join(f"{short} ({long})" for short, long in DTYPES.items())
        raise ConfigError(f"dtype is {name!r}, expected one of {known}.")
    return short
