"""Change of the loss when a module's update is removed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

import torch

from loraover.common.errors import ConfigError
from loraover.overparam.importance.base import Probe, Score
from loraover.overparam.sites import Site, lora_layers


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
        for site in self.sites.values():
            key = (site.module, site.adapter)
            if key not in impact:
                with _without_update(layers[site.module], site):
                    impact[key] = _loss(probe) - whole
        return {name: impact[site.module, site.adapter] for name, site in self.sites.items()}

    def forwards(self, probe: Probe) -> int:
        """Number of forwards that `values` takes."""
        modules = {(site.module, site.adapter) for site in self.sites.values()}
        return len(probe.batches) * (1 + len(modules))


@contextmanager
def _without_update(layer: Any, site: Site) -> Iterator[None]:
    scaling: dict[str, float] = layer.scaling
    kept = scaling[site.adapter]
    scaling[site.adapter] = 0.0
    try:
        yield
    finally:
        scaling[site.adapter] = kept


def _loss(probe: Probe) -> float:
    return sum(float(probe.loss(probe.model, batch)) for batch in probe.batches) / len(probe.batches)
