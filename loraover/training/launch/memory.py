"""Memory that a run needs, from the model's config.json alone."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers.modeling_layers import GradientCheckpointingLayer

from loraover.common.strict_json import StrictModel
from loraover.models.device import DTYPES
from loraover.models.load import ModelSource, load_skeleton
from loraover.overparam.schedule import Schedule
from loraover.overparam.sites import find_sites
from loraover.training.launch.distribution import CUTS_WEIGHTS
from loraover.training.launch.settings import weights_dtype, with_adapter
from loraover.training.method_table import make_method
from loraover.training.recipe import Recipe
from loraover.training.trainers import TRAINERS

CORE_BYTES = 4  # float32

QUANTISED = {"nf4": 0.5 + (1 + 4 / 256) / 64, "int8": 1.0, "torchao-int8": 1.0}
"""Bytes of a weight of a linear layer; nf4 with double quantisation (Dettmers et al., arXiv:2305.14314, section 3)."""


@dataclass(frozen=True)
class Gpus:
    """GPUs that a plan is for, each with so many bytes; they need not be here. A process trains on each of them."""

    count: int
    memory: int


class Memory(StrictModel):
    """Memory of one process in bytes."""

    weights: int = Field(description="Bytes of the base model.")
    adapter: int = Field(description="Bytes of A and B.")
    cores: int = Field(description="Largest number of bytes of the cores: all that the schedule can inject.")
    gauge: int = Field(description="Largest number of bytes of bases that are not trained, and of their moments.")
    gradients: int = Field(
        description="Bytes of the gradients of all trained parameters, and of single rows where a method needs these."
    )
    optimizer_states: int = Field(
        description="Bytes of AdamW's two moments, in the type of their parameters; under ZeRO also of their copies."
    )
    gathered: int = Field(
        0,
        description="Bytes of weights that ZeRO 3 and FSDP2, which cut them, gather while they are used: two layers, "
        "and what is outside of the layers.",
    )
    activations: int | None = Field(
        description="Estimated bytes of activations, see `plan.ASSUMPTION`; None: they depend on the values."
    )

    @property
    def held(self) -> int:
        """Bytes in all, without the activations."""
        cores = self.cores + self.gauge
        return self.weights + self.gathered + self.adapter + cores + self.gradients + self.optimizer_states

    @property
    def in_all(self) -> int:
        """Bytes in all; without the activations where these are not known."""
        return self.held + (self.activations or 0)


def estimate_memory(recipe: Recipe, source: ModelSource, steps: int, *, with_activations: bool = True) -> Memory:
    """Estimate the memory of one process of a run without reading weights.

    Of P processes, ZeRO 2 gives each a part of 1 / P of the optimizer's states and gradients of A and B, and ZeRO 3 and
    FSDP2 also of the weights, A and B. All of them hold all cores. docs/scale.md has the formulas.
    """
    base = load_skeleton(source).to(getattr(torch, DTYPES[weights_dtype(recipe)]))
    weights, gathered = _bytes(base.parameters()), 0
    if (form := recipe.model_init.quantization) is not None:
        layers = [one.weight for one in base.modules() if isinstance(one, nn.Linear)]
        inner = [weight for weight in layers if weight is not base.get_output_embeddings().weight]
        weights += round(QUANTISED[form] * sum(weight.numel() for weight in inner)) - _bytes(inner)
    spread, pieces = recipe.distributed.engine, recipe.distributed.processes or 1
    if spread in CUTS_WEIGHTS and pieces > 1:
        blocks = [_bytes(one.parameters()) for one in base.modules() if isinstance(one, GradientCheckpointingLayer)]
        in_use = 1 - (sum(blocks) - 2 * max(blocks)) / _bytes(base.parameters()) if len(blocks) > 2 else 1
        gathered, weights = round(in_use * weights * (pieces - 1) / pieces), weights // pieces
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
        gauge = schedule.most_gauge_bytes
    elif cores := method.count_cores(model):
        added = cores - trained // CORE_BYTES
    rows = 1 + recipe.training.micro_batch if method.keeps_row_gradients else 1
    kept = trained - (cores - added) * CORE_BYTES  # parameters whose moments stay with them
    if spread == "ddp":
        pieces = 1
    elif spread.startswith("zero"):
        kept = trained + trained // 2  # a step takes all of them, and has a float32 copy of each
    return Memory(
        weights=weights,
        gathered=gathered,
        adapter=0 if recipe.method == "full" else adapter // (pieces if spread in CUTS_WEIGHTS else 1),
        cores=cores * CORE_BYTES,
        gauge=gauge,
        gradients=rows * trained // pieces + cores * CORE_BYTES,
        optimizer_states=2 * (kept // pieces + cores * CORE_BYTES) * recipe.clients,
        activations=_activations(model, recipe) if with_activations else None,
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
    """Bytes of the tensors, other than the model's own, that autograd keeps after a forward pass with a loss."""
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
