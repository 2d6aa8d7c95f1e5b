"""An adapter together with the facts that decide whether vLLM serves it correctly."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from loraover.adapters.uniform.folder import parts_of
from loraover.checkpoint.model_facts import ModuleFacts, ServedModel
from loraover.checkpoint.peft_adapter import KEY_PREFIX, AdapterDir
from loraover_export.formats.vllm.releases import Architecture, Architectures, projections_of
from loraover_export.known_faults import Platform, Versions

TEXT_NAMES = Versions(since="0.33.0")
"""Releases that apply a text model's adapter to the language model of a multimodal class."""


@dataclass(frozen=True)
class Problem:
    """Finding of a rule, and its remedy.

    Args:
        found: The violation, in words.
        remedy: Next step for the user.
        is_warning: Whether the adapter may be written nevertheless.
        is_silent: Whether vLLM loads the adapter without a message, and then answers wrongly.
    """

    found: str
    remedy: str
    is_warning: bool = False
    is_silent: bool = False


@dataclass(frozen=True)
class Candidate:
    """An adapter, the model that it is to be served on, and how: the subject of a pre-flight.

    Args:
        served: The model to be served.
        architectures: The classes of the release of vLLM whose rules apply.
        name: Name by which requests choose the adapter.
        address: Model that vLLM is started with, which is also the base model's name in requests.
        dtype: Storage type to write, fp32, bf16 or fp16; None if the adapter's folder is served unchanged.
        replaces: Whether an adapter is already at the destination.
        platform: Kind of device that the server computes on; None if it is not known.
        lora_targets: Values of the server's --lora-target-modules; empty if it adapts all modules.
        adapts_towers: Whether the server is started with --enable-tower-connector-lora.
    """

    adapter: AdapterDir
    served: ServedModel
    architectures: Architectures
    name: str
    address: str
    dtype: str | None
    replaces: bool = False
    platform: Platform | None = None
    lora_targets: frozenset[str] = frozenset()
    adapts_towers: bool = False

    @property
    def config(self) -> dict[str, Any]:
        """Fields of `adapter_config.json` apart from those that give rank and scaling."""
        return self.adapter.config.model_extra or {}

    @property
    def architecture(self) -> Architecture | None:
        """vLLM's class of the served model; None if that takes no adapters."""
        return self.architectures.lora.get(self.served.architecture)

    @cached_property
    def modules(self) -> dict[str, tuple[int, int]]:
        """(in_features, out_features) of each adapted module, or (vocabulary, dimension) of an embedding."""
        return {path: (module.shape[1], module.shape[0]) for path, module in self.adapter.modules.items()}

    @cached_property
    def places(self) -> dict[str, ModuleFacts]:
        """Modules of the served model; with the projections of each expert, if its class reads a pair for each."""
        found = dict(self.served.modules)
        if self.architecture is None or self.architecture.stacked_experts:
            return found
        for path, weight in self.served.experts.items():
            owner, _, parameter = path.rpartition(".")
            names = parts_of(parameter, projections_of(self.served.architecture))
            m, n = weight.shape
            described = ModuleFacts("expert", "part of a parameter", (n, m // len(names)))
            found |= {f"{owner}.{index}.{name}": described for index in range(weight.experts) for name in names}
        return found

    @cached_property
    def present(self) -> dict[str, str]:
        """Adapted modules that the served model has, each with the served model's name for it."""
        allowed = self.architecture
        if allowed is None:
            return {path: path for path in self.modules if path in self.places}
        names = {allowed.rename(path): path for path in self.places}
        if self.architectures.version in TEXT_NAMES:
            texts = {text: path for name, path in names.items() for text in _text_names(name, allowed)}
            names = texts | names
        names |= {allowed.rename(path): path for path in self.modules if path in self.places}
        # vLLM's loader removes PEFT's prefix wherever it stands; the export writes the names of the file.
        read = {path: path if self.dtype is not None else path.replace(KEY_PREFIX, "") for path in self.modules}
        found = {path: names.get(allowed.rename(name)) for path, name in read.items()}
        return {path: served for path, served in found.items() if served is not None}

    def served_module(self, path: str) -> ModuleFacts:
        """Return the served module for an adapted module of `present`."""
        return self.places[self.present[path]]


def _text_names(name: str, allowed: Architecture) -> list[str]:
    """Return the names that a text model's adapter may have for a module of a multimodal class's language model.

    Source: _get_text_lora_names in vllm/lora/model_manager.py of vLLM 0.33.
    """
    prefix = None if allowed.language_model is None else allowed.language_model.rstrip(".") + "."
    if prefix is None or not name.startswith(prefix):
        return []
    rest = name.removeprefix(prefix)
    return [rest] if rest.startswith(("model.", "lm_head")) else [f"model.{rest}", rest]


def listed(names: list[str], limit: int = 3) -> str:
    """Join the first names, and count the others: "a, b, c and 4 more"."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
