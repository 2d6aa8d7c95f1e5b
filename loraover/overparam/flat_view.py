"""The cores in an optimizer that holds all trained parameters as one flat one, as DeepSpeed's ZeRO gives it them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from loraover.common.errors import ConfigError
from loraover.overparam.core_group import CoreGroup
from loraover.overparam.eigenbases import Followers
from loraover.overparam.optimizer_view import OptimizerView
from loraover.overparam.pieces import Piece, summed
from loraover.overparam.sites import Site


class FlatView(OptimizerView):
    """The cores in an optimizer that holds pieces of the matrices, beside other parameters, in one flat parameter.

    The flat parameter takes every step, and what that makes of matrices which have cores is overwritten by their
    contraction. Every process steps all cores, alike.
    """

    def check_holds(self, sites: Iterable[Site]) -> None:
        """Check that all trained parameters are one group; ZeRO steps several one after another.

        Raises:
            ConfigError: There are several.
        """
        if len(self.optimizer.param_groups) != 1:
            raise ConfigError(
                f"attach: DeepSpeed's ZeRO steps the {len(self.optimizer.param_groups)} parameter groups of this "
                "optimizer one after another, and cores are stepped together. Give all trained parameters one group "
                "(no LoRA+, and weight decay for all or none), or train with DDP or FSDP2."
            )

    def gradients(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        """Return the gradients (m, n) by name, summed from all processes' pieces."""
        gradient = self._flat.grad
        return summed({site.name: piece.spread(piece.of(gradient)) for site, piece in _pieces(sites)})

    def state_of(self, site: Site) -> dict[str, Any]:
        """Return the optimizer's state of one matrix, by the optimizer's own keys."""
        state = self.optimizer.state.get(self._flat, {})
        ((_, piece),) = _pieces([site])
        moments = {k: v for k, v in state.items() if isinstance(v, Tensor) and v.shape == self._flat.shape}
        return {**state, **summed({key: piece.spread(piece.of(value)) for key, value in moments.items()})}

    def arranged(self, groups: Sequence[CoreGroup], followers: Followers) -> list[CoreGroup]:
        """Let the optimizer see these groups from the next step on."""
        return self._host([(0, group) for group in groups])

    def is_regrouped(self) -> bool:
        """Whether the optimizer's only group has been divided: never, ZeRO keeps its own lists."""
        return False

    def is_filled_by_this_step(self) -> bool:
        """Whether the step that begins only fills an empty state: never, ZeRO has filled it before cores are there."""
        return False

    def fill_state(self) -> None:
        """Leave the state as it is: it has every parameter's."""

    def empty_state(self) -> None:
        """Leave the state as it is: it belongs to other parameters, too."""

    def clear_shared_gradients(self) -> None:
        """Leave the gradients as they are: what the step makes of them is overwritten."""

    @property
    def _flat(self) -> Any:
        """The flat parameter, which ZeRO 3 shows to the optimizer only while it steps."""
        parameters: list[nn.Parameter] = self.optimizer.param_groups[0]["params"]
        return parameters[0]


def _pieces(sites: Iterable[Site]) -> list[tuple[Site, Piece]]:
    return [(site, site.piece) for site in sites if site.piece is not None]
