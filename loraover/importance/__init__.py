"""Scores by which a schedule ranks sites, by the name that a configuration uses."""

from __future__ import annotations

from loraover.importance.base import GradientScore, Probe, Score
from loraover.importance.fisher import Fisher
from loraover.importance.inverse import Inverse
from loraover.importance.loss_impact import LossImpact
from loraover.importance.random import Random
from loraover.importance.sensitivity import Sensitivity
from loraover.importance.taylor import Taylor

SCORES: dict[str, type[Score]] = {
    "fisher": Fisher,
    "taylor": Taylor,
    "sensitivity": Sensitivity,
    "loss_impact": LossImpact,
    "random": Random,
    "inverse": Inverse,
}

__all__ = ["SCORES", "GradientScore", "Probe", "Score"]
