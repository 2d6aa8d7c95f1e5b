"""Names of the data types that weights are stored and computed in."""

from __future__ import annotations

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Data types that weights are stored in."""

COMPUTE_DTYPES = {**DTYPES, "fp64": "float64"}
"""Data types that a model can be run in."""
