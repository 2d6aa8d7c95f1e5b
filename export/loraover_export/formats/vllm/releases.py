"""vLLM's releases, and the model classes of each that take adapters.

Source: `architectures.json`, made by `make vllm-architectures`.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from typing import Literal

from loraover.common.strict_json import StrictModel
from loraover_export.known_faults import Versions

READ = Versions(since="0.32.0", before="0.34.0")
"""Releases whose sources the rules were read from."""

LORA_A = ".lora_A.weight"


class Architecture(StrictModel):
    """Facts about a model class that decide which of its modules can be adapted.

    Args:
        embeddings: Names of embeddings and heads that take LoRA.
        packed: Modules that vLLM fuses, with the names that adapters use for their parts.
        language_model: Prefix, in vLLM's names, of the modules that a multimodal class adapts by default; None for a
            text-only class.
        towers: Prefixes of the modules that it adapts as well with --enable-tower-connector-lora; empty for a class
            that does not support the option.
        stacked_experts: Whether vLLM reads LoRA of experts as PEFT stacks it, and not each expert's by itself.
        pooling: Whether vLLM runs it to embed, classify or rank, and not to generate.
        renames: Rules (kind, old, new) that turn a tensor's name in a file into vLLM's, in the order vLLM applies them.
    """

    embeddings: tuple[str, ...]
    packed: dict[str, tuple[str, ...]]
    language_model: str | None
    towers: tuple[str, ...] = ()
    stacked_experts: bool = False
    pooling: bool = False
    renames: tuple[tuple[Literal["regex", "substr", "prefix", "suffix"], str, str], ...]

    def rename(self, path: str) -> str:
        """Return vLLM's name of the module `path`.

        The rules apply to tensor names, as in vLLM: WeightsMapper._map_name in vllm/model_executor/models/utils.py.
        """
        key = path + LORA_A
        for kind, old, new in self.renames:
            if kind == "regex":
                key = re.sub(old, new, key)
            elif kind == "substr" or (kind == "prefix" and key.startswith(old)):
                key = key.replace(old, new, 1)
            elif kind == "suffix" and key.endswith(old):
                key = key.removesuffix(old) + new
        return key.removesuffix(LORA_A)


class Architectures(StrictModel):
    """Contents of `architectures.json`.

    Args:
        source: Where the table comes from, in words.
        version: Release of vLLM.
        without_lora: Classes that vLLM serves without adapters only.
        unknown: Classes that could not be inspected.
        lora: Classes that take adapters, by vLLM's names.
    """

    source: str
    version: str
    without_lora: tuple[str, ...]
    unknown: tuple[str, ...]
    lora: dict[str, Architecture]


LATER = {
    "BertForTokenClassification": (
        Versions(since="0.33.0"),
        Architecture(
            embeddings=(),
            packed={"qkv_proj": ("query", "key", "value")},
            language_model=None,
            pooling=True,
            renames=(),
        ),
    )
}
"""Classes that take adapters since a release after the one of `architectures.json`, read from vLLM's sources."""


W123 = {"Lfm2MoeForCausalLM"}
"""Classes whose experts are named w1, w3 and w2, after their checkpoints: `get_expert_mapping` in vLLM's models."""

EXPERTS_BELOW = {
    "Gemma4ForCausalLM": "moe",
    "Gemma4ForConditionalGeneration": "moe",
    "Gemma4UnifiedForConditionalGeneration": "moe",
    "MiniMaxM2ForCausalLM": "block_sparse_moe",
    "MixtralForCausalLM": "block_sparse_moe",
}
"""Module of each layer that holds the experts in vLLM, for classes where transformers 5 gives it another name.

None of them renames the module in an adapter. Source: vLLM's models, and vllm-project/vllm 41754 and 50252 for Gemma 4.
"""


def projections_of(architecture: str) -> tuple[str, str, str]:
    """Return a class's names of the gate, up and down projections of each expert."""
    return ("w1", "w3", "w2") if architecture in W123 else ("gate_proj", "up_proj", "down_proj")


def architectures_of(version: str | None) -> Architectures:
    """Return the classes of a release of vLLM; None means the release of `architectures.json`.

    Raises:
        ConfigError: Not a version.
    """
    known = known_architectures()
    if version is None:
        return known
    later = {name: described for name, (versions, described) in LATER.items() if version in versions}
    without = tuple(name for name in known.without_lora if name not in later)
    return known.model_copy(update={"version": version, "lora": known.lora | later, "without_lora": without})


@cache
def known_architectures() -> Architectures:
    """Read the table that comes with this package."""
    return Architectures.model_validate_json(files(__package__).joinpath("architectures.json").read_bytes())
