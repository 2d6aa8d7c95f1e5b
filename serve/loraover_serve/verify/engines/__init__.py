"""Engines whose answers are verified, one file each; a new engine is a file here and a line in `ENGINES`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraover_serve.verify.engines.base import VerifyEngine

ENGINES = {
    "vllm": "vllm:Vllm",
    "onnx": "onnx:Onnx",
    "llamacpp": "llamacpp:LlamaCppEngine",
    "mlx": "mlx:Mlx",
    "openvino": "openvino:OpenVino",
    "torch": "torch:Torch",
}
"""Module and class of each engine that can be started here, by the name that `--engine` takes."""

ENDPOINT = "endpoint"
"""Name of the engine that is a server which already runs, chosen by `--endpoint`."""


def engine_class(name: str) -> type[VerifyEngine]:
    """Import the class of an engine, given one of `ENGINES` or `ENDPOINT`."""
    module, _, attribute = (ENGINES | {ENDPOINT: "endpoint:EndpointEngine"})[name].partition(":")
    found: type[VerifyEngine] = getattr(import_module(f"{__name__}.{module}"), attribute)
    return found
