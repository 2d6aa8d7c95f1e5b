"""Scores by which a schedule ranks sites, under the names that a configuration uses."""

from __future__ import annotations

from loraover.overparam.importance.base import GradientScore, Probe, Score, joint_norm
from loraover.overparam.importance.controls import Inverse, Random
from loraover.overparam.importance.fisher import Fisher
from loraover.overparam.importance.loss_impact import LossImpact
from loraover.overparam.importance.sensitivity import Sensitivity
from loraover.overparam.importance.taylor import Taylor

SCORES: dict[str, type[Score]] = {
    "fisher": Fisher,
    "taylor": Taylor,
    "sensitivity": Sensitivity,
    "loss_impact": LossImpact,
    "random": Random,
    "inverse": Inverse,
}

__all__ = ["SCORES", "GradientScore", "Probe", "Score", "joint_norm"]
