"""Engines that adapters are checked and written for, a file each; a new one is a file here and a line in `ENGINES`."""

from __future__ import annotations

from pkgutil import resolve_name as imported
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraover_export.check.engines.base import EngineRules
    from loraover_export.publishing import EngineFormat

_HERE = "loraover_export.check.engines"
ENGINES = {
    "vllm": f"{_HERE}.vllm:VllmRules",
    "llamacpp": f"{_HERE}.llamacpp:LlamaCppRules",
    "onnx": f"{_HERE}.onnx:OnnxRules",
    "openvino": f"{_HERE}.openvino:OpenVinoRules",
    "mlx": "loraover_export.formats.mlx:FORMAT",
    "torch": f"{_HERE}.torch:TorchRules",
}
"""Class of each engine, or the format that it alone reads, as "module:name", by the name for `--engine`."""


def engine_of(name: str) -> EngineRules:
    """Import and make one of `ENGINES`."""
    from loraover_export.check.engines.base import FormatRules

    found: type[EngineRules] | EngineFormat = imported(ENGINES[name])
    return found() if isinstance(found, type) else FormatRules(found)
