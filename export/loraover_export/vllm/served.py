"""The model that adapters are to be served on, with each expert's part of a parameter as a module."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from loraover.checkpoint.model_facts import ModelFacts, ModuleFacts, read_facts

if TYPE_CHECKING:
    from loraover.checkpoint.expert_stacks import ExpertWeight
    from loraover.models.load import ModelSource


@dataclass(frozen=True)
class ServedModel:
    """The model that adapters are to be served on.

    Args:
        source: Where the model is read from.
        facts: What its configuration says.
        modules: Modules by path, and experts like "model.layers.0.mlp.experts.3.down_proj"; empty if vLLM serves no
            adapters on this architecture.
    """

    source: ModelSource
    facts: ModelFacts
    modules: Mapping[str, ModuleFacts] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        """Name of the model class that vLLM looks up."""
        return self.facts.architecture

    @property
    def dtype(self) -> str | None:
        """Data type that the configuration gives, such as "bfloat16"; None if it gives none."""
        return self.facts.dtype

    @property
    def vocabulary(self) -> int | None:
        """Number of tokens; None if the configuration gives none."""
        return self.facts.vocabulary

    @property
    def experts(self) -> Mapping[str, ExpertWeight]:
        """Parameters of the model's experts, by path."""
        return self.facts.experts


def read_served(source: ModelSource, supported: Container[str] | None = None) -> ServedModel:
    """Read a model's configuration, and its modules if the architecture is supported.

    Args:
        source: Where the model is read from.
        supported: Classes that take adapters; None means all classes.

    Raises:
        ConfigError: No usable configuration, or a class that transformers cannot build.
    """
    facts = read_facts(source, supported)
    if supported is not None and facts.architecture not in supported:
        return ServedModel(source, facts)
    return ServedModel(source, facts, facts.modules | _parts(facts.experts))


def _parts(experts: Mapping[str, ExpertWeight]) -> dict[str, ModuleFacts]:
    """Return the matrices of the experts as if each were a module, by path."""
    found: dict[str, ModuleFacts] = {}
    for path, weight in experts.items():
        owner, _, parameter = path.rpartition(".")
        described = ModuleFacts("expert", "part of a parameter", weight.shape[::-1])
        found |= {f"{owner}.{index}.{parameter}": described for index in range(weight.experts)}
    return found
