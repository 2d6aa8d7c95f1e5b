"""The model that outputs are compared with: PEFT's own of a plain adapter, the unfolded one of a checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loraover.checkpoint.expert_stacks import find_expert_weights
from loraover.checkpoint.peft_adapter import AdapterDir, read_on_base
from loraover.common.errors import CheckpointError
from loraover.models.device import WITHOUT_FLOAT64
from loraover.overparam.sites import lora_layers
from loraover.reference.unfolded_model import check_fits, unfolded

CLASSIFIERS = ("SEQ_CLS", "TOKEN_CLS")
"""Tasks for which PEFT asks for a head in the file even if `modules_to_save` names none."""


@contextmanager
def reference_model(base: nn.Module, adapter: AdapterDir, *, delta_dtype: torch.dtype = torch.float64) -> Iterator[Any]:
    """Adapt a base model for the length of a block, by code that shares nothing with an export where it can.

    PEFT reads a plain adapter from its files and runs it, so that a field or tensor that we misread shows in the
    comparison. The cores of a checkpoint are known to the unfolded model alone. It also runs experts of a PEFT before
    0.19, which the installed one would read transposed.

    Args:
        base: Plain base model, in eval mode, on the device and in the dtype to compute in; it is left as it was.
        adapter: The adapter.
        delta_dtype: Data type in which cores, or A and B, are applied, if the device has it.

    Yields:
        A model on the weights of the base model.

    Raises:
        CheckpointError: The adapter was trained on another base model, or PEFT cannot load it.
    """
    adapter = read_on_base(adapter, find_expert_weights(base))
    if adapter.is_run_by_peft:
        yield _peft_model(base, adapter, delta_dtype)
    else:
        with unfolded(sharing_weights(base), adapter, delta_dtype=delta_dtype) as model:
            yield model


def reference_name(adapter: AdapterDir) -> str:
    """Return what `reference_model` runs, in words."""
    return "PEFT" if adapter.is_run_by_peft else "the unfolded checkpoint"


def _peft_model(base: Any, adapter: AdapterDir, dtype: torch.dtype) -> Any:
    """Let PEFT load an adapter beside the weights of a base model, with A and B in a data type."""
    from peft import PeftModel

    adapter.check_keeps_base()
    check_fits(base, adapter)
    folder = adapter.path if adapter.trained_as is None else adapter.trained_as
    # PEFT starts some kinds by changing the base weights, which have to be a copy then.
    shared = sharing_weights(base, but=adapter.others.values()) if folder == adapter.path else copy.deepcopy(base)
    try:
        config = peft_config(folder)
        if config.task_type in CLASSIFIERS:
            config.task_type = None
        model = PeftModel.from_pretrained(shared, str(folder), config=config, torch_device=str(base.device))
    except (ValueError, KeyError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"{folder}: PEFT cannot load it on {type(base).__name__}: {error}") from error
    if base.device.type not in WITHOUT_FLOAT64:
        for layer in lora_layers(model).values():
            for name in layer.adapter_layer_names:
                getattr(layer, name).to(dtype)
    return model.eval()


def peft_config(folder: Path) -> Any:
    """Return PEFT's configuration of an adapter, for models without layers of Megatron, which PEFT would import."""
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(str(folder))
    if getattr(config, "megatron_config", None):
        config.megatron_config = None
    return config


def sharing_weights(model: nn.Module, but: Iterable[str] = ()) -> Any:
    """Return a second model on the same tensors, but with copies of the named ones, of which it may lack some.

    Weights in int8 are copied too: a layer of bitsandbytes takes the scales off its weight when it first runs.
    """
    tensors = dict(chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)))
    copied = {id(tensors[name]) for name in but if name in tensors}
    copied |= {id(tensor) for tensor in tensors.values() if tensor.dtype == torch.int8}
    return copy.deepcopy(model, {id(t): t for t in tensors.values() if id(t) not in copied})
