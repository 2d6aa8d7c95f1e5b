"""Cores of several matrices of one shape, and their contraction."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn

from loraover.overparam.block_bases import Bases
from loraover.overparam.decompositions import Decomposition
from loraover.overparam.fingerprint import fingerprints
from loraover.overparam.optimizers import PLAIN
from loraover.overparam.sharding import full
from loraover.overparam.sites import Site, write_matrices


class CoreGroup:
    """Cores of G sites that have one shape and got their cores at the same step.

    Core k of all sites is one contiguous tensor, the stack, of shape (G, p_k, q_k). If c neighbouring sites share a
    core, its stack has the shape (G / c, p_k, q_k).

    The optimizer sees a trained stack as one nn.Parameter (`join`) if it updates each number independently of the
    others and if all sites have the same history. Otherwise it sees one nn.Parameter for each site and core (`split`),
    which is a view into the stack.

    Args:
        sites: Sites of one shape, device and dtype.
        decomposition: Decomposition that contracts the cores.
        stacks: The cores, float32 or float64.
        step: Number of optimizer steps taken so far.
    """

    def __init__(
        self, sites: Sequence[Site], decomposition: Decomposition, stacks: Sequence[Tensor], step: int
    ) -> None:
        self.sites = list(sites)
        self.decomposition = decomposition
        self.stacks = list(stacks)
        self.step = step
        self.shape = sites[0].shape
        self.centre = decomposition.centre(*self.shape)
        self.dtype = self.stacks[0].dtype
        self.trained = decomposition.trained(*self.shape)
        self.state: dict[Tensor, dict[str, Any]] = {}
        self._whole = {k: nn.Parameter(self.stacks[k]) for k in self.trained}
        self._each: dict[int, list[nn.Parameter]] = {}
        self._present = [False] * len(self.sites)
        self._written = fingerprints(self._held())

    @classmethod
    def initialised(
        cls,
        sites: Sequence[Site],
        decomposition: Decomposition,
        seed: int,
        step: int,
        bases: Mapping[str, Bases] | None = None,
    ) -> CoreGroup:
        """Cores that contract to the sites' matrices; sites whose columns share a measured basis are neighbours."""
        matrices = full(torch.stack([site.values for site in sites]))
        dtype = torch.promote_types(matrices.dtype, torch.float32)
        generators = [seeded_generator(seed, site.name) for site in sites]
        exact = matrices.cpu().double()  # an Apple GPU has no float64
        columns = [(bases or {}).get(site.name, {}).get("columns") for site in sites]
        is_shared = not decomposition.trains_all and columns[0] is not None
        share = len(sites) // len(set(map(id, columns))) if is_shared else 1
        stacks: list[Tensor] = []
        for start in range(0, len(sites), share):  # those that share a basis, so that little is float64 at once
            here = slice(start, start + share)
            cores = decomposition.init(exact[here], generators[here])
            if bases and decomposition.bases is not None:
                measured = [{side: basis.cpu().double() for side, basis in bases[s.name].items()} for s in sites[here]]
                cores = decomposition.bases.started(cores, measured, *sites[0].shape)
            if not stacks:
                count = len(sites) // share
                stacks = [torch.empty(count * len(core), *core.shape[1:], dtype=dtype) for core in cores]
            for stack, core in zip(stacks, cores, strict=True):
                at = start // share * len(core)
                stack[at : at + len(core)] = core
        stacks = [stack.to(matrices.device) for stack in stacks]
        return cls(sites, decomposition, stacks, step)

    def sharing(self, share: int) -> CoreGroup:
        """The same group with one basis of columns for every `share` neighbours, that of the first neighbour."""
        bases = self.decomposition.bases
        if share == 1 or bases is None:
            return self
        shared = bases.shareable(*self.shape)
        stacks = [stack[::share].contiguous() if k in shared else stack for k, stack in enumerate(self.stacks)]
        return CoreGroup(self.sites, self.decomposition, stacks, self.step)

    def divided(self, parts: Sequence[Sequence[int]]) -> list[CoreGroup]:
        """The same cores and their state in several groups."""
        groups = []
        for part in parts:
            owners = [self._owners(k, part) for k in range(len(self.stacks))]
            stacks = [stack[owned] for stack, owned in zip(self.stacks, owners, strict=True)]
            group = CoreGroup([self.sites[i] for i in part], self.decomposition, stacks, self.step)
            for k in self.trained:
                for at, i in enumerate(owners[k]):
                    if state := self.core_state(k, i):
                        group.load_core_state(k, at, state)
            if self.is_joined:
                group.join()
            groups.append(group)
        return groups

    def _owners(self, k: int, part: Sequence[int]) -> list[int]:
        """Places of a part's cores in the stack of core k; a core that has sites outside the part is shared no more."""
        each = [self.owner(k, i) for i in part]
        share = len(self.sites) // len(self.stacks[k])
        return each[::share] if each == [owner for owner in each[::share] for _ in range(share)] else each

    def core(self, k: int, i: int) -> Tensor:
        """Core k of site i, (p_k, q_k), a view."""
        return self.stacks[k][self.owner(k, i)]

    def owner(self, k: int, i: int) -> int:
        """Place of site i's core in the stack of core k."""
        return i * len(self.stacks[k]) // len(self.sites)

    def first_site(self, k: int, i: int) -> int:
        """Index of the first site that has the same core k as site i."""
        return self.owner(k, i) * len(self.sites) // len(self.stacks[k])

    @property
    def is_joined(self) -> bool:
        """Whether the optimizer sees each stack as one parameter."""
        return not self._each

    def parameters(self, k: int) -> list[nn.Parameter]:
        """Core k as the optimizer sees it at present."""
        return self._each[k] if self._each else [self._whole[k]]

    def split(self) -> None:
        """Show each site's cores to the optimizer by themselves, each with its part of the state."""
        if self._each:
            return
        self._each = {k: [nn.Parameter(core) for core in self.stacks[k]] for k in self.trained}
        for k, whole in self._whole.items():
            state = self.state.pop(whole, None)
            if state is not None:
                self.state.update((p, _part(state, whole, i)) for i, p in enumerate(self._each[k]))

    def join(self) -> None:
        """Show each stack to the optimizer as one parameter, if all sites' states differ only in tensors' values."""
        if not self._each:
            return
        merged = {k: _merged([self.state.get(p, {}) for p in each], self.stacks[k]) for k, each in self._each.items()}
        if any(state is None for state in merged.values()):
            return
        self._each = {}
        self.state = {self._whole[k]: state for k, state in merged.items() if state}

    def core_state(self, k: int, i: int) -> dict[str, Any]:
        """The optimizer's state of core k of the i-th owner, by the optimizer's keys; empty before the first step."""
        if self._each:
            return self.state.get(self._each[k][i], {})
        return _part(self.state.get(self._whole[k], {}), self._whole[k], i)

    def load_core_state(self, k: int, i: int, state: Mapping[str, Any]) -> None:
        """Restore what `core_state` gave; the sites are split until `join`."""
        self.split()
        self.state[self._each[k][i]] = dict(state)

    def move_step_counts(self) -> None:
        """Move the optimizer's `step` of each core to their device, where fused and capturable optimizers count."""
        for state in self.state.values():
            if isinstance(step := state.get("step"), Tensor):
                state["step"] = step.to(self.stacks[0].device)

    @torch.no_grad()
    def renew(self, places: Sequence[int], seed: int) -> None:
        """Make the cores of some sites anew from the matrices that the model holds, and drop their optimizer state.

        Cores that are not trained stay as they are: the centre takes up the matrix in their bases.
        """
        if self.decomposition.trains_all:
            fresh = CoreGroup.initialised([self.sites[i] for i in places], self.decomposition, seed, self.step)
            for stack, made in zip(self.stacks, fresh.stacks, strict=True):
                stack[places] = made
        else:
            held = full(torch.stack([site.values for site in self.sites])).to(self.dtype)
            with full_precision(held.device):
                centres = self.decomposition.to_centre(self.stacks, held, *self.shape)
            self.stacks[self.centre][places] = centres[places]
        self.split()
        for k, each in self._each.items():
            for i in places:
                self.state.pop(each[self.owner(k, i)], None)
        self.write()

    def contract(self) -> Tensor:
        """Contract the cores into the matrices (G, m, n), in the cores' dtype."""
        return self.decomposition.contract(self.stacks, *self.shape)

    @torch.no_grad()
    def write(self) -> None:
        """Write the contraction into the model's matrices, cast to their dtype."""
        with full_precision(self.stacks[0].device):
            matrices = self.contract()
        write_matrices(self.sites, matrices)
        self._written = fingerprints(self._held())

    @torch.no_grad()
    def differs(self) -> Tensor:
        """Tell which sites' matrices differ, in any bit, from what `write` wrote: (G,), bool, on their device."""
        return fingerprints(self._held()) != self._written

    @torch.no_grad()
    def _held(self) -> Tensor:
        """Copy this process's parts of the matrices."""
        return torch.stack([site.held for site in self.sites])

    def gather(self, gradients: Mapping[str, Tensor]) -> Tensor | None:
        """Take each site's gradient dL/dM, and clear it; zero where a site has none, and None if no site has one."""
        for site in self.sites:
            site.clear_gradient()
        self._present = [site.name in gradients for site in self.sites]
        if not any(self._present):
            return None
        if not all(self._present):
            self.split()
        return stacked(gradients, self.sites).to(self.dtype)

    def pull_back(self, dense: Tensor) -> list[Tensor]:
        """Turn what `gather` gave into the trained cores' gradients, and return these, stacked.

        A site without a gradient leaves its cores without one, so that the optimizer skips them.
        """
        with full_precision(dense.device):
            if self.trained == (self.centre,):
                with torch.no_grad():
                    pulled = [self.decomposition.to_centre(self.stacks, dense, *self.shape)]
            else:
                pulled = self._differentiated(dense)
        # Fused optimizers walk through memory: a gradient must lie as its parameter does, as autograd's own do.
        found = [gradient.contiguous() for gradient in pulled]
        for k, stack in zip(self.trained, found, strict=True):
            if not self._each:
                self._whole[k].grad = stack
                continue
            owners = {self.owner(k, i) for i, there in enumerate(self._present) if there}
            for i, (parameter, gradient) in enumerate(zip(self._each[k], stack, strict=True)):
                parameter.grad = gradient if i in owners else None
        return found

    def _differentiated(self, dense: Tensor) -> list[Tensor]:
        """Gradients of all cores that are trained, by automatic differentiation."""
        with torch.enable_grad():
            cores = [stack.detach() for stack in self.stacks]
            leaves = [cores[k].requires_grad_() for k in self.trained]
            matrices = self.decomposition.contract(cores, *self.shape)
            return list(torch.autograd.grad(matrices, leaves, dense))

    def clear_gradients(self) -> None:
        """Set the gradients of all cores to None."""
        for k in self.trained:
            for parameter in self.parameters(k):
                parameter.grad = None


def grouped(sites: Sequence[Site], owners: Mapping[str, str]) -> list[list[Site]]:
    """Sort sites that can be in one group: alike in shape, type, device and kind, with as many sharing each basis."""
    alike: dict[Any, list[Site]] = {}
    for site in sites:
        kind = (site.shape, site.parameter.device, site.parameter.dtype, site.name.rpartition(".")[2])
        alike.setdefault((kind, site.adapter, owners.get(site.name, site.name)), []).append(site)
    groups: dict[Any, list[Site]] = {}
    for (kind, _, _), sharing in alike.items():
        groups.setdefault((kind, len(sharing)), []).extend(sharing)
    return list(groups.values())


def stacked(gradients: Mapping[str, Tensor], sites: Sequence[Site]) -> Tensor:
    """The sites' gradients, (G, m, n); zero where there is none."""
    found = [gradients.get(site.name) for site in sites]
    some = next(gradient for gradient in found if gradient is not None)
    return torch.stack([torch.zeros_like(some) if gradient is None else gradient for gradient in found])


def _part(state: Mapping[str, Any], whole: Tensor, i: int) -> dict[str, Any]:
    """State of the i-th core, taken from the state of its stack."""
    part: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            part[key] = value[i] if value.shape == whole.shape else value.clone()
        else:
            part[key] = value
    return part


def _merged(states: Sequence[Mapping[str, Any]], stack: Tensor) -> dict[str, Any] | None:
    """Join the states of a stack's cores; None where they differ in more than tensors of a core's shape."""
    first = states[0]
    merged: dict[str, Any] = {}
    for key, value in first.items():
        values: list[Any] = [state.get(key) for state in states]
        if isinstance(value, Tensor) and value.shape == stack.shape[1:]:
            if not all(isinstance(v, Tensor) and v.shape == value.shape and v.dtype == value.dtype for v in values):
                return None
            merged[key] = torch.stack(values)
        elif not all(is_alike(v, value) for v in values):
            return None
        else:
            merged[key] = value.clone() if isinstance(value, Tensor) else value
    return merged if all(state.keys() == first.keys() for state in states) else None


def is_alike(one: Any, other: Any) -> bool:
    """Whether an optimizer can keep one of two values for both; never lists, which it changes in place."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    plain = all(isinstance(value, PLAIN) for value in (one if isinstance(one, tuple) else [one]))
    return plain and type(one) is type(other) and bool(one == other or one != one)  # NaN is unlike itself


def seeded_generator(seed: int, name: str) -> torch.Generator:
    """Return a generator that depends on the seed and the site alone, not on the process or the group."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


BACKENDS: Any = torch.backends  # its attributes for precision have no types
MATMULS = (BACKENDS.cuda.matmul, BACKENDS.mkldnn.matmul) if Version(torch.__version__) >= Version("2.9") else ()
"""Backends whose precision is an attribute; before torch 2.9 one older function sets all backends."""


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Turn off autocast, and TF32 and bfloat16 products, while cores are contracted.

    Torch has two ways of setting these: attributes named `fp32_precision`, and older functions, which raise once the
    attributes hold what they cannot express. Both are set, so that code which reads either finds full precision.
    Torch before 2.9 has only the functions.
    """
    precisions = [matmul.fp32_precision for matmul in MATMULS]
    with torch.autocast(device.type, enabled=False):
        if is_full_precision(device):
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


def is_full_precision(device: torch.device) -> bool:
    """Whether neither autocast nor a setting of PyTorch lets products of float32 matrices round to fewer digits."""
    if torch.is_autocast_enabled(device.type):
        return False
    if MATMULS:
        return all(matmul.fp32_precision in ("none", "ieee") for matmul in MATMULS)
    return _older_precision() == "highest"


def _older_precision() -> str | None:
    """Return the precision that the older function reports; None where it raises."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None
