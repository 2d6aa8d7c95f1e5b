"""Releases of libraries that tests run with, for features that older ones lack."""

from __future__ import annotations

import pytest
import torch
import transformers
from packaging.version import Version

TORCH, TRANSFORMERS = Version(torch.__version__), Version(transformers.__version__)

needs_meta_models = pytest.mark.skipif(
    Version("5") > TRANSFORMERS, reason="transformers before 5 runs no decoder on the meta device"
)
