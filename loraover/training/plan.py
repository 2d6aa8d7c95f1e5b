"""Memory, steps and tokens that a recipe would need, from the model's config.json and the size of the data."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers.modeling_layers import GradientCheckpointingLayer

from loraover.common.dtypes import DTYPES
from loraover.data.formats import RowForm
from loraover.data.sources import BUILT_IN, count_hub_rows, is_hub_name
from loraover.models.load import load_skeleton, resolve_model
from loraover.overparam.schedule import Schedule
from loraover.overparam.sites import find_sites
from loraover.training.adapter import with_adapter
from loraover.training.examples import WORD_PROBLEMS, load_examples, without_evaluation
from loraover.training.methods import make_method
from loraover.training.prepare import check_names, weights_dtype
from loraover.training.recipe import Recipe
from loraover.training.trainers import TRAINERS, make_arguments, trainer_name

CORE_BYTES = 4  # float32


class TrainingPlan(BaseModel):
    """Needs of one process; memory in bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(description="Base model with its commit or folder.")
    method: str = Field(description="Method of the recipe, such as lora or lora-over.")
    weights: int = Field(description="Bytes of the base model.")
    adapter: int = Field(description="Bytes of A and B.")
    cores: int = Field(description="Largest number of bytes of the cores: all that the schedule can inject.")
    gauge: int = Field(description="Largest number of bytes of bases that are not trained, and of their moments.")
    gradients: int = Field(description="Bytes of the gradients of everything trained, of single rows too.")
    optimizer_states: int = Field(description="Bytes of AdamW's two moments, in the type of their parameters.")
    activations: int | None = Field(
        description="Estimated bytes of activations, see `ASSUMPTION`; None: they depend on the values."
    )
    steps: int = Field(description="Optimizer steps.")
    examples: int = Field(description="Examples that the run sees, over all epochs.")
    tokens: int = Field(description="Largest number of tokens: every example at full length.")

    def facts(self) -> dict[str, str]:
        """Name and value of each row of a table."""
        held = self.weights + self.adapter + self.cores + self.gauge + self.gradients + self.optimizer_states
        known = self.activations is not None
        return {
            "base model": self.model,
            "method": self.method,
            "weights": _size(self.weights),
            "A and B": _size(self.adapter),
            "cores": _size(self.cores),
            **({"bases and moments": _size(self.gauge)} if self.gauge else {}),
            "gradients": _size(self.gradients),
            "optimizer states": _size(self.optimizer_states),
            "activations": f"about {_size(self.activations or 0)}" if known else "unknown for this architecture",
            "in all": f"about {_size(held + (self.activations or 0))}{'' if known else ', and activations'}",
            "steps": f"{self.steps:,}",
            "examples": f"{self.examples:,}",
            "tokens": f"at most {self.tokens:,}",
        }


ASSUMPTION = (
    "Activations are what autograd keeps of one micro-batch of full length: all logits (TRL computes them in parts), "
    "but no attention scores, as with fused attention. Cores are all that the schedule can inject, optimizer states "
    "AdamW's. Fragmentation and the buffers of libraries come on top; where bases are measured, so do "
    "the moments of all layers' inputs and outputs before the first step."
)


def make_plan(recipe: Recipe) -> TrainingPlan:
    """Estimate memory, steps and tokens of a run without reading weights.

    Args:
        recipe: The recipe.

    Raises:
        ConfigError: A recipe that `train` would refuse before it loads weights; or neither the hub nor its cache
            answers.
        DataError: Local data that cannot be read.
    """
    check_names(recipe)
    training = recipe.training
    source = resolve_model(recipe.model, recipe.model_revision)
    base = load_skeleton(source).to(getattr(torch, DTYPES[weights_dtype(recipe)]))
    weights = _bytes(base.parameters())
    is_seq2seq = bool(base.config.is_encoder_decoder)
    name = trainer_name(recipe, is_seq2seq=is_seq2seq)
    make_arguments(recipe, name, Path())
    examples = None if training.max_steps is not None else _count_examples(recipe, name)
    steps = recipe.steps(examples or 0)

    model: Any = base
    method = make_method(recipe, is_seq2seq=is_seq2seq)
    if recipe.method != "full":
        lora = recipe.lora.model_copy(update={"init_lora_weights": True})  # others decompose weights, which are absent
        task = "SEQ_2_SEQ_LM" if is_seq2seq else "CAUSAL_LM"  # the skeleton is a language model for every trainer
        with torch.device("meta"):
            model = with_adapter(base, recipe.model_copy(update={"lora": lora}), task, source, method)
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
    batch = training.per_device_train_batch_size
    rows = 1 + batch if method.keeps_row_gradients else 1
    seen = steps * batch * training.gradient_accumulation_steps * recipe.clients
    if training.num_train_epochs is not None and examples is not None:
        seen = round(examples * training.num_train_epochs)
    return TrainingPlan(
        model=source.origin,
        method=recipe.method,
        weights=weights,
        adapter=0 if recipe.method == "full" else adapter,
        cores=cores * CORE_BYTES,
        gauge=gauge * CORE_BYTES,
        gradients=rows * trained + cores * CORE_BYTES,
        optimizer_states=2 * (trained + added * CORE_BYTES) * recipe.clients,
        activations=_activations(model, recipe),
        steps=steps,
        examples=seen,
        tokens=seen * training.max_length * (2 if is_seq2seq else 1),
    )


def _count_examples(recipe: Recipe, name: str) -> int:
    """Training examples of an epoch; for the hub's data, the recipe's number, or else the number of rows."""
    data = recipe.data
    if data.train == BUILT_IN:
        return data.train_examples or WORD_PROBLEMS
    if any(map(is_hub_name, data.sources)):
        if data.train_examples:
            return data.train_examples * len(data.sources)
        return sum(count_hub_rows(name, data.train_split, data.subset, data.revision) for name in data.sources)
    return len(load_examples(without_evaluation(recipe), RowForm(TRAINERS[name].columns, chat=True)).train.rows)


def _activations(model: Any, recipe: Recipe) -> int | None:
    """Bytes that autograd keeps for the backward pass of one micro-batch; None where that depends on values.

    With gradient checkpointing, autograd keeps the layers' inputs and the activations of one layer.
    """
    shape = (recipe.training.per_device_train_batch_size, recipe.training.max_length)
    ids = torch.zeros(shape, dtype=torch.long, device="meta")
    training = recipe.training
    mode = _Accelerated(None if training.is_fp32 else torch.bfloat16 if training.bf16 else torch.float16)
    try:
        all_kept = kept_bytes(model.train(), ids, mode)
        if not recipe.training.gradient_checkpointing:
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


def _size(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"
