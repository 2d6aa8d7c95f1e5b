"""A tiny Llama whose bases are measured, and what NumPy makes of the inputs and gradients that it records."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor, nn

from loraover import LoraOverConfig, OverParameterization, Probe
from loraover.overparam.block_bases import Blocks, Side
from loraover.overparam.decompositions import Eigen
from loraover.overparam.sites import lora_layers

from oracles.contraction import Array
from support.tiny_models import token_ids

MEASURED = {"short": "calibration", "long": "calibration", "block": 16}
BATCHES = [{"input_ids": batch, "labels": batch} for batch in (token_ids(seed) for seed in range(3))]
LAYER = "model.layers.1.self_attn"


def measured(model: Any, batches: Any = BATCHES, **options: Any) -> OverParameterization:
    config = LoraOverConfig(decomposition="eigen", options=MEASURED | options)
    return OverParameterization(model, config, probe=Probe(model, batches))


class Recorded:
    """Inputs and output gradients of each LoRA layer, (tokens, features) float64, as PyTorch's own hooks see them."""

    def __init__(self, model: Any, batches: Any) -> None:
        self.inputs: dict[str, list[Array]] = {}
        self.gradients: dict[str, list[Array]] = {}
        self.of_matrices: dict[str, Array] = {}
        handles = []
        for name, layer in lora_layers(model).items():
            handles.append(layer.register_forward_pre_hook(self._note(name)))
            handles.append(layer.register_full_backward_hook(self._note_gradient(name)))
        model.train()
        for batch in batches:
            model(**batch).loss.backward()
        model.eval()
        for handle in handles:
            handle.remove()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                self.of_matrices[name] = parameter.grad.double().numpy().copy()
        model.zero_grad()

    def _note(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.inputs.setdefault(name, []).append(tokens(inputs[0]))

        return note

    def _note_gradient(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, inputs: Any, outputs: tuple[Tensor, ...]) -> None:
            self.gradients.setdefault(name, []).append(tokens(outputs[0]))

        return note

    def covariance(self, name: str, matrix: str) -> Array:
        """C_in for A, C_out for B."""
        rows = np.concatenate((self.inputs if matrix == "A" else self.gradients)[name])
        return rows.T @ rows


def tokens(x: Tensor) -> Array:
    return x.detach().double().reshape(-1, x.shape[-1]).numpy()


def blocks_of(basis: Tensor) -> list[Array]:
    """Blocks of a core (count * size, size)."""
    return list(basis.reshape(-1, basis.shape[1], basis.shape[1]).double().numpy())


def assert_diagonalises(basis: Tensor, moment: Array, division: Blocks) -> None:
    """Block by block, to within float32 sums; the diagonal decreases."""
    ends = np.cumsum([len(part) for part in np.array_split(np.arange(len(moment)), division.number)])
    for end, block in zip(ends, blocks_of(basis), strict=True):
        size = division.size if division.full == division.number or end <= division.full * division.size else None
        size = size or division.size - 1
        v, c = block[:size, :size], moment[end - size : end, end - size : end]
        turned = v.T @ c @ v
        # A sum over 96 tokens in float32, then u of the core, on a symmetric matrix.
        error = 200 * 2.0**-24 * np.linalg.norm(c)
        assert np.linalg.norm(turned - np.diag(np.diag(turned))) <= error
        assert (np.diff(np.diag(turned)) <= error).all()
        assert np.linalg.norm(v.T @ v - np.eye(size)) < 1e-5


def basis_of(over: OverParameterization, name: str, side: Side) -> tuple[Tensor, Blocks]:
    group, i = over.injected[name]
    eigen = over.decomposition
    assert isinstance(eigen, Eigen)
    k, division = eigen.bases.core(side, *group.shape), eigen.bases.blocks(side, *group.shape)
    assert k is not None
    assert division is not None
    return group.core(k, i), division


def kept(moment: Array, division: Blocks) -> Array:
    """A matrix of which only the diagonal blocks are left."""
    mask = np.zeros_like(moment)
    for part in np.array_split(np.arange(len(moment)), division.number):
        mask[np.ix_(part, part)] = 1
    return moment * mask
