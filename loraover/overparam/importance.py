"""Scores by which a schedule ranks sites; `SCORES`, at the end, has the names that a configuration uses."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from loraover.common.errors import ConfigError
from loraover.overparam.config import SCORE_NAMES
from loraover.overparam.probe import Probe
from loraover.overparam.sharding import full
from loraover.overparam.sites import Site, lora_layers

SMOOTHING = 0.85  # beta_1 and beta_2 in AdaLoRA's experiments


class Score(ABC):
    """Estimate of how much each site profits from cores; the highest scores are chosen."""

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

    def forwards(self, probe: Probe | None) -> int:
        """Number of batches on which `values` runs the model."""
        return 0


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
            counts: Bool on the gradients' device. Where it is false, the step does not count, and tensors that are kept
                between steps must not change.

        Returns:
            Values (G,).
        """

    @torch.no_grad()
    def observe(self, gradients: Mapping[str, Tensor]) -> None:
        """Add the gradients (m, n) of one optimizer step, by site name, before it changes the matrices."""
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


class Fisher(GradientScore):
    """Mean over elements and steps of the squared gradient.

    With gradient accumulation it is the square of the mean over micro-batches. The score of A is zero in the first
    step, where B = 0.

    Source:
        Gao et al. 2023 (OPF), section 3.3.
    """

    def of(self, group: int, matrices: Callable[[], Tensor], gradients: Tensor, counts: Tensor) -> Tensor:
        return gradients.square().mean((1, 2))


@final
class Taylor(GradientScore):
    """Mean over elements and steps of |M * dL/dM|: to first order, the change of the loss if an element is set to zero.

    It is zero for both matrices of a module while B = 0.

    Source:
        Molchanov et al. 2019, arXiv:1906.10771, equation 8.
    """

    def of(self, group: int, matrices: Callable[[], Tensor], gradients: Tensor, counts: Tensor) -> Tensor:
        return (matrices() * gradients).abs().mean((1, 2))


@final
class Sensitivity(GradientScore):
    """AdaLoRA's importance: the mean over elements of I * U.

    I is the moving average of |M * dL/dM|, and U the moving average of the distance of |M * dL/dM| from I. Late steps
    count more than early ones.

    Source:
        Zhang et al. 2023 (AdaLoRA), arXiv:2303.10512, equations 8 to 11.
    """

    def __init__(self, sites: Mapping[str, Site], seed: int) -> None:
        super().__init__(sites, seed)
        self._smoothed: list[Tensor | None] = [None] * len(self._groups)
        self._uncertain: list[Tensor | None] = [None] * len(self._groups)

    def of(self, group: int, matrices: Callable[[], Tensor], gradients: Tensor, counts: Tensor) -> Tensor:
        now = (matrices() * gradients).abs()
        before, spread = self._smoothed[group], self._uncertain[group]
        if before is None or spread is None:
            before, spread = torch.zeros_like(now), torch.zeros_like(now)
        smoothed = before.lerp(now, 1 - SMOOTHING)
        uncertain = spread.lerp((now - smoothed).abs(), 1 - SMOOTHING)
        self._smoothed[group] = torch.where(counts, smoothed, before)
        self._uncertain[group] = torch.where(counts, uncertain, spread)
        return torch.zeros(len(now), device=now.device)

    def values(self, probe: Probe | None) -> dict[str, float]:
        scores = dict.fromkeys(self.sites, 0.0)
        for names, smoothed, uncertain in zip(self._groups, self._smoothed, self._uncertain, strict=True):
            if smoothed is not None and uncertain is not None:
                found = (smoothed.cpu().double() * uncertain.cpu().double()).mean((1, 2))
                scores.update(zip(names, found.tolist(), strict=True))
        return scores

    def state(self) -> dict[str, Tensor]:
        kept = {"smoothed": self._smoothed, "uncertain": self._uncertain}
        stacks = {f"{key}.{i}": t.cpu() for key, ts in kept.items() for i, t in enumerate(ts) if t is not None}
        return super().state() | stacks

    def load(self, state: Mapping[str, Tensor]) -> None:
        super().load(state)
        for key, kept in (("smoothed", self._smoothed), ("uncertain", self._uncertain)):
            for i, names in enumerate(self._groups):
                if f"{key}.{i}" in state:
                    kept[i] = state[f"{key}.{i}"].to(self.sites[names[0]].parameter.device)


@final
class LossImpact(Score):
    """Mean loss over the probe's batches without a module's update, minus the loss with it.

    Both matrices of the module get this score. It takes one forward for each pair of batch and module, and one more for
    each batch. It is zero while B = 0, and negative where the update makes the loss worse.

    Source:
        The paper's pre-computation, as the public reviews of LoRA-Over on OpenReview describe it.
    """

    needs_probe = True

    @torch.no_grad()
    def values(self, probe: Probe | None) -> dict[str, float]:
        if probe is None:
            raise ConfigError("loss_impact runs the model on calibration batches; give them with `probe`.")
        if any(site.part is not None for site in self.sites.values()):
            raise ConfigError(
                "loss_impact switches layers off, and cannot switch off one expert; choose another score."
            )
        whole = _loss(probe)
        layers = lora_layers(probe.model)
        impact: dict[tuple[str, str], float] = {}
        for module, adapter in dict.fromkeys((site.module, site.adapter) for site in self.sites.values()):
            scaling: dict[str, float] = layers[module].scaling
            kept, scaling[adapter] = scaling[adapter], 0.0
            try:
                impact[module, adapter] = _loss(probe) - whole
            finally:
                scaling[adapter] = kept
        return {name: impact[site.module, site.adapter] for name, site in self.sites.items()}

    def forwards(self, probe: Probe | None) -> int:
        modules = {(site.module, site.adapter) for site in self.sites.values()}
        return 0 if probe is None else len(probe.batches) * (1 + len(modules))


def _loss(probe: Probe) -> float:
    return sum(float(probe.loss(probe.model, batch)) for batch in probe.batches) / len(probe.batches)


@final
class Inverse(Fisher):
    """The score `fisher` with its order reversed."""

    def values(self, probe: Probe | None) -> dict[str, float]:
        return {name: -value for name, value in super().values(probe).items()}


@final
class Random(Score):
    """Random number between 0 and 1, drawn from the seed and the site's name."""

    def values(self, probe: Probe | None) -> dict[str, float]:
        digests = {name: hashlib.sha256(f"{self.seed}:rank:{name}".encode()).digest() for name in self.sites}
        return {name: int.from_bytes(digest[:6], "little") / 2**48 for name, digest in digests.items()}


def joint_norm(stacks: Sequence[Tensor]) -> Tensor:
    """Frobenius norm of all tensors together, a scalar on the first one's device, without waiting for any device."""
    squares = [stack.square().sum() for stack in stacks]
    return torch.stack([square.to(squares[0].device, non_blocking=True) for square in squares]).sum().sqrt()


def _widest(device: torch.device) -> torch.dtype:
    """The widest floating-point type of a device; an Apple GPU has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


SCORES: dict[str, type[Score]] = dict(
    zip(SCORE_NAMES, (Fisher, Taylor, Sensitivity, LossImpact, Random, Inverse), strict=True)
)
