"""Memory that a run needs, from the model's config.json alone."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers.modeling_layers import GradientCheckpointingLayer

from loraover.common.dtypes import DTYPES
from loraover.common.strict_json import StrictModel
from loraover.models.load import ModelSource, load_skeleton
from loraover.overparam.schedule import Schedule
from loraover.overparam.sites import find_sites
from loraover.training.adapter import with_adapter
from loraover.training.checks import weights_dtype
from loraover.training.methods import make_method
from loraover.training.recipe import Recipe
from loraover.training.trainers import TRAINERS

CORE_BYTES = 4  # float32

QUANTISED = {"nf4": 0.5 + (1 + 4 / 256) / 64, "int8": 1.0, "torchao-int8": 1.0}
"""Bytes of a weight of a linear layer; nf4 with double quantisation (Dettmers et al., arXiv:2305.14314, section 3)."""


class Memory(StrictModel):
    """Memory of one process in bytes."""

    weights: int = Field(description="Bytes of the base model.")
    adapter: int = Field(description="Bytes of A and B.")
    cores: int = Field(description="Largest number of bytes of the cores: all that the schedule can inject.")
    gauge: int = Field(description="Largest number of bytes of bases that are not trained, and of their moments.")
    gradients: int = Field(description="Bytes of the gradients of everything trained, of single rows too.")
    optimizer_states: int = Field(description="Bytes of AdamW's two moments, in the type of their parameters.")
    activations: int | None = Field(
        description="Estimated bytes of activations, see `plan.ASSUMPTION`; None: they depend on the values."
    )

    @property
    def held(self) -> int:
        """Bytes in all, without the activations."""
        return self.weights + self.adapter + self.cores + self.gauge + self.gradients + self.optimizer_states


def estimate_memory(recipe: Recipe, source: ModelSource, steps: int) -> Memory:
    """Estimate the memory of a run without reading weights.

    Args:
        recipe: The recipe, with its batch size and length.
        source: The base model.
        steps: Optimizer steps of the run.

    Raises:
        ConfigError: PEFT, the method or the schedule refuses the model.
    """
    base = load_skeleton(source).to(getattr(torch, DTYPES[weights_dtype(recipe)]))
    weights = _bytes(base.parameters())
    if (form := recipe.model_init.quantization) is not None:
        layers = [one.weight for one in base.modules() if isinstance(one, nn.Linear)]
        inner = [weight for weight in layers if weight is not base.get_output_embeddings().weight]
        weights += round(QUANTISED[form] * sum(weight.numel() for weight in inner)) - _bytes(inner)
    is_seq2seq = bool(base.config.is_encoder_decoder)
    model: Any = base
    method = make_method(recipe, is_seq2seq=is_seq2seq)
    if recipe.method != "full":
        plain = recipe.changed("lora", init_lora_weights=True)  # others decompose weights, which are absent
        task = "SEQ_2_SEQ_LM" if is_seq2seq else "CAUSAL_LM"  # the skeleton is a language model for every trainer
        with torch.device("meta"):
            model = with_adapter(base, plain, task, source, method)
    adapter = _bytes(p for p in model.parameters() if p.requires_grad)
    method.freeze(model)
    trained = _bytes(p for p in model.parameters() if p.requires_grad)
    cores = added = gauge = 0
    if recipe.method == "lora-over":
        schedule = Schedule(recipe.over, find_sites(model), steps=steps, probe=None)
        cores, added = schedule.most_parameters
        gauge = schedule.most_gauge_numbers
    elif cores := method.count_cores(model):
        added = cores - trained // CORE_BYTES
    rows = 1 + recipe.training.micro_batch if method.keeps_row_gradients else 1
    return Memory(
        weights=weights,
        adapter=0 if recipe.method == "full" else adapter,
        cores=cores * CORE_BYTES,
        gauge=gauge * CORE_BYTES,
        gradients=rows * trained + cores * CORE_BYTES,
        optimizer_states=2 * (trained + added * CORE_BYTES) * recipe.clients,
        activations=_activations(model, recipe),
    )


def _activations(model: Any, recipe: Recipe) -> int | None:
    """Bytes that autograd keeps for the backward pass of one micro-batch; None where that depends on values.

    With gradient checkpointing, autograd keeps the layers' inputs and the activations of one layer.
    """
    training = recipe.training
    rows = training.micro_batch * TRAINERS[recipe.trainer or "sft"].texts
    ids = torch.zeros((rows, training.tokens), dtype=torch.long, device="meta")
    mode = _Accelerated(None if training.is_fp32 else torch.bfloat16 if training.bf16 else torch.float16)
    try:
        all_kept = kept_bytes(model.train(), ids, mode)
        if not training.gradient_checkpointing:
            return all_kept
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
        layers = sum(isinstance(module, GradientCheckpointingLayer) for module in model.modules())
        kept = kept_bytes(model, ids, mode)
    except (RuntimeError, AttributeError):  # such as a mixture of experts, whose router looks at values
        return None
    return kept + (all_kept - kept) // max(layers, 1)


def kept_bytes(model: nn.Module, ids: Tensor, mode: AbstractContextManager[Any]) -> int:
    """Bytes of the tensors, other than the model's own, that autograd keeps after a forward pass with a loss.

    Args:
        model: A model on the meta device.
        ids: Shape (batch, tokens), input and labels.
        mode: Context of the forward pass.
    """
    own = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with mode, saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=ids, labels=ids, use_cache=False)
    return sum(storage.nbytes() for place, storage in kept.items() if place not in own)


class _Accelerated(TorchFunctionMode):
    """Autocast, and attention that keeps no scores, on the meta device, which has neither."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__bool__:  # the meta device holds no values; where a mask is tested, nothing counts as masked
            return True
        if func in (linear, torch.matmul, scaled_dot_product_attention) and self.dtype is not None:
            args = [arg.to(self.dtype) if isinstance(arg, Tensor) else arg for arg in args]
        if func is scaled_dot_product_attention:
            fused: Any = _FusedAttention  # before torch 2.15, `apply` has no types
            return fused.apply(*args[:3], (kwargs or {}).get("attn_mask"))
        return func(*args, **(kwargs or {}))


class _FusedAttention(torch.autograd.Function):
    """Attention that keeps queries, keys, values, the output and one float32 for each row of scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        rows = query.shape[:-1]
        output = query.new_empty(*rows, value.shape[-1])
        ctx.save_for_backward(query, key, value, mask, output, query.new_empty(rows, dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise AssertionError("a plan takes no gradients")


def _bytes(parameters: Any) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)
