"""The model that an adapter is exported for, with each expert's part of a parameter as a module."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraover.checkpoint.model_facts import ModelFacts, ModuleFacts
from loraover.checkpoint.read_facts import read_facts

if TYPE_CHECKING:
    from loraover.checkpoint.expert_stacks import ExpertWeight
    from loraover.models.load import ModelSource


@dataclass(frozen=True)
class ServedModel(ModelFacts):
    """Facts from the configuration of the model that an adapter is exported for, or served on.

    Its modules have each expert's part of a parameter too, like "model.layers.0.mlp.experts.3.down_proj". There are
    none if the engine takes no adapters for this architecture.

    Args:
        source: Where the model is read from.
    """

    source: ModelSource


def read_served(source: ModelSource, supported: Container[str] | None = None) -> ServedModel:
    """Read a model's configuration, and its modules if the architecture is supported.

    Args:
        source: Where the model is read from.
        supported: Classes that take adapters; None means all classes.

    Raises:
        ConfigError: No usable configuration, or a class that transformers cannot build.
    """
    facts = read_facts(source, supported)
    is_supported = supported is None or facts.architecture in supported
    modules = facts.modules | _parts(facts.experts) if is_supported else {}
    return ServedModel(**vars(facts) | {"modules": modules}, source=source)


def _parts(experts: Mapping[str, ExpertWeight]) -> dict[str, ModuleFacts]:
    """Return the matrices of the experts as if each were a module, by path."""
    found: dict[str, ModuleFacts] = {}
    for path, weight in experts.items():
        owner, _, parameter = path.rpartition(".")
        described = ModuleFacts("expert", "part of a parameter", weight.shape[::-1])
        found |= {f"{owner}.{index}.{parameter}": described for index in range(weight.experts)}
    return found
