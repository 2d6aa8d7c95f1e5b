"""The sources of an ONNX export, their base model, and the task that the graph is made for."""

from __future__ import annotations

from dataclasses import dataclass

from loraover.adapters.uniform.refusals import HELD, check_fields, check_no_experts, written_parameters
from loraover.checkpoint.base_model import resolve_base
from loraover.checkpoint.model_facts import read_facts
from loraover.checkpoint.peft_adapter import AdapterDir
from loraover.checkpoint.source import read_source
from loraover.common.errors import ConfigError, ExportError
from loraover.models.load import ModelSource
from loraover.models.model_file import embeds_texts
from loraover_export.requests import OnnxRequest


@dataclass(frozen=True)
class Inputs:
    """The sources by name, and their base model.

    Args:
        adapters: The adapters, by the names of their files.
        task_type: PEFT's name of the task; None if the adapters name none.
    """

    adapters: dict[str, AdapterDir]
    base: ModelSource
    task_type: str | None


def read_inputs(request: OnnxRequest) -> Inputs:
    """Read every source and find the base model that they share."""
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


VECTORS = "FEATURE_EXTRACTION"
TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", VECTORS)
"""Tasks by PEFT's names."""

SEQ2SEQ_MODELS = ("t5", "mt5", "umt5")
"""Types of the encoder-decoder models whose layers `Seq2Seq` knows, by transformers' names."""


def find_task(named: str | None, base: ModelSource) -> str:
    """Return the task of a graph, one of `TASKS`.

    Args:
        named: PEFT's name of the task; None if the adapters name none, and the base model decides.

    Raises:
        ConfigError: A task that no graph is made for, or no usable configuration.
        ExportError: An encoder-decoder model that is no T5, or that is to give vectors.
    """
    facts = read_facts(base)
    unnamed = VECTORS if embeds_texts(base) else "SEQ_2_SEQ_LM" if facts.is_encoder_decoder else "CAUSAL_LM"
    task = named or unnamed
    if task not in TASKS:
        raise ConfigError(f"task_type is {task!r}, expected one of {', '.join(TASKS)}.")
    if task == VECTORS and facts.is_encoder_decoder:
        raise ExportError(f"{base.origin} has an encoder and a decoder; no graph of vectors is made for such a model.")
    if task == "SEQ_2_SEQ_LM" and facts.model_type not in SEQ2SEQ_MODELS:
        raise ExportError(
            f"{base.origin}: model_type is {facts.model_type!r}; of encoder-decoder models, only "
            f"{', '.join(SEQ2SEQ_MODELS)} can be exported to ONNX."
        )
    return task
