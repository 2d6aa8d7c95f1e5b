"""Configuration of over-parameterisation, with the same names in Python and in recipes."""

from __future__ import annotations

import difflib
from typing import Any, Literal

from pydantic import Field, model_validator

from loraover.common.strict_json import StrictModel
from loraover.overparam.decompositions import Decomposition, make_decomposition

SCORE_NAMES = ("fisher", "taylor", "sensitivity", "loss_impact", "random", "inverse")


class Budget(StrictModel):
    """Largest number of sites or parameters that a static or dynamic schedule may over-parameterise.

    Give exactly one of the three fields. A *candidate* is an A or B matrix that one of the patterns in
    `LoraOverConfig.sites` matches.

    Raises:
        pydantic.ValidationError: No field or several fields are given, or a value is out of range.

    Example:
        ```python
        from loraover import Budget, LoraOverConfig

        config = LoraOverConfig(schedule="dynamic", budget=Budget(fraction=0.25))
        ```
    """

    sites: int | None = Field(None, ge=1, description="Largest number of A and B matrices that get cores.")
    fraction: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of the candidate matrices that get cores, rounded to a number of matrices, at least one.",
    )
    parameters: int | None = Field(
        None, ge=1, description="Largest number of parameters that the cores have beyond those of their matrices."
    )

    @model_validator(mode="after")
    def _one(self) -> Budget:
        given = [name for name in ("sites", "fraction", "parameters") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of sites, fraction and parameters, found {', '.join(given) or 'none'}")
        return self


class LoraOverConfig(StrictModel):
    """Which LoRA matrices are trained through cores, when, and how.

    A *site* is one A or B matrix of one module. During training, a site may be the contraction of several smaller
    tensors, its *cores*: one *centre core*, which holds the matrix, and *auxiliary cores* around it.

    Raises:
        pydantic.ValidationError: A value is out of range, a decomposition or one of its options is unknown, or the
            schedule and the budget do not fit together.

    Example:
        ```python
        from loraover import Budget, LoraOverConfig

        plain = LoraOverConfig()  # every A and B matrix, from the start
        some = LoraOverConfig(decomposition="mpo", options={"num_cores": 3}, sites=["*.q_proj.*", "*.v_proj.*"])
        rounds = LoraOverConfig(schedule="dynamic", score="fisher", budget=Budget(fraction=0.25))
        ```
    """

    decomposition: str = Field(
        "mpo",
        description="Form of the cores. mpo: matrix product operator, as in the paper; svd: singular value "
        "decomposition; chain: product of plain matrices; eigen: matrix in the eigenbases of second moments.",
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="Options of the decomposition by name, e.g. {num_cores: 3, expansion: 1.5}. mpo: num_cores, modes, "
        "bonds, expansion, gauge; chain: depth, expansion; svd: none; eigen: short, long, block, refresh, growth, "
        "decay, second_moments, train_auxiliary.",
    )
    sites: list[str] = Field(
        default=["*"],
        min_length=1,
        description="Shell-style patterns of matrix names, e.g. '*.q_proj.lora_A'. A matrix that matches at least one "
        "is a candidate for cores.",
    )
    schedule: Literal["all", "static", "dynamic"] = Field(
        "all",
        description="When matrices get cores. all: every candidate, from the start; static: the candidates with the "
        "best scores, before the first step; dynamic: the candidates with the best scores, in rounds during the run.",
    )
    score: str = Field(
        "fisher",
        description="Score by which a static or dynamic schedule ranks candidates. fisher: squared gradient; taylor: "
        "first-order change of the loss; sensitivity: AdaLoRA's smoothed taylor; loss_impact: measured change of the "
        "loss without a module's update; random and inverse (worst first): controls.",
    )
    budget: Budget | None = Field(
        None,
        description="How much a static or dynamic schedule may over-parameterise, e.g. {fraction: 0.25}; the schedule "
        "'all' takes none.",
    )
    quota: Literal["global", "module", "matrix", "layer"] = Field(
        "matrix",
        description="How the budget is shared before the best scores are chosen. global: not at all; module: among "
        "module types (q_proj, ...); matrix: between A and B; layer: among layers; each in proportion to its matrices.",
    )
    rounds: int = Field(3, ge=1, description="Number of rounds in which a dynamic schedule chooses matrices.")
    start: float = Field(
        0.1, gt=0, lt=1, description="Time of a dynamic schedule's first round, as a fraction of the run's steps."
    )
    end: float = Field(
        0.5, gt=0, lt=1, description="Time of a dynamic schedule's last round, as a fraction of the run's steps."
    )
    calibration_batches: int = Field(
        4,
        ge=1,
        description="Number of training batches on which a static schedule, or the score loss_impact, runs the model.",
    )
    calibration_steps: int = Field(
        8,
        ge=1,
        description="Number of warm-up steps that a static schedule takes on these batches if B is zero, where every "
        "score would be zero; they are undone afterwards.",
    )
    carry_moments: bool = Field(
        True,
        description="Whether a matrix that gets cores during the run hands the optimizer's moments to its centre core; "
        "false drops them.",
    )
    aux_lr_scale: float = Field(
        1.0,
        ge=0,
        allow_inf_nan=False,
        description="Learning rate of the auxiliary cores, as a multiple of their matrix's learning rate.",
    )
    decay_auxiliary: bool = Field(
        False,
        description="Whether weight decay also acts on the auxiliary cores; a matrix of K cores then shrinks about K "
        "times as fast.",
    )
    seed: int | None = Field(
        None,
        ge=0,
        lt=2**63,
        description="Seed of the auxiliary cores' random values and of the score 'random'. Absent: the seed of the "
        "Trainer or recipe, or 0 without one.",
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
        """Return the decomposition that `decomposition` and `options` describe.

        Raises:
            ConfigError: The name or an option is unknown, or an option is out of range.
        """
        return make_decomposition(self.decomposition, self.options)
