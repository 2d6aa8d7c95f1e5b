"""Interface of all scores."""

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
"""Function of a model and a batch that returns the mean loss, a scalar with a graph."""


def model_loss(model: Any, batch: Any) -> Tensor:
    """Return the loss that a Hugging Face model computes from a batch with labels.

    Args:
        model: Model whose output has a `loss`.
        batch: Keyword arguments of the model's forward.

    Raises:
        ConfigError: The model computes no loss from this batch.
    """
    check_collated(batch)
    loss: Tensor | None = model(**batch).loss
    if loss is None:
        raise ConfigError(
            f"the model computes no loss from a batch of {', '.join(batch)}; give a function of the model and a batch "
            "as `loss`, for a trainer's callback `callback.loss = trainer_loss(trainer)`."
        )
    return loss


def check_collated(batch: Any) -> None:
    """Check that a batch holds the arguments of a model's forward by name.

    Raises:
        ConfigError: It is something else, such as the rows from which an online trainer will make its samples.
    """
    if not isinstance(batch, Mapping):
        raise ConfigError(
            f"no loss can be computed from a batch that is a {type(batch).__name__} and not a dict; give a function of "
            "the model and a batch as `loss`. A trainer that makes its samples while it trains, such as GRPO and RLOO, "
            "cannot calibrate: use schedule dynamic with a score other than loss_impact, or schedule all, and with "
            "eigen the options {short: gradient, long: gradient}."
        )


@dataclass(frozen=True)
class Probe:
    """Fixed batches on which a schedule runs the model to compute scores.

    Every process must have the same batches.

    Args:
        model: PEFT model that is trained, or a wrapper of it.
        batches: Collated batches, on the model's device.
        loss: Function of the model and a batch that returns the mean loss; by default the model's own, from a batch
            with labels.

    Example:
        ```python
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from loraover import Budget, LoraOverConfig, OverParameterization, Probe

        base = "HuggingFaceTB/SmolLM2-135M-Instruct"
        batch = AutoTokenizer.from_pretrained(base)(["2 + 2 = 4", "3 + 4 = 7"], return_tensors="pt")
        batch["labels"] = batch["input_ids"]
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules="all-linear"))
        config = LoraOverConfig(schedule="static", budget=Budget(fraction=0.25))
        over = OverParameterization(model, config, probe=Probe(model, [batch]))
        ```
    """

    model: nn.Module
    batches: Sequence[Any]
    loss: Loss = model_loss


class Score(ABC):
    """Estimate of how much each site profits from cores; the highest scores are chosen.

    Args:
        sites: All candidates, by name.
        seed: Seed of random scores.
    """

    needs_probe: ClassVar[bool] = False

    def __init__(self, sites: Mapping[str, Site], seed: int) -> None:
        self.sites = dict(sites)
        self.seed = seed

    @abstractmethod
    def values(self, probe: Probe | None) -> dict[str, float]:
        """Return the score of every site, by name.

        Args:
            probe: Batches to run the model on, which only a score with `needs_probe` uses.
        """


class GradientScore(Score):
    """Score that is a mean over optimizer steps of a function of M and dL/dM.

    The gradients of a step are divided by their joint norm over all sites, so that clipping and loss scaling have no
    effect and every step has equal weight. A step whose gradients are not finite, or all zero, is left out.
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
        """Compute one step's value for each of G matrices of one shape.

        Args:
            group: Index of this group of matrices, under which a score may keep tensors between steps.
            matrices: Function that makes the stack of M (G, m, n).
            gradients: Normalised gradients (G, m, n).
            counts: Bool on the gradients' device. Where it is false, the step does not count, and what is kept between
                steps must not change.

        Returns:
            Values (G,).
        """

    @torch.no_grad()
    def observe(self, gradients: Mapping[str, Tensor]) -> None:
        """Add the gradients of one optimizer step; call it before the step changes the matrices.

        Args:
            gradients: Gradients dL/dM (m, n) by site name; sites without one are absent.
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
        return full(torch.stack([self.sites[name].values for name in names])).float()

    def values(self, probe: Probe | None) -> dict[str, float]:
        scores = dict.fromkeys(self.sites, 0.0)
        steps = 0 if self._steps is None else int(self._steps)
        for names, total in zip(self._groups, self._sums, strict=True):
            if total is not None and steps:
                scores.update(zip(names, (total.cpu().double() / steps).tolist(), strict=True))
        return scores

    def state(self) -> dict[str, Tensor]:
        """Return the tensors from which `load` continues the score in a resumed run."""
        if self._steps is None or not int(self._steps):
            return {}
        sums = {f"sum.{i}": total.cpu().double() for i, total in enumerate(self._sums) if total is not None}
        return {"steps": self._steps.cpu()} | sums

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue from the tensors that `state` returned."""
        if "steps" not in state:  # no step counted
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
