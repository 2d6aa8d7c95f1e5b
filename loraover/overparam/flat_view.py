"""The cores in an optimizer that holds trained parameters as flat ones, as DeepSpeed's ZeRO gives it them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ReduceOp
from torch.optim import Optimizer

from loraover.common.errors import ConfigError
from loraover.overparam.config import LoraOverConfig
from loraover.overparam.core_group import CoreGroup
from loraover.overparam.optimizer_view import OptimizerView
from loraover.overparam.pieces import Piece, all_reduced, summed
from loraover.overparam.sites import Site


class FlatView(OptimizerView):
    """The cores in an optimizer whose parameter groups are a flat parameter each, with pieces of the matrices in it.

    A flat parameter takes every step, and what that makes of matrices which have cores is overwritten by their
    contraction. Every process steps all cores, alike. ZeRO steps one parameter group after another, and with each the
    cores of its matrices.
    """

    def __init__(self, optimizer: Optimizer, config: LoraOverConfig) -> None:
        super().__init__(optimizer, config)
        self._count = len(optimizer.param_groups)
        self._numbers = {id(group["params"][0]): i for i, group in enumerate(optimizer.param_groups) if group["params"]}
        self._groups: dict[int, int] = {}  # by the identity of the matrices' parameters

    def check_holds(self, sites: Iterable[Site]) -> None:
        """Find the parameter group of each site, and check that nothing needs the gradients of all at once.

        Raises:
            ConfigError: There are several groups, and a score or bases follow the gradients.
        """
        if self._count > 1 and (self.config.schedule == "dynamic" or not self.config.make_decomposition().trains_all):
            raise ConfigError(
                f"attach: DeepSpeed's ZeRO steps the {self._count} parameter groups of this optimizer one after "
                "another, and a dynamic schedule, or bases that follow gradients, need the gradients of all groups at "
                "once. Give all trained parameters one group (no LoRA+, and weight decay for all or none), or train "
                "with DDP or FSDP2."
            )
        pieces = _pieces(sites)
        if pieces:
            numbers = torch.tensor([piece.group for _, piece in pieces], device=pieces[0][1].values.device)
            numbers = all_reduced(numbers, ReduceOp.MAX)  # a process without a piece does not know its group
            self._groups |= dict(zip((id(site.parameter) for site, _ in pieces), numbers.tolist(), strict=True))

    def gradients(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        """Return the gradients (m, n) by name, summed from all processes' pieces; of the group that is stepped."""
        (place, number), held = self._present(), _pieces(sites)
        gradient = self._flat(place).grad
        here = [(site, piece) for site, piece in held if self._groups[id(site.parameter)] == number]
        return summed({site.name: piece.spread(piece.of(gradient)) for site, piece in here})

    def state_of(self, site: Site) -> dict[str, Any]:
        """Return the optimizer's state of one matrix, by the optimizer's own keys."""
        flat = self._flat(self._present()[0])
        state = self.optimizer.state.get(flat, {})
        ((_, piece),) = _pieces([site])
        moments = {k: v for k, v in state.items() if isinstance(v, Tensor) and v.shape == flat.shape}
        return {**state, **summed({key: piece.spread(piece.of(value)) for key, value in moments.items()})}

    def _hosts(self) -> dict[int, int]:
        """Return the number of the parameter group that holds a parameter, by the parameter's identity."""
        return self._groups

    def shown(self) -> list[tuple[int, CoreGroup]]:
        """Return the cores that this step of the optimizer trains, each with the place of its parameter group."""
        place, number = self._present()
        return [(place, group) for index, group in self._hosted if index == number]

    def ends_step(self) -> bool:
        """Whether this step of the optimizer is the last one of a training step."""
        return self._present()[1] == self._count - 1

    def is_regrouped(self) -> bool:
        """Whether parameters have changed their groups: never, ZeRO keeps its own lists."""
        return False

    def is_filled_by_this_step(self) -> bool:
        """Whether the step that begins only fills an empty state: never, ZeRO has filled it before cores are there."""
        return False

    def fill_state(self) -> None:
        """Leave the state as it is: it has every parameter's."""

    def empty_state(self) -> None:
        """Leave the state as it is: it belongs to other parameters, too."""

    def _present(self) -> tuple[int, int]:
        """Return place and number of the group that is stepped: ZeRO 2 shows no other, ZeRO 3 leaves others empty."""
        place = next(i for i, group in enumerate(self.optimizer.param_groups) if group["params"])
        return place, self._numbers.get(id(self._flat(place)), place)

    def _flat(self, place: int) -> Any:
        parameters: list[nn.Parameter] = self.optimizer.param_groups[place]["params"]
        return parameters[0]


def _pieces(sites: Iterable[Site]) -> list[tuple[Site, Piece]]:
    return [(site, site.piece) for site in sites if site.piece is not None]
