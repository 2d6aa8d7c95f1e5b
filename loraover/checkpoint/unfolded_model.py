"""The unfolded model: cores applied to activations, no A or B ever formed.

It knows nothing of PEFT, so that it can bear witness against a folded adapter that PEFT has loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from loraover.checkpoint.checkpoint import Checkpoint
from loraover.checkpoint.exact_tensors import Factor, adapter_of, open_exact
from loraover.checkpoint.peft_adapter import KEY_PREFIX, AdapterDir
from loraover.checkpoint.tensor_file import TensorFile
from loraover.common.errors import CheckpointError

WITHOUT_FLOAT64 = ("mps",)  # devices whose share of the work in float64 the CPU does


class _Apply:
    """x -> x M^T for M given by cores, or by itself where it is not over-parameterised."""

    def __init__(self, factor: Factor) -> None:
        self._factor = factor
        self._cores = factor.cores

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        self._cores = tuple(core.to(device).to(dtype) for core in self._cores)

    def __call__(self, x: Tensor) -> Tensor:
        factor = self._factor
        if factor.decomposition is None:
            return x @ self._cores[0].mT
        applied = factor.decomposition.apply(self._cores, x.reshape(1, -1, factor.n), factor.m, factor.n)
        return applied.reshape(*x.shape[:-1], factor.m)


@contextmanager
def unfolded(
    base: nn.Module, source: Checkpoint | AdapterDir, *, delta_dtype: torch.dtype = torch.float64
) -> Iterator[nn.Module]:
    """The base model with the checkpoint's cores beside its weights, for the length of a block.

    Each adapted module returns W x + scaling * B(A(x)); A and B act through their cores, or as they are
    stored where they have none. Evaluation only: LoRA dropout is not applied.

    W x is computed as the base model does. The rest is float64, so that the error of a reference does not grow with
    the number of cores, of which a folded adapter has none.

    Args:
        base: the plain base model, in eval mode and in the dtype to compute in.
        source: a checkpoint, or a plain adapter.
        delta_dtype: dtype that cores are applied in; float32 costs what training through the cores would.

    Raises:
        CheckpointError: the adapter was trained on another base model: a module is missing or has
            other dimensions, or its start had changed the weights.
    """
    handles = []
    saved: dict[str, nn.Parameter] = {}
    adapter = adapter_of(source)
    adapter.check_keeps_base()
    modules = {name.rpartition(".")[0]: name.rpartition(".")[2].startswith("lora_embedding") for name in adapter.sites}
    try:
        with open_exact(source) as exact:
            for module, is_embedding in modules.items():
                kind = "lora_embedding_" if is_embedding else "lora_"
                factor_a, factor_b = (exact.factor(f"{module}.{kind}{matrix}") for matrix in "AB")
                target = target_module(base, module, factor_a.n, factor_b.m, adapter)
                a, b = _Apply(factor_a), _Apply(factor_b)
                bias_key = f"{KEY_PREFIX}{module}.lora_B.bias"
                bias = exact.plain.read(bias_key) if bias_key in exact.plain.keys else None
                embedding = factor_a.n if is_embedding else None
                delta = _add_delta(a, b, bias, adapter.config.scaling(module), embedding, delta_dtype)
                handles.append(target.register_forward_hook(delta))
            saved.update(load_others(base, adapter, exact.plain))
        yield base
    finally:
        for handle in handles:
            handle.remove()
        put_parameters(base, saved)


def _add_delta(
    a: _Apply, b: _Apply, bias: Tensor | None, scaling: float, embedding: int | None, dtype: torch.dtype
) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        device = torch.device("cpu") if output.device.type in WITHOUT_FLOAT64 else output.device
        wide = torch.promote_types(output.dtype, dtype)
        a.to(device, wide)
        b.to(device, wide)
        x, scale = args[0].to(device), 1.0
        if embedding is None:
            x = x.to(wide)
        else:
            x = nn.functional.one_hot(x, embedding).to(wide)
            scale = getattr(module, "embed_scale", 1.0)  # Gemma scales its embeddings inside the module
        delta: Tensor = b(a(x))
        if bias is not None:
            delta = delta + bias.to(device).to(wide)
        changed = output.to(device).to(wide) + scaling * scale * delta
        return changed.to(output.dtype).to(output.device)

    return hook


def target_module(base: nn.Module, module: str, n: int, m: int, adapter: AdapterDir) -> nn.Module:
    """The module of the base model that maps n to m features.

    Raises:
        CheckpointError: no such module, or other dimensions; the adapter was trained on another model.
    """
    from transformers.pytorch_utils import Conv1D

    try:
        target = base.get_submodule(module)
    except AttributeError as error:
        raise CheckpointError(
            f"{adapter.path}: the base model ({type(base).__name__}) has no module {module!r}; the adapter was "
            f"trained on {adapter.config.base_model_name_or_path!r}. Name that model with --model."
        ) from error
    match target:
        case nn.Linear():
            found = (target.in_features, target.out_features)
        case Conv1D():
            found = (target.nx, target.nf)
        case nn.Embedding():
            found = (target.num_embeddings, target.embedding_dim)
        case _:
            raise CheckpointError(
                f"{adapter.path}: {module} is a {type(target).__name__}; expected a linear layer or embedding."
            )
    if found != (n, m):
        raise CheckpointError(
            f"{adapter.path}: {module} maps {found[0]} to {found[1]} features in the base model, but {n} to "
            f"{m} in the adapter, which was trained on {adapter.config.base_model_name_or_path!r}. "
            "Name that model with --model."
        )
    return target


def load_others(base: nn.Module, adapter: AdapterDir, plain: TensorFile) -> dict[str, nn.Parameter]:
    """Put other trained parameters (`modules_to_save`, biases, embeddings) into the base model.

    A parameter that modules share, an embedding tied to the head, is replaced only where the adapter names it, as PEFT
    does; it stays shared if both are named with equal values.

    Returns:
        What they replace, by name.

    Raises:
        CheckpointError: one that fits no parameter of the model; nothing is replaced then.
    """
    parameters = dict(base.named_parameters(remove_duplicate=False))
    others: dict[str, nn.Parameter] = {}
    for key in plain.keys:
        name = key.removeprefix(KEY_PREFIX).replace(".base_layer.", ".")
        if key in adapter.sites.values() or name.endswith(".lora_B.bias"):
            continue
        if name not in parameters or tuple(parameters[name].shape) != plain.shape(key):
            raise CheckpointError(f"{plain.path}: {key} fits no parameter of the base model ({type(base).__name__}).")
        value = nn.Parameter(plain.read(key).to(parameters[name]), requires_grad=False)
        twins = (o for other, o in others.items() if parameters[other] is parameters[name] and torch.equal(o, value))
        others[name] = next(twins, value)
    replaced = {name: parameters[name] for name in others}
    put_parameters(base, others)
    return replaced


def put_parameters(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Replace parameters by name."""
    for name, parameter in parameters.items():
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, parameter)
