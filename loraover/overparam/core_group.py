"""Cores of several matrices of one shape, and their contraction."""

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
    """The cores of G sites of one shape that got their cores together.

    For each core there is one contiguous tensor of shape (G, p_k, q_k). The optimizer gets one nn.Parameter for each
    site and core, which is a view into it.

    Args:
        sites: Sites of one shape, device and dtype.
        decomposition: Decomposition that makes the cores.
        seed: Seed of the auxiliary cores' random values, which also depend on each site's name.
        step: Number of optimizer steps taken so far.
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
        """Contract the cores into the matrices (G, m, n), in the cores' dtype."""
        return self.decomposition.contract(self.stacks, *self.shape)

    @torch.no_grad()
    def write(self) -> None:
        """Write the contraction into the model's matrices, cast to their dtype."""
        with _full_precision(self.stacks[0].device):
            matrices = self.contract()
        for site, matrix in zip(self.sites, matrices, strict=True):
            assign(site.parameter, matrix)
        self._written = self._held()

    def changed(self, *, anywhere: bool = False) -> list[Site]:
        """Return the sites whose matrix differs, in any bit, from what `write` wrote.

        Args:
            anywhere: Whether to compare the shards of the other processes too, which must make the same call.
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
        """Copy this process's parts of the matrices."""
        return torch.stack([local(site.parameter.detach()) for site in self.sites])

    def pull_back(self, gradients: Mapping[str, Tensor]) -> None:
        """Convert each site's gradient dL/dM into its cores' gradients, and clear dL/dM.

        The cores of a site without a gradient get none either, so that the optimizer skips them.

        Args:
            gradients: Gradients dL/dM (m, n), not sharded, by site name; sites without one are absent.
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
        """Set the gradients of all cores to None."""
        for parameters in self.parameters:
            for parameter in parameters:
                parameter.grad = None


def _generator(seed: int, name: str) -> torch.Generator:
    """Return a generator that depends on the seed and the site alone, not on the process or the group."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


BACKENDS: Any = torch.backends  # its attributes for precision have no types
MATMULS = (BACKENDS.cuda.matmul, BACKENDS.mkldnn.matmul) if Version(torch.__version__) >= Version("2.9") else ()
"""Backends whose precision is an attribute; before torch 2.9 one older function sets all backends."""


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Turn off autocast, and TF32 and bfloat16 products, while cores are contracted.

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
                matmul.fp32_precision = "none"  # which means the setting of all backends, the former one perhaps
                if matmul.fp32_precision != precision:
                    matmul.fp32_precision = precision


def _older_precision() -> str | None:
    """Return the precision that the older function reports; None where it raises."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None
