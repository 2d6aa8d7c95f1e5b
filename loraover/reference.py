"""The models that checks compare with: PEFT's own of a plain adapter, the unfolded model of a checkpoint.

The unfolded model applies cores to activations, and forms no A or B. It does not use PEFT, so that it can serve as an
independent reference for a folded adapter that PEFT has loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loraover.checkpoint.base_modules import load_others, put_parameters, target_module
from loraover.checkpoint.checkpoint import Checkpoint
from loraover.checkpoint.exact_tensors import Factor
from loraover.checkpoint.expert_stacks import ExpertWeight, find_expert_weights
from loraover.checkpoint.peft_adapter import (
    KEY_PREFIX,
    AdaptedModule,
    AdapterDir,
    ExactAdapter,
    read_on_base,
)
from loraover.common.errors import CheckpointError
from loraover.common.request import as_written
from loraover.models.device import WITHOUT_FLOAT64
from loraover.overparam.sites import lora_layers

ONE_HOT_AT_ONCE = 2**24  # numbers of the one-hot rows of an embedding's tokens: 128 MiB in float64

CLASSIFIERS = ("SEQ_CLS", "TOKEN_CLS")
"""Tasks for which PEFT asks for a head in the file even if `modules_to_save` names none."""


@dataclass(frozen=True)
class Sampled:
    """Tokens at which cores are applied; at the others, A and B of a plain adapter are, which cost much less.

    Args:
        share: Share of the tokens of each forward pass, at least one token of each.
        others: The plain adapter.
    """

    share: float
    others: AdapterDir

    def count(self, tokens: int) -> int:
        """Number of tokens at which cores are applied, given the number of tokens in a forward pass."""
        return min(tokens, max(1, round(self.share * tokens)))

    def positions(self, tokens: int) -> Tensor:
        """Positions of these tokens: evenly spaced, the last token among them, and the same in every layer."""
        count = self.count(tokens)
        return torch.arange(1, count + 1) * tokens // count - 1


class _Widened:
    """The latest input in the type to compute in, which layers with a common input (q, k and v) ask for in turn."""

    def __init__(self) -> None:
        self._latest: tuple[Tensor, int, Tensor] | None = None

    def __call__(self, x: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        version = None if x.is_inference() else x._version
        if self._latest is not None and version is not None:
            given, seen, wide = self._latest
            if given is x and seen == version and (wide.device, wide.dtype) == (device, dtype):
                return wide
        wide = x.to(device).to(dtype)
        self._latest = None if version is None else (x, version, wide)
        return wide


@dataclass
class _Delta:
    """A forward hook that adds scaling * B(A(x)) to the output of a module."""

    pair: tuple[Factor, Factor]
    sampled: Sampled | None  # tokens at which A and B are applied; None means all
    others: tuple[Factor, Factor] | None  # A and B for the other tokens
    bias: Tensor | None  # of B
    scaling: float
    is_embedding: bool
    dtype: torch.dtype
    widened: _Widened  # inputs in that type, common to all modules

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        wide = torch.promote_types(output.dtype, self.dtype)
        on_cpu = wide == torch.float64 and output.device.type in WITHOUT_FLOAT64
        device = torch.device("cpu") if on_cpu else output.device
        self.pair = self.pair[0].to(device, wide), self.pair[1].to(device, wide)
        if self.others is not None:
            self.others = self.others[0].to(device, wide), self.others[1].to(device, wide)
        scale = self.scaling
        if self.is_embedding:
            x = args[0].to(device).flatten()
            scale *= getattr(module, "embed_scale", 1.0)  # Gemma scales its embeddings inside the module
        else:
            x = self.widened(args[0], device, wide).flatten(0, -2)
        if self.sampled is None or self.others is None or self.sampled.count(len(x)) == len(x):
            delta = self._product(self.pair, x, wide)
        else:
            chosen = self.sampled.positions(len(x)).to(x.device)
            delta = self._product(self.others, x, wide)
            delta = delta.index_copy(0, chosen, self._product(self.pair, x[chosen], wide))
        if self.bias is not None:
            self.bias = self.bias.to(device).to(wide)
            delta = delta + self.bias
        changed = output.to(device).to(wide) + scale * delta.reshape(output.shape)
        return changed.to(output.dtype).to(output.device)

    def _product(self, pair: tuple[Factor, Factor], x: Tensor, dtype: torch.dtype) -> Tensor:
        """B(A(x)) of the inputs (tokens, n), or of the indices (tokens,) into an embedding."""
        a, b = pair
        if not self.is_embedding:
            return b.apply(a.apply(x))
        pieces = torch.split(x, max(1, ONE_HOT_AT_ONCE // a.n))
        return torch.cat([b.apply(a.apply(nn.functional.one_hot(piece, a.n).to(dtype))) for piece in pieces])


@contextmanager
def unfolded(
    base: nn.Module,
    adapter: AdapterDir,
    *,
    delta_dtype: torch.dtype = torch.float64,
    sampled: Sampled | None = None,
) -> Iterator[nn.Module]:
    """Apply an adapter's cores beside the weights of the base model, for the length of a block.

    Each adapted module returns W x + scaling * B(A(x)), where A and B are applied core by core, or as stored if they
    have no cores. It is for evaluation only: LoRA dropout is not applied. Parameters of `target_parameters`, such as
    those of experts and routers, get W + scaling * B A instead, from the contraction in float64, rounded once to W's
    type.

    W x is computed as the base model computes it, the rest in float64, so that the error of this reference does not
    grow with the number of cores. The cores move to the model's device once, and to the CPU if it has no float64.

    Args:
        base: Plain base model, in eval mode, on the device and in the dtype to compute in.
        delta_dtype: Data type in which cores are applied.
        sampled: Tokens at which cores are applied; None means all.

    Yields:
        The base model.

    Raises:
        CheckpointError: The adapter was trained on another base model: a module is missing or has other dimensions, or
            the initialisation of A and B had changed the base weights.
    """
    saved: dict[str, nn.Parameter] = {}
    experts = find_expert_weights(base)
    adapter = read_on_base(adapter, experts)
    adapter.check_keeps_base()
    weights = _weights(base, adapter, experts)
    with ExitStack() as undo:
        undo.callback(put_parameters, base, saved)
        with ExitStack() as files:
            exact = files.enter_context(adapter.open())
            others = None if sampled is None else files.enter_context(sampled.others.open())
            widened = _Widened()
            for path, module in adapter.modules.items():
                if path in weights or path in adapter.experts:
                    continue
                bias_key = f"{KEY_PREFIX}{path}.lora_B.bias"
                hook = _Delta(
                    pair=_pair(exact, module),
                    sampled=sampled,
                    others=None if others is None else _pair(others, module),
                    bias=exact.plain.read(bias_key) if bias_key in exact.plain.keys else None,
                    scaling=module.scaling,
                    is_embedding=module.is_embedding,
                    dtype=delta_dtype,
                    widened=widened,
                )
                undo.callback(target_module(base, adapter, path).register_forward_hook(hook).remove)
            for name, added in _deltas(experts, weights, exact):
                saved.update(_add(base, name, added))
            saved.update(load_others(base, exact))
        yield base


def check_fits(base: Any, adapter: AdapterDir) -> None:
    """Raise CheckpointError unless a base model has every layer that an adapter changes, in its dimensions.

    The adapter has to have each layer that its configuration names, too: PEFT would start the others again.
    """
    experts = find_expert_weights(base)
    for module in adapter.modules.keys() - adapter.experts - _weights(base, adapter, experts):
        target_module(base, adapter, module)
    adapter.check_complete((path for path, _ in base.named_modules()), base.config.model_type, experts)


def _weights(base: nn.Module, adapter: AdapterDir, experts: Mapping[str, ExpertWeight]) -> set[str]:
    """Return the modules whose weight PEFT changes: those that `target_parameters` names, and routers beside experts.

    Source: _convert_peft_config_moe in peft/utils/transformers_weight_conversion.py of PEFT 0.21.2, which turns the
    target module `gate` into the parameter `gate.weight`, because routers were linear layers before transformers 5.
    """
    linear = {path for path, module in adapter.modules.items() if not module.is_embedding}
    blocks = {path.rpartition(".")[0].rpartition(".")[0] for path in experts}
    return {
        path
        for path, module in base.named_modules()
        if path in linear
        and any(name == "weight" and p.ndim == 2 for name, p in module.named_parameters(recurse=False))
        and (
            adapter.config.adapts_weight(path)
            or (path.rpartition(".")[0] in blocks and not isinstance(module, nn.Linear | nn.Embedding))
        )
    }


def _deltas(
    experts: Mapping[str, ExpertWeight], modules: Iterable[str], exact: ExactAdapter
) -> Iterator[tuple[str, Tensor]]:
    """Yield the names of these modules' weights and of experts' parameters, with delta_W in their shape, in float64."""

    def delta(path: str) -> Tensor:
        module = exact.adapter.modules[path]
        a, b = (exact.tensor(key).value.double() for key in module.keys)
        return module.scaling * b @ a

    for path in modules:
        yield f"{path}.weight", delta(path)
    for stack in exact.adapter.stacks:
        found = torch.stack([delta(stack.expert(index)) for index in range(stack.experts)])
        yield stack.path, found.mT if experts[stack.path].is_transposed else found


@torch.no_grad()
def _add(base: nn.Module, name: str, delta: Tensor) -> dict[str, nn.Parameter]:
    """Add delta_W to a parameter in float64, and return the parameter that this replaced, by its name."""
    parameter = base.get_parameter(name)
    if parameter.shape != delta.shape:
        raise CheckpointError(
            f"{name} has shape {tuple(parameter.shape)} in the base model, but {tuple(delta.shape)} in the adapter; "
            f"name the model that the adapter was trained on with {as_written('model')}."
        )
    adapted = (parameter.cpu().double() + delta).to(parameter.dtype).to(parameter.device)
    put_parameters(base, {name: nn.Parameter(adapted, requires_grad=False)})
    return {name: parameter}


def _pair(exact: ExactAdapter, module: AdaptedModule) -> tuple[Factor, Factor]:
    return exact.factor(module.site("A")), exact.factor(module.site("B"))


def multiplications(source: Checkpoint, tokens: int) -> int:
    """Count the multiplications that apply the cores of all layers to `tokens` tokens."""
    of_site = source.decomposition.of_site
    return sum(of_site(name).multiplications(site.m, site.n, tokens) for name, site in source.sites.items())


@contextmanager
def reference_model(base: nn.Module, adapter: AdapterDir, *, delta_dtype: torch.dtype = torch.float64) -> Iterator[Any]:
    """Adapt a base model for the length of a block, by code that shares nothing with an export where it can.

    PEFT reads a plain adapter from its files and runs it, so that a field or tensor that we misread shows in the
    comparison. The cores of a checkpoint are known to the unfolded model alone. It also runs experts of a PEFT before
    0.19, which the installed one would read transposed.

    Args:
        base: Plain base model, in eval mode, on the device and in the dtype to compute in; it is left as it was.
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
