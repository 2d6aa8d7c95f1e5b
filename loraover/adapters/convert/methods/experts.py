"""LoRA of experts that share one parameter: delta_W = s B A of each expert, of rank r."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from loraover.adapters.convert.methods.base import LowRank, Place
from loraover.adapters.convert.source import Adapter
from loraover.adapters.numerics.delta import read_delta
from loraover.checkpoint.adapter_config import AdapterConfig
from loraover.checkpoint.expert_stacks import ExpertStack, find_expert_weights
from loraover.checkpoint.peft_adapter import AdapterDir, ExactAdapter, read_adapter_dir, read_on_base


def stacks_of(adapter: Adapter[Any]) -> Sequence[ExpertStack]:
    """Return the stacked pairs of an adapter of any kind.

    Raises:
        CheckpointError: Stacks that do not fit the base model.
    """
    found = _read(adapter)
    return () if found is None else found.stacks


def expert_places(adapter: Adapter[Any]) -> Iterator[Place]:
    """Yield every expert of every stacked pair.

    Raises:
        CheckpointError: Stacks that do not fit the base model, or an adapter for changed base weights.
    """
    found = _read(adapter)
    if found is None or not found.stacks:
        return
    found.check_keeps_base()
    exact = ExactAdapter(found, adapter.file)
    for stack in found.stacks:
        for index in range(stack.experts):
            path = stack.expert(index)
            yield Place(path, False, partial(_delta, exact, path))


def _read(adapter: Adapter[Any]) -> AdapterDir | None:
    config = adapter.config
    if not isinstance(config, AdapterConfig) or not config.parameters:
        return None
    return read_on_base(read_adapter_dir(adapter.layout.path), find_expert_weights(adapter.base.model))


def _delta(exact: ExactAdapter, path: str) -> LowRank:
    delta = read_delta(exact, path)
    return LowRank(delta.b.value.double(), delta.a.value.double())
