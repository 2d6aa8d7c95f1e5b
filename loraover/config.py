"""What a user chooses about over-parameterization; the same names in Python and in recipes."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from loraover.decompositions import Decomposition, make_decomposition


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
        description="shell-style patterns over site names, e.g. '*.q_proj.lora_A'; a site that matches one is chosen",
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
        return self

    def make_decomposition(self) -> Decomposition:
        """The decomposition that `decomposition` and `options` describe."""
        return make_decomposition(self.decomposition, self.options)
