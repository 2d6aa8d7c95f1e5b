"""The cores of some matrices, and what they contract to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn

from loraover.overparam.decompositions import Decomposition
from loraover.overparam.sharding import assign, full, in_any_process, local
from loraover.overparam.sites import Site


class CoreGroup:
    """The cores of sites of one shape, injected together.

    One (G, p_k, q_k) tensor per core, contiguous, and one nn.Parameter per site and core, a view into
    it, for the optimizer.
    """

    def __init__(self, sites: Sequence[Site], decomposition: Decomposition, seed: int, step: int) -> None:
        self.sites = list(sites)
        self.decomposition = decomposition
        self.step = step
        self.shape = sites[0].shape
        self.centre = decomposition.centre(*self.shape)
        matrices = full(torch.stack([site.parameter.detach() for site in sites]))
        self.dtype = torch.promote_types(matrices.dtype, torch.float32)
        generators = [_generator(seed, site.name) for site in sites]
        cores = decomposition.init(matrices.cpu().double(), generators)  # an Apple GPU has no float64
        self.stacks = [core.to(self.dtype).to(matrices.device) for core in cores]
        self.parameters = [[nn.Parameter(core) for core in stack] for stack in self.stacks]
        self._written = self._held()

    def contract(self) -> Tensor:
        """(G, m, n) in the cores' dtype."""
        return self.decomposition.contract(self.stacks, *self.shape)

    @torch.no_grad()
    def write(self) -> None:
        """Write the contraction into the model's matrices, in their own dtype."""
        with _full_precision(self.stacks[0].device):
            matrices = self.contract()
        for site, matrix in zip(self.sites, matrices, strict=True):
            assign(site.parameter, matrix)
        self._written = self._held()

    def changed(self, *, anywhere: bool = False) -> list[Site]:
        """Sites whose matrix is no longer what `write` wrote, bit for bit.

        Args:
            anywhere: ask the other processes about their shards too; they must ask as well.
        """
        held = self._held()
        differs = [False] * len(self.sites)
        if not torch.equal(held, self._written):
            same = (held == self._written) | (held.isnan() & self._written.isnan())
            differs = (~same).flatten(1).any(1).tolist()
        if anywhere:
            differs = in_any_process(differs, self.sites[0].parameter)
        return [site for site, different in zip(self.sites, differs, strict=True) if different]

    def _held(self) -> Tensor:
        """A copy of what this process holds of the matrices."""
        return torch.stack([local(site.parameter.detach()) for site in self.sites])

    def pull_back(self, gradients: Mapping[str, Tensor]) -> None:
        """Turn each site's dL/dM into its cores' gradients, and clear it.

        A site without a gradient leaves its cores without one, so that the optimizer skips them.

        Args:
            gradients: dL/dM of every site that has one, by name, (m, n), whole.
        """
        for site in self.sites:
            site.clear_gradient()
        present = [site.name in gradients for site in self.sites]
        if not any(present):
            return
        zero = torch.zeros(self.shape, dtype=self.dtype, device=self.stacks[0].device)
        dense = [gradients.get(site.name, zero).to(self.dtype) for site in self.sites]
        with torch.enable_grad(), _full_precision(zero.device):
            leaves = [stack.detach().requires_grad_() for stack in self.stacks]
            matrices = self.decomposition.contract(leaves, *self.shape)
            pulled = torch.autograd.grad(matrices, leaves, torch.stack(dense))
        for parameters, stack in zip(self.parameters, pulled, strict=True):
            for parameter, gradient, there in zip(parameters, stack, present, strict=True):
                parameter.grad = gradient if there else None

    def clear_gradients(self) -> None:
        for parameters in self.parameters:
            for parameter in parameters:
                parameter.grad = None


def _generator(seed: int, name: str) -> torch.Generator:
    """The same draws for a site in every process and grouping."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


BACKENDS: Any = torch.backends  # its attributes for precision have no types
MATMULS = (BACKENDS.cuda.matmul, BACKENDS.mkldnn.matmul) if Version(torch.__version__) >= Version("2.9") else ()
"""Backends whose precision is an attribute; before torch 2.9 the older functions speak for all backends."""


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Neither autocast nor TF32 or bfloat16 products while cores are contracted.

    Torch has two ways of setting these: attributes named `fp32_precision`, and older functions, which raise once the
    attributes hold what they cannot express. Both are set, so that code which reads either finds full precision.
    Torch before 2.9 has only the functions.
    """
    precisions = [matmul.fp32_precision for matmul in MATMULS]
    with torch.autocast(device.type, enabled=False):
        if MATMULS and all(precision in ("none", "ieee") for precision in precisions):
            yield
            return
        older = _older_precision()
        if older is not None:
            torch.set_float32_matmul_precision("highest")
        for matmul in MATMULS:
            matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            if older is not None:
                torch.set_float32_matmul_precision(older)
            for matmul, precision in zip(MATMULS, precisions, strict=True):
                matmul.fp32_precision = "none"  # takes the setting of all backends, which it may have had before
                if matmul.fp32_precision != precision:
                    matmul.fp32_precision = precision


def _older_precision() -> str | None:
    """What the older functions say; None where they raise."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None
