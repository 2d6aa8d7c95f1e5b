"""An adapter with all that decides whether vLLM serves it rightly."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from loraover.adapter_dir import AdapterDir
from loraover_export.vllm.architectures import Architecture, Architectures
from loraover_export.vllm.served import ServedModel
from loraover_export.vllm.uniform import largest_rank, module_of


@dataclass(frozen=True)
class Problem:
    """What a rule found, and what to do about it; only errors keep the adapter from being written."""

    found: str
    remedy: str
    is_warning: bool = False


@dataclass(frozen=True)
class Candidate:
    """What a pre-flight judges.

    Args:
        name: that requests will use.
        address: what vLLM is started with, which is the name that requests for the base model use.
        dtype: to be stored in: fp32, bf16 or fp16.
        replaces: whether an adapter lies at the destination already.
    """

    adapter: AdapterDir
    served: ServedModel
    architectures: Architectures
    name: str
    address: str
    dtype: str
    replaces: bool = False

    @property
    def config(self) -> dict[str, Any]:
        """Fields of `adapter_config.json` that do not decide the scaling."""
        return self.adapter.config.model_extra or {}

    @property
    def architecture(self) -> Architecture | None:
        """vLLM's class, if it takes adapters."""
        return self.architectures.lora.get(self.served.architecture)

    @property
    def rank(self) -> int:
        return largest_rank(self.adapter)

    @cached_property
    def modules(self) -> dict[str, tuple[int, int]]:
        """(in_features, out_features) of each adapted module, or (vocabulary, dimension) of an embedding."""
        found: dict[str, tuple[int, int]] = {}
        for site, key in self.adapter.sites.items():
            if site.endswith("A"):
                twin = self.adapter.sites[f"{site[:-1]}B"]
                found[module_of(site)] = (self.adapter.shapes[key][1], self.adapter.shapes[twin][0])
        return found

    @cached_property
    def embeddings(self) -> set[str]:
        """Adapted modules with the matrices of an embedding."""
        return {module_of(site) for site in self.adapter.sites if site.endswith("lora_embedding_A")}

    @property
    def present(self) -> dict[str, tuple[int, int]]:
        """The adapted modules that the served model has."""
        return {path: shape for path, shape in self.modules.items() if path in self.served.modules}


def listed(names: list[str], limit: int = 3) -> str:
    """The first of some names, and how many more there are."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
