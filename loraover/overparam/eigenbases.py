"""Bases that follow a run's gradients: the auxiliary cores of `eigen`, kept at the eigenvectors of second moments."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from math import ceil, sqrt
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from loraover.overparam.block_bases import (
    SIDES,
    Blocks,
    Side,
    eigenvectors,
    next_eigenvectors,
    orthonormalised,
    packed,
    turn,
    unpacked,
)
from loraover.overparam.config import LoraOverConfig
from loraover.overparam.core_group import CoreGroup, full_precision
from loraover.overparam.decompositions import Decomposition
from loraover.overparam.importance import joint_norm
from loraover.overparam.optimizers import BLIND, LINEAR, ROTATED, SQUARED, converted
from loraover.overparam.sharding import of_first_process

logger = logging.getLogger("loraover")


NUMBERS_AT_ONCE = {"cpu": 2**17}
"""How many numbers of a step's moments are computed together, so that they stay in a CPU's cache; elsewhere 2^28."""

REFRESHED_AT_ONCE = 8
"""How many times as many a refresh turns together."""


class BasisFollower:
    """Running second moments of a group's gradients, and the bases that follow them.

    A basis starts as the identity or where calibration has put it. Once a site has had enough gradients to span a
    block, its basis becomes the eigenvectors of the moment. Later refreshes sort the present columns by their estimated
    eigenvalues, and the optimizer's squares with them, and take one step of QR iteration, in which columns keep their
    sign. Each turn leaves M and the exact part of the optimizer's state as they are.

    A moment is kept in the axes of its basis, where it is nearly diagonal, as the upper triangles of its blocks. There,
    bfloat16 holds it for float32 cores: it rounds an element by at most 0.4 % of itself, and the square of a small
    direction's gradients is not beside that of a large one's, as it is in the matrix's own axes.
    """

    def __init__(self, group: CoreGroup) -> None:
        assert group.decomposition.bases is not None
        self.group, self.bases = group, group.decomposition.bases
        self.rule = self.bases.rule
        m, n = group.shape
        count, device = len(group.sites), group.stacks[0].device
        self.blocks: dict[Side, Blocks] = {}
        self.moments: dict[Side, Tensor] = {}
        self.started: dict[Side, Tensor] = {}
        for side in SIDES:
            blocks = self.bases.blocks(side, m, n)
            if blocks is None or self.bases.source(side, m, n) != "gradient":
                continue
            self.blocks[side] = blocks
            kept = torch.bfloat16 if group.dtype == torch.float32 else group.dtype
            self.moments[side] = torch.zeros(count, blocks.number, blocks.triangle, dtype=kept, device=device)
            self.started[side] = torch.zeros(count, dtype=torch.bool, device=device)
        self.seen = torch.zeros(count, dtype=torch.long, device=device)
        self.counted = torch.zeros((), dtype=torch.long, device=device)
        self.steps = 0  # at least `counted`, which would have to be waited for
        self.due: int | None = self.rule.refresh if self.blocks else None

    @property
    def numbers(self) -> int:
        """Number of values in the moments."""
        return sum(moment.numel() for moment in self.moments.values())

    @torch.no_grad()
    def observe(self, gradients: Tensor, counts: Tensor) -> None:
        """Note a step's gradients of the centre cores (G, m, n), divided by their joint norm.

        They are U^T G V, so that their second moments are those of G in the axes of the bases. `counts` is false if
        any gradient is not finite.
        """
        if self.due is None:
            return
        self.steps += 1
        there = counts.to(gradients.device)
        self.counted += there
        clean = torch.where(there, gradients, 0.0)
        has_gradient = clean.flatten(1).any(1)
        self.seen += has_gradient
        share = 1 - self.rule.decay
        kept = (1 - share * has_gradient.to(clean.dtype))[:, None, None]
        clean *= sqrt(share)
        with full_precision(clean.device):
            for side, blocks in self.blocks.items():
                split = blocks.split(clean if side == "columns" else clean.mT).transpose(1, 2)  # (G, count, ..., size)
                number = _sites_at_once(blocks, clean.device)
                for start in range(0, len(split), number):
                    part = slice(start, start + number)
                    new, moment = split[part], self.moments[side][part]
                    moment.copy_(
                        packed(new.mT @ new).add_(moment.to(kept.dtype).mul_(kept[part]))
                    )  # summed in the cores' dtype

    @torch.no_grad()
    def refresh(self) -> None:
        """Turn the bases after a step, where a refresh is due."""
        if self.due is None or self.steps < self.due:
            return
        self.steps = int(self.counted)
        if self.steps < self.due:  # steps without a finite gradient do not count
            return
        m, n = self.group.shape
        is_ready = {
            side: self.seen >= ceil(blocks.size / (n if side == "rows" else m)) for side, blocks in self.blocks.items()
        }
        if self.rule.growth is None:
            is_ready = {side: ready & ~self.started[side] for side, ready in is_ready.items()}
        with full_precision(self.group.stacks[0].device):
            for part in self._parts():
                self._refresh_part(part, {side: ready[part] for side, ready in is_ready.items()})
        for side, ready in is_ready.items():
            self.started[side] |= ready
        if self.rule.growth is not None:
            self.due = self.rule.next_refresh(self.steps)
        else:
            self.due = None if all(bool(started.all()) for started in self.started.values()) else 2 * self.steps

    def _parts(self) -> list[slice]:
        """Ranges of sites whose bases are computed together, so that a refresh needs little memory."""
        count, device = len(self.group.sites), self.group.stacks[0].device
        number = min(_sites_at_once(blocks, device, REFRESHED_AT_ONCE) for blocks in self.blocks.values())
        return [slice(start, min(start + number, count)) for start in range(0, count, number)]

    def _refresh_part(self, part: slice, is_ready: Mapping[Side, Tensor]) -> None:
        """Turn the bases of some sites."""
        turns: dict[Side, tuple[Tensor, Tensor]] = {}
        squares: dict[Side, Tensor] = {}
        for side, blocks in self.blocks.items():
            has_started, ready = self.started[side][part], is_ready[side]
            old, moment = self._basis(side)[part], self.moments[side][part]
            whole = unpacked(moment, blocks.size, old.dtype)
            rotation, order = self._rotation(whole, has_started, blocks)
            new = of_first_process(torch.where(_wide(ready), orthonormalised(old @ rotation), old))
            identity = torch.eye(blocks.size, dtype=new.dtype, device=new.device)
            change = torch.where(_wide(ready), old.mT @ new, identity)
            is_kept = has_started & ready & (self.rule.second_moments == "kept")
            turns[side] = new, change
            squares[side] = torch.where(_wide(is_kept), of_first_process(order), change.square())
            moment.copy_(packed(change.mT @ whole @ change))
        self._turn(part, turns, squares)

    def _basis(self, side: Side) -> Tensor:
        """A side's present bases, (G, count, size, size), a view."""
        present = self.bases.of(self.group.stacks, side, *self.group.shape)
        assert present is not None
        return present[0]

    def _rotation(self, moment: Tensor, has_started: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
        """From the present bases to the next ones, and the order into which a basis that has started was put."""
        flags = has_started.tolist()
        if not any(flags):
            rotation = eigenvectors(moment, blocks)
            return rotation, rotation
        rotation, order = next_eigenvectors(moment, blocks)
        if not all(flags):
            rotation = torch.where(_wide(has_started), rotation, eigenvectors(moment, blocks))
        return rotation, order

    def _turn(self, part: slice, turns: Mapping[Side, tuple[Tensor, Tensor]], squares: Mapping[Side, Tensor]) -> None:
        """Turn bases, centre cores and the optimizer's moments of these: those of squares by `squares`."""
        group = self.group
        held = [stack[part] for stack in group.stacks]
        for stack, new in zip(held, self.bases.turned(held, turns, *group.shape), strict=True):
            stack.copy_(new)
        changes = {side: change for side, (_, change) in turns.items()}
        parameters = group.parameters(group.centre)
        for at, parameter in enumerate(parameters if group.is_joined else parameters[part]):
            here = slice(None) if group.is_joined else slice(at, at + 1)

            def turned(moment: Tensor, squared: bool, here: slice = here) -> Tensor:
                for side, change in (squares if squared else changes).items():
                    moment = turn(moment, change[here].to(moment.dtype), self.blocks[side], side)
                return moment

            state = group.state.get(parameter, {})
            moments = {
                key: value[part] if group.is_joined else value.unsqueeze(0)
                for key, value in state.items()
                if key in LINEAR | SQUARED and isinstance(value, Tensor) and value.shape == parameter.shape
            }
            for key, moment in converted(moments, turned).items():
                moments[key].copy_(moment)

    def stop(self) -> None:
        """Leave the bases as they are from now on."""
        self.due = None

    def divided(self, group: CoreGroup, part: Sequence[int]) -> BasisFollower:
        """Return the follower of a group that has a part of this group's sites."""
        follower = BasisFollower(group)
        for at, i in enumerate(part):
            follower.load_site_state(at, self.site_state(i))
        return follower

    def site_state(self, i: int) -> dict[str, Tensor]:
        """State of a site that a resumed run needs."""
        state = {f"moment.{side}": moment[i].cpu() for side, moment in self.moments.items()}
        state |= {f"started.{side}": started[i].cpu() for side, started in self.started.items()}
        counts = torch.tensor([int(self.seen[i]), int(self.counted), -1 if self.due is None else self.due])
        return state | {"counts": counts}

    def earlier_forms(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor that earlier versions wrote in another form than `site_state`, by key.

        They kept moments in the matrix's own axes, as whole blocks in the cores' dtype.
        """
        shapes = {side: (blocks.number, blocks.size, blocks.size) for side, blocks in self.blocks.items()}
        return {f"moment.{side}": (shape, self.group.dtype) for side, shape in shapes.items()}

    def load_site_state(self, i: int, state: Mapping[str, Any]) -> None:
        """Restore what `site_state` gave, or an earlier version's; the group has its cores already."""
        for side in self.blocks:
            moment = state[f"moment.{side}"]
            if moment.ndim == 3:
                basis = self._basis(side)[i]
                moment = packed((basis.mT @ moment.to(basis) @ basis).unsqueeze(0))[0]
            self.moments[side][i] = moment
            self.started[side][i] = state[f"started.{side}"]
        seen, self.steps, due = state["counts"].tolist()
        self.seen[i] = seen
        self.counted.fill_(self.steps)
        self.due = None if due < 0 else due


class Followers(dict[CoreGroup, BasisFollower]):
    """The followers of a run, by the group that each follows; empty unless the decomposition has bases."""

    def __init__(self, decomposition: Decomposition, names: Iterable[str]) -> None:
        super().__init__()
        self._decomposition = decomposition
        self._places = {name: place for place, name in enumerate(names)}

    @property
    def numbers(self) -> int:
        """Number of values in the moments of all followers."""
        return sum(follower.numbers for follower in self.values())

    def add(self, group: CoreGroup) -> None:
        """Follow a new group from now on, if its decomposition has bases."""
        if self._decomposition.bases is not None:
            self[group] = BasisFollower(group)

    def divide(self, group: CoreGroup, parts: Mapping[CoreGroup, Sequence[int]]) -> None:
        """Follow the parts of a group in its place."""
        if group in self:
            follower = self.pop(group)
            self.update({part: follower.divided(part, indices) for part, indices in parts.items()})

    def check_optimizer(self, optimizer: Optimizer) -> None:
        """Warn of an optimizer for which bases do nothing, or whose state cannot be turned into another basis."""
        if self._decomposition.bases is not None and type(optimizer) in BLIND:
            logger.warning(
                "%s takes the same step in every basis, so decomposition eigen changes nothing with it",
                type(optimizer).__name__,
            )
        self.stop_unturned(optimizer)

    def stop_unturned(self, optimizer: Optimizer) -> None:
        """Stop following gradients, with a warning, where the optimizer's state cannot be turned."""
        following = [follower for follower in self.values() if follower.due is not None]
        kind = type(optimizer)
        if following and kind not in (*BLIND, *ROTATED):
            logger.warning(
                "%s keeps state that cannot be turned into another basis, so bases do not follow its gradients; "
                "give eigen the options {short: calibration, long: calibration}, which need no turning",
                kind.__name__,
            )
            for follower in following:
                follower.stop()

    @torch.no_grad()
    def observe(self, gradients: Mapping[CoreGroup, Tensor]) -> None:
        """Take note of one optimizer step's gradients of each group's centre cores (G, m, n), before it is taken."""
        if not gradients or all(follower.due is None for follower in self.values()):
            return
        # A resumed run may have its groups in another order, in which the norm would round differently.
        ordered = sorted(gradients.items(), key=lambda item: self._places[item[0].sites[0].name])
        norm = joint_norm([stack for _, stack in ordered])
        counts = norm.isfinite() & (norm > 0)
        for group, stack in gradients.items():
            if (follower := self.get(group)) is not None:
                follower.observe(stack / norm.to(stack.device), counts)


def with_measured_bases(config: LoraOverConfig, optimizer: Optimizer) -> LoraOverConfig:
    """Return a configuration whose bases are measured before the run where they could not follow gradients."""
    kind, bases = type(optimizer), config.make_decomposition().bases
    if kind not in (*BLIND, *ROTATED) and bases is not None and (changed := bases.unfollowed()):
        logger.warning(
            "%s keeps state that cannot be turned into another basis, so the bases of eigen are measured before the "
            "run and do not follow its gradients: its options are %s",
            kind.__name__,
            options := {**config.options, **changed},
        )
        return config.model_copy(update={"options": options})
    return config


def _sites_at_once(blocks: Blocks, device: torch.device, times: int = 1) -> int:
    return max(1, times * NUMBERS_AT_ONCE.get(device.type, 2**28) // (blocks.number * blocks.size**2))


def _wide(flags: Tensor) -> Tensor:
    """Reshape a vector (G,) to (G, 1, 1, 1), to multiply it with blocks (G, count, size, size)."""
    return flags[:, None, None, None]
