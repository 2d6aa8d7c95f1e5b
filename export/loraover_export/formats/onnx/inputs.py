"""The sources of an ONNX export, and their base model."""

from __future__ import annotations

from dataclasses import dataclass

from loraover.adapters.uniform.refusals import HELD, check_fields, check_no_experts, written_parameters
from loraover.checkpoint.base_model import resolve_base
from loraover.checkpoint.peft_adapter import AdapterDir
from loraover.checkpoint.source import read_source
from loraover.common.errors import ExportError
from loraover.models.load import ModelSource
from loraover_export.requests import OnnxRequest


@dataclass(frozen=True)
class Inputs:
    """The sources by name, and their base model.

    Args:
        adapters: The adapters, by the names of their files.
        base: The base model.
        task_type: PEFT's name of the task; None if the adapters name none.
    """

    adapters: dict[str, AdapterDir]
    base: ModelSource
    task_type: str | None


def read_inputs(request: OnnxRequest) -> Inputs:
    """Read every source and find the base model that they share.

    Args:
        request: The arguments of the export.

    Raises:
        ConfigError: No base model, or several.
        ExportError: Tensors that a graph of this mode cannot hold, or sources of different tasks.
        CheckpointError: Files that cannot be trusted.
    """
    adapters = dict(zip(request.adapter_names, map(read_source, request.sources), strict=True))
    for adapter in adapters.values():
        adapter.check_keeps_base()
        check_fields(adapter, "run it with PEFT", allowed={*HELD, *written_parameters(adapter)})
        check_no_experts(adapter, "the export to ONNX")
        if request.mode == "swappable":
            check_swappable(adapter)
    tasks = {adapter.config.task_type for adapter in adapters.values()}
    if len(tasks) > 1:
        raise ExportError(f"the sources were trained for different tasks ({', '.join(sorted(map(str, tasks)))}).")
    base = resolve_base(list(adapters.values()), request.model, option=request.named("model"), say=request.report.line)
    return Inputs(adapters, base, tasks.pop())


def check_swappable(adapter: AdapterDir) -> None:
    """Raise ExportError unless a swappable graph can take the adapter as inputs."""
    other = next(iter(adapter.others.values()), None)
    if other is not None:
        raise ExportError(
            f"{adapter.tensors_path}: also holds {other}, which replaces a parameter of the base model; a "
            f"swappable adapter holds A and B only. Use {OnnxRequest.named('mode', 'merged')}."
        )
    embedding = next((module for module in adapter.modules.values() if module.is_embedding), None)
    if embedding is not None:
        raise ExportError(
            f"{adapter.tensors_path}: {embedding.site('A')} adapts an embedding, which no graph takes as an input; "
            f"use {OnnxRequest.named('mode', 'merged')}."
        )
