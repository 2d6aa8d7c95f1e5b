"""Engines that adapters are judged for, one file each; a new engine is a file here and a line in `ENGINES`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraover_export.check.engines.base import EngineRules

ENGINES = {
    "vllm": "vllm:Vllm",
    "llamacpp": "llamacpp:LlamaCpp",
    "onnx": "onnx:Onnx",
    "openvino": "openvino:OpenVino",
    "mlx": "mlx:Mlx",
    "torch": "torch:Torch",
}
"""Module and class of each engine, by the name that `--engine` takes."""


def engine_of(name: str) -> EngineRules:
    """Import and make one of `ENGINES`."""
    module, _, attribute = ENGINES[name].partition(":")
    found: type[EngineRules] = getattr(import_module(f"{__name__}.{module}"), attribute)
    return found()
