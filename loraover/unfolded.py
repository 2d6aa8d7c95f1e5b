"""The unfolded model: cores applied to activations, no A or B ever formed.

It knows nothing of PEFT, so that it can bear witness against a folded adapter that PEFT has loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loraover.adapter_dir import KEY_PREFIX, site_key
from loraover.checkpoint import Checkpoint
from loraover.decompositions import Decomposition
from loraover.errors import CheckpointError
from loraover.tensor_file import TensorFile, open_tensors


@dataclass
class _Factor:
    """x -> x M^T for M given by cores, or by itself where it is not over-parameterised."""

    decomposition: Decomposition | None
    cores: tuple[Tensor, ...]
    m: int
    n: int

    def to(self, place: torch.device | torch.dtype) -> None:
        self.cores = tuple(core.to(place) for core in self.cores)

    def __call__(self, x: Tensor) -> Tensor:
        if self.decomposition is None:
            return x @ self.cores[0].mT
        return self.decomposition.apply(self.cores, x.reshape(1, -1, self.n), self.m, self.n).reshape(
            *x.shape[:-1], self.m
        )


@contextmanager
def unfolded(base: nn.Module, checkpoint: Checkpoint) -> Iterator[nn.Module]:
    """The base model with the checkpoint's cores beside its weights, for the length of a block.

    Each adapted module returns W x + scaling * B(A(x)); A and B act through their cores. Evaluation only:
    LoRA dropout is not applied.

    Args:
        base: the plain base model, in eval mode and in the dtype to compute in.
        checkpoint: whose cores.
    Raises:
        CheckpointError: the checkpoint was trained on another base model: a module is missing or has
            other dimensions.
    """
    handles = []
    saved: dict[nn.Parameter, Tensor] = {}
    modules = {
        name.rpartition(".")[0]: name.rpartition(".")[2].startswith("lora_embedding")
        for name in checkpoint.adapter.sites
    }
    try:
        with open_tensors(checkpoint.cores_path) as cores, open_tensors(checkpoint.adapter.tensors_path) as plain:
            for module, is_embedding in modules.items():
                target = _target(base, module, checkpoint)
                weight = next(target.parameters())
                kind = "lora_embedding_" if is_embedding else "lora_"
                a, b = (_factor(checkpoint, f"{module}.{kind}{matrix}", cores, plain) for matrix in "AB")
                a.to(weight.device)
                b.to(weight.device)
                _check_dimensions(target, module, a.n, b.m, checkpoint)
                bias_key = f"{KEY_PREFIX}{module}.lora_B.bias"
                bias = plain.read(bias_key).to(weight.device) if bias_key in plain.keys else None
                scaling = checkpoint.adapter.config.scaling(module)
                handles.append(target.register_forward_hook(_add_delta(a, b, bias, scaling)))
            _load_others(base, checkpoint, plain, saved)
        yield base
    finally:
        for handle in handles:
            handle.remove()
        for parameter, original in saved.items():
            parameter.data = original


def _factor(checkpoint: Checkpoint, name: str, cores: TensorFile, plain: TensorFile) -> _Factor:
    site = checkpoint.sites.get(name)
    if site is None:
        matrix = plain.read(site_key(name))
        m, n = matrix.shape
        return _Factor(None, (matrix,), m, n)
    return _Factor(checkpoint.decomposition, checkpoint.read_cores(cores, site), site.m, site.n)


def _add_delta(a: _Factor, b: _Factor, bias: Tensor | None, scaling: float) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        wide = torch.promote_types(output.dtype, torch.float32)
        a.to(wide)
        b.to(wide)
        if isinstance(module, nn.Embedding):
            x = nn.functional.one_hot(args[0], a.n).to(wide)
            scale = getattr(module, "embed_scale", 1.0)  # Gemma scales its embeddings inside the module
        else:
            x, scale = args[0].to(wide), 1.0
        delta: Tensor = b(a(x))
        if bias is not None:
            delta = delta + bias.to(wide)
        changed: Tensor = (output.to(wide) + scaling * scale * delta).to(output.dtype)
        return changed

    return hook


def _target(base: nn.Module, module: str, checkpoint: Checkpoint) -> nn.Module:
    try:
        return base.get_submodule(module)
    except AttributeError as error:
        raise CheckpointError(
            f"{checkpoint.path}: the base model ({type(base).__name__}) has no module {module!r}; the adapter was "
            f"trained on {checkpoint.meta.base_model!r}. Name that model with --base."
        ) from error


def _check_dimensions(target: nn.Module, module: str, n: int, m: int, checkpoint: Checkpoint) -> None:
    from transformers.pytorch_utils import Conv1D

    match target:
        case nn.Linear():
            found = (target.in_features, target.out_features)
        case Conv1D():
            found = (target.nx, target.nf)
        case nn.Embedding():
            found = (target.num_embeddings, target.embedding_dim)
        case _:
            raise CheckpointError(
                f"{checkpoint.path}: {module} is a {type(target).__name__}; expected a linear layer or embedding."
            )
    if found != (n, m):
        raise CheckpointError(
            f"{checkpoint.path}: {module} maps {found[0]} to {found[1]} features in the base model, but {n} to "
            f"{m} in the adapter, which was trained on {checkpoint.meta.base_model!r}. Name that model with --base."
        )


def _load_others(base: nn.Module, checkpoint: Checkpoint, plain: TensorFile, saved: dict[nn.Parameter, Tensor]) -> None:
    """Put other trained parameters (`modules_to_save`, biases, embeddings) into the base model.

    Mutates: `saved`, which gets what they replace.
    """
    parameters = dict(base.named_parameters(remove_duplicate=False))
    for key in plain.keys:
        name = key.removeprefix(KEY_PREFIX).replace(".base_layer.", ".")
        if key in checkpoint.adapter.sites.values() or name.endswith(".lora_B.bias"):
            continue
        if name not in parameters or tuple(parameters[name].shape) != plain.shape(key):
            raise CheckpointError(f"{plain.path}: {key} fits no parameter of the base model ({type(base).__name__}).")
        parameter = parameters[name]
        saved.setdefault(parameter, parameter.data)
        parameter.data = plain.read(key).to(parameter)
