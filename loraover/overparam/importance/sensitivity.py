"""Smoothed sensitivity times its uncertainty."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import final

import torch
from torch import Tensor

from loraover.overparam.importance.base import GradientScore, Probe
from loraover.overparam.sites import Site

SMOOTHING = 0.85  # beta_1 and beta_2 in AdaLoRA's experiments


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
