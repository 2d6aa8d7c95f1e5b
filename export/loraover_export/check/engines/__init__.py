"""Engines that adapters are judged for, one file each; a new engine is a file here and a line in `ENGINES`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraover.common.places import imported

if TYPE_CHECKING:
    from loraover_export.check.engines.base import EngineRules

_HERE = "loraover_export.check.engines"
ENGINES = {
    "vllm": f"{_HERE}.vllm:Vllm",
    "llamacpp": f"{_HERE}.llamacpp:LlamaCpp",
    "onnx": f"{_HERE}.onnx:Onnx",
    "openvino": f"{_HERE}.openvino:OpenVino",
    "mlx": f"{_HERE}.mlx:Mlx",
    "torch": f"{_HERE}.torch:Torch",
}
"""Place of each engine's class, as "module:name", by the name that `--engine` takes."""


def engine_of(name: str) -> EngineRules:
    """Import and make one of `ENGINES`."""
    found: type[EngineRules] = imported(ENGINES[name])
    return found()
