"""Engines that can run a folded adapter, and the versions that are installed; `loraover doctor` shows them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from loraover_serve.engines.distributions import LLAMA_CPP, ONNX, ONNX_GENAI, VLLM, installed_version, version_beside
from loraover_serve.engines.elsewhere import MLX, OPENVINO
from loraover_serve.vllm.request import vllm_command


@dataclass(frozen=True)
class InstalledEngine:
    """One inference engine.

    Args:
        name: the engine's usual name.
        version: installed version, or the path of a command whose version is not recorded; None if it is missing.
        takes: files that the engine loads.
        install: command line that installs it.
    """

    name: str
    version: str | None
    takes: str
    install: str


def find_engines() -> list[InstalledEngine]:
    """The engines that this project can run, with the versions that are installed."""
    export = "pip install 'loraover[export]'"
    return [
        InstalledEngine("PyTorch with PEFT", installed_version(["peft"]), "folded adapters", "pip install loraover"),
        InstalledEngine("vLLM", vllm_installed(), "adapters that `loraover export vllm` writes", vllm_hint()),
        InstalledEngine("ONNX Runtime", installed_version(ONNX), "ONNX graphs of any model", export),
        InstalledEngine(
            "llama.cpp",
            installed_version(LLAMA_CPP),
            "adapters that `loraover export gguf` writes",
            "pip install 'loraover[llamacpp]'",
        ),
        InstalledEngine("ONNX Runtime GenAI", installed_version(ONNX_GENAI), "ONNX graphs of language models", export),
        InstalledEngine("mlx-lm", MLX.version(), "adapters that `loraover export mlx` writes", MLX.hint),
        InstalledEngine(
            "OpenVINO GenAI", OPENVINO.version(), "adapters that `loraover export vllm` writes", OPENVINO.hint
        ),
    ]


def vllm_hint() -> str:
    """Command line that installs vLLM on this machine."""
    return "make vllm" if shutil.which("nvidia-smi") is None else "pip install 'loraover[vllm]'"


def vllm_installed() -> str | None:
    """Version of the command vllm that servers are started with, else of the package in this environment.

    The version is read from the packages beside the command: vLLM itself takes many seconds to print it.

    Returns:
        The version, or "found at PATH" if there is a command without a record of its version; None if there is no vLLM.
    """
    command = shutil.which(vllm_command())
    if command is None:
        return installed_version(VLLM)
    return version_beside(str(Path(command).resolve()), VLLM) or f"found at {command}"
