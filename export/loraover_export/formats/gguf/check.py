"""Comparison of llama.cpp's logits with PyTorch's, on a GGUF file of the base model."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from loraover.adapters.logits.deviation import largest
from loraover.adapters.logits.prompts import Prompts, logits_of, read_prompts
from loraover.adapters.numerics.rounded_adapter import write_rounded
from loraover.checkpoint.adapter_config import write_config
from loraover.checkpoint.peft_adapter import AdapterDir, read_adapter_dir
from loraover.common.errors import ExportError, OutputError
from loraover.models.load import ModelSource, load_model
from loraover.reference.reference_model import reference_model
from loraover_export.formats.gguf.families import Family
from loraover_export.formats.gguf.header import read_header
from loraover_export.formats.gguf.llamacpp import LlamaCppModel
from loraover_export.formats.gguf.report import ARITHMETIC, TABLE, GgufCheck


@dataclass(frozen=True)
class LlamaCppReference:
    """Logits of PyTorch in float32, and of llama.cpp without an adapter.

    Args:
        base_gguf: File of the base model that llama.cpp runs.
        prompts: Token ids.
        adapted: Logits with the adapter for each prompt, (tokens, vocabulary).
        base_distance: Largest difference of the two base models' logits.
        rounding_distance: Largest change of a logit in PyTorch by the rounding of A and B.
        adapter_effect: Largest change that the adapter makes to a logit in PyTorch.
    """

    base_gguf: Path
    prompts: Prompts
    adapted: list[Tensor]
    base_distance: float
    rounding_distance: float
    adapter_effect: float


def make_reference(
    adapter: AdapterDir, base: ModelSource, dtype: str, base_gguf: Path, threads: int | None
) -> LlamaCppReference:
    """Run the base model in PyTorch and in llama.cpp, and the adapted model in PyTorch.

    Raises:
        ConfigError: A base model that cannot be loaded.
        CheckpointError: An adapter of another base model.
        EngineError: A GGUF file that llama.cpp cannot load.
        ExportError: A GGUF file with another vocabulary.
    """
    model = load_model(base)
    prompts = read_prompts(base)
    plain = [logits_of(model, ids, None) for ids in prompts.batches]
    adapted = _adapted_logits(model, adapter, prompts)
    with TemporaryDirectory() as folder:
        rounded = _adapted_logits(model, _rounded(adapter, Path(folder), dtype), prompts)
    found = _engine_logits(base_gguf, None, prompts, threads)
    if found[0].shape != plain[0].shape:
        raise ExportError(
            f"{base_gguf}: has {found[0].shape[1]} tokens, {base.name} has {plain[0].shape[1]}; name a GGUF file of "
            "the base model."
        )
    return LlamaCppReference(
        base_gguf, prompts, adapted, largest(plain, found), largest(adapted, rounded), largest(plain, adapted)
    )


def check_adapter_file(reference: LlamaCppReference, adapter: Path, family: Family, threads: int | None) -> GgufCheck:
    """Run a written adapter in llama.cpp, and compare every logit.

    Raises:
        EngineError: An adapter that llama.cpp cannot load on this base.
    """
    found = _engine_logits(reference.base_gguf, adapter, reference.prompts, threads)
    return GgufCheck(
        base_gguf=str(reference.base_gguf),
        weight_types=read_header(reference.base_gguf).weight_types,
        engine=version("llama-cpp-py-sync"),
        prompts=len(found),
        tokens=sum(map(len, found)),
        prompt_source=reference.prompts.source,
        base_distance=reference.base_distance,
        rounding_distance=reference.rounding_distance,
        error=largest(reference.adapted, found),
        adapter_effect=reference.adapter_effect,
        arithmetic=TABLE if family.gelu else ARITHMETIC,
    )


def _rounded(adapter: AdapterDir, folder: Path, dtype: str) -> AdapterDir:
    """Write A and B in a data type as a PEFT folder, so that PyTorch can run them.

    The scaling stays in the configuration, so that a fault of the uniform form is no noise of this comparison.
    """
    try:
        write_rounded(adapter, adapter.matrices, folder, dtype)
        write_config(adapter.config.model_dump(), folder)
    except OSError as error:
        raise OutputError(f"cannot write to the temporary folder {folder}: {error.strerror or error}.") from error
    return read_adapter_dir(folder)


def _adapted_logits(model: Any, adapter: AdapterDir, prompts: Prompts) -> list[Tensor]:
    with reference_model(model, adapter) as adapted:
        return [logits_of(adapted, ids, None) for ids in prompts.batches]


def _engine_logits(base: Path, adapter: Path | None, prompts: Prompts, threads: int | None) -> list[Tensor]:
    with LlamaCppModel(base, adapter, threads) as engine:
        return [torch.from_numpy(engine.logits(ids[0].tolist())) for ids in prompts.batches]
