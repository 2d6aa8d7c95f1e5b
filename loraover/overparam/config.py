"""What a user chooses about over-parameterization; the same names in Python and in recipes."""

from __future__ import annotations

import difflib
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from loraover.overparam.decompositions import Decomposition, make_decomposition

SCORE_NAMES = ("fisher", "taylor", "sensitivity", "loss_impact", "random", "inverse")


class Budget(BaseModel):
    """How much a schedule may over-parameterise; one of three."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sites: int | None = Field(None, ge=1, description="A and B matrices")
    fraction: float | None = Field(None, gt=0, le=1, description="of all candidate sites")
    parameters: int | None = Field(None, ge=1, description="numbers that cores add")

    @model_validator(mode="after")
    def _one(self) -> Budget:
        given = [name for name in ("sites", "fraction", "parameters") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of sites, fraction and parameters, found {', '.join(given) or 'none'}")
        return self


class LoraOverConfig(BaseModel):
    """Which matrices are over-parameterised, and how."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    decomposition: str = Field("mpo", description="mpo, svd or chain")
    options: dict[str, Any] = Field(
        default_factory=dict, description="fields of the decomposition, e.g. {num_cores: 3, expansion: 1.5}"
    )
    sites: list[str] = Field(
        default=["*"],
        min_length=1,
        description="shell-style patterns over site names, e.g. '*.q_proj.lora_A'; one that matches is a candidate",
    )
    schedule: Literal["all", "static", "dynamic"] = Field(
        "all",
        description="all: every candidate from the start; static: the best by a score before the first step; dynamic: "
        "the best in rounds during the run",
    )
    score: str = Field("fisher", description=f"{', '.join(SCORE_NAMES)}")
    budget: Budget | None = Field(None, description="of static and dynamic, e.g. {fraction: 0.25}")
    quota: Literal["global", "module", "matrix", "layer"] = Field(
        "matrix",
        description="share the budget among module types (q_proj, ...), A and B, or layers, in proportion to their "
        "numbers; within each the best are chosen",
    )
    rounds: int = Field(3, ge=1, description="of dynamic")
    start: float = Field(0.1, gt=0, lt=1, description="first round, as a fraction of the run")
    end: float = Field(0.5, gt=0, lt=1, description="last round, likewise")
    calibration_batches: int = Field(4, ge=1, description="that static and loss_impact run the model on")
    calibration_steps: int = Field(
        8, ge=1, description="warm-up steps on those batches where B is zero and static scores would be; undone again"
    )
    carry_moments: bool = Field(
        True,
        description="carry an optimizer's moments of a matrix into its centre core, where it is injected in mid-run",
    )
    aux_lr_scale: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="learning rate of auxiliary cores, as a multiple of their matrix's"
    )
    decay_auxiliary: bool = Field(
        False, description="apply weight decay to auxiliary cores too; K decayed cores shrink a matrix K times as fast"
    )
    seed: int | None = Field(
        None, ge=0, lt=2**63, description="seed of the auxiliary cores' random draws; absent: the run's own, or 0"
    )

    @model_validator(mode="after")
    def _options_fit(self) -> LoraOverConfig:
        self.make_decomposition()
        if self.score not in SCORE_NAMES:
            near = difflib.get_close_matches(self.score, SCORE_NAMES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f", expected one of {', '.join(SCORE_NAMES)}"
            raise ValueError(f"score is {self.score!r}{hint}")
        if (self.schedule == "all") != (self.budget is None):
            raise ValueError(f"schedule {self.schedule!r} takes {'no' if self.schedule == 'all' else 'a'} budget")
        if self.start > self.end:
            raise ValueError(f"start is {self.start:g}, after end, which is {self.end:g}")
        return self

    def make_decomposition(self) -> Decomposition:
        """The decomposition that `decomposition` and `options` describe."""
        return make_decomposition(self.decomposition, self.options)
