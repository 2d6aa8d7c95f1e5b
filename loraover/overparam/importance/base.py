"""What every score supplies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from loraover.common.errors import ConfigError
from loraover.overparam.sharding import full
from loraover.overparam.sites import Site

Loss = Callable[[Any, Any], Tensor]
"""Mean loss of a model on one batch, a scalar with a graph."""


def model_loss(model: Any, batch: Any) -> Tensor:
    """The loss that a Hugging Face model computes by itself from a batch with labels.

    Raises:
        ConfigError: it computes none from this one.
    """
    loss: Tensor | None = model(**batch).loss
    if loss is None:
        raise ConfigError(
            f"the model computes no loss from a batch of {', '.join(batch)}; give the trainer's as `loss`, "
            "a function of the model and a batch."
        )
    return loss


@dataclass(frozen=True)
class Probe:
    """Fixed batches on which a score can run the model; the same in every process.

    Args:
        model: the PEFT model, or a wrapper of it.
        batches: collated.
        loss: of the model on one of them.
    """

    model: nn.Module
    batches: Sequence[Any]
    loss: Loss = model_loss


class Score(ABC):
    """Ranks sites by how much they might profit from cores; more is better.

    Args:
        sites: all candidates, by name.
        seed: for random draws.
    """

    needs_probe: ClassVar[bool] = False

    def __init__(self, sites: Mapping[str, Site], seed: int) -> None:
        self.sites = dict(sites)
        self.seed = seed

    @abstractmethod
    def values(self, probe: Probe | None) -> dict[str, float]:
        """The score of every site.

        Args:
            probe: where `needs_probe` is true.
        """


class GradientScore(Score):
    """A mean over steps of a number that M and dL/dM give.

    Each step's gradients enter divided by their joint norm over all sites, so that neither clipping nor a loss scale
    counts, nor does a step with a large loss count more than another. A step with a gradient that is not finite is
    left out.
    """

    def __init__(self, sites: Mapping[str, Site], seed: int) -> None:
        super().__init__(sites, seed)
        shapes: dict[Any, list[str]] = {}
        for name, site in sites.items():
            shapes.setdefault((site.shape, site.parameter.device), []).append(name)
        self._groups = list(shapes.values())
        self._sums: list[Tensor | None] = [None] * len(self._groups)
        self._steps: Tensor | None = None

    @abstractmethod
    def of(self, group: int, matrices: Callable[[], Tensor], gradients: Tensor, counts: Tensor) -> Tensor:
        """One step's number for each of G matrices of one shape.

        Args:
            group: their index, for what is kept between steps.
            matrices: makes the (G, m, n) stack of M.
            gradients: (G, m, n), normalised.
            counts: bool on the gradients' device, whether the step counts; otherwise what is kept stays as it is.

        Returns:
            (G,)
        """

    @torch.no_grad()
    def observe(self, gradients: Mapping[str, Tensor]) -> None:
        """Take note of one optimizer step's gradients, before it is taken.

        Args:
            gradients: dL/dM of every site that has one, (m, n).
        """
        stacks = []
        for names in self._groups:
            site = self.sites[names[0]]
            zero = torch.zeros(site.shape, device=site.parameter.device)
            stacks.append(torch.stack([gradients.get(name, zero) for name in names]).float())
        norm = joint_norm(stacks)
        counts = norm.isfinite() & (norm > 0)
        self._steps = counts.long() if self._steps is None else self._steps + counts
        for i, (names, stack) in enumerate(zip(self._groups, stacks, strict=True)):
            there = counts.to(stack.device)
            scaled = torch.where(there, stack.div_(norm.to(stack.device)), 0.0)
            found = self.of(i, partial(self._matrices, names), scaled, there).to(_widest(stack.device))
            total = self._sums[i]
            self._sums[i] = torch.where(there, found, 0.0) + (0.0 if total is None else total)

    def _matrices(self, names: Sequence[str]) -> Tensor:
        return full(torch.stack([self.sites[name].parameter.detach() for name in names])).float()

    def values(self, probe: Probe | None) -> dict[str, float]:
        scores = dict.fromkeys(self.sites, 0.0)
        steps = 0 if self._steps is None else int(self._steps)
        for names, total in zip(self._groups, self._sums, strict=True):
            if total is not None and steps:
                scores.update(zip(names, (total.cpu().double() / steps).tolist(), strict=True))
        return scores

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs to go on."""
        if self._steps is None or not int(self._steps):
            return {}
        sums = {f"sum.{i}": total.cpu().double() for i, total in enumerate(self._sums) if total is not None}
        return {"steps": self._steps.cpu()} | sums

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` gave."""
        if not state:
            return
        self._steps = state["steps"]
        devices = [self.sites[names[0]].parameter.device for names in self._groups]
        self._sums = [state[f"sum.{i}"].to(_widest(device)).to(device) for i, device in enumerate(devices)]


def joint_norm(stacks: Sequence[Tensor]) -> Tensor:
    """Frobenius norm of all tensors together, a scalar on the first one's device, without waiting for any device."""
    squares = [stack.square().sum() for stack in stacks]
    return torch.stack([square.to(squares[0].device, non_blocking=True) for square in squares]).sum().sqrt()


def _widest(device: torch.device) -> torch.dtype:
    """The widest floating-point type of a device; an Apple GPU has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
