"""Settings of the methods beside LoRA-Over: the keys `soma`, `lorasc`, `federated` and `tensorguide`."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class MethodSettings(BaseModel):
    """Settings of one method, which a recipe with another method may not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SomaSettings(MethodSettings):
    """Settings of `method: soma`, see `loraover.training.methods.soma`."""

    frozen_blocks: int | None = Field(
        None, ge=0, description="Number of blocks, from the first one on, that get no LoRA; None: a third of them."
    )
    weight_decay: float = Field(
        0.05, ge=0, allow_inf_nan=False, description="Weight decay at the first step; training.weight_decay stays 0."
    )
    final_weight_decay: float = Field(
        1e-5, ge=0, allow_inf_nan=False, description="Weight decay at the end of a cosine over all steps."
    )


class LoraScSettings(MethodSettings):
    """Settings of `method: lorasc`, see `loraover.training.methods.lorasc`."""

    stages: int = Field(3, ge=1, description="Number of fast LoRAs that are trained one after the other.")
    pace: float = Field(0.8, gt=0, le=1, description="Share of a stage's fast LoRA in the slow one; 1: no averaging.")
    noise: float = Field(
        0.15,
        ge=0,
        allow_inf_nan=False,
        description="Width of the uniform noise on the adapted base weights, in standard deviations of each weight.",
    )
    rank: int | None = Field(
        None, ge=1, description="Rank of the result, as its best approximation; None: stages times r, exactly."
    )


class FederatedSettings(MethodSettings):
    """Settings of `method: federated`, see `loraover.training.methods.federated`."""

    clients: int = Field(4, ge=1, description="Number of simulated clients, among which the rows are divided.")
    local_steps: int = Field(1, ge=1, description="Optimizer steps of a client between two averages of B.")
    clip: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="Largest norm of the gradient of one example, over all modules."
    )
    noise_multiplier: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="Standard deviation of the noise as a multiple of clip; 0: none."
    )
    epsilon: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="Privacy budget that a run may not exceed; None: no limit."
    )
    delta: float = Field(1e-5, gt=0, lt=1, description="Delta at which epsilon is stated.")
    noise_seed: int | None = Field(
        None,
        ge=0,
        description="Seed of the noise and of the draws of rows, with which a run can be repeated. Whoever knows it "
        "can compute the noise. None: a seed from the operating system, which is not kept.",
    )


class TensorGuideSettings(MethodSettings):
    """Settings of `method: tensorguide`, see `loraover.training.methods.tensorguide`."""

    tt_rank: int = Field(8, ge=1, description="Largest bond between two cores of a tensor train.")
    cores: int = Field(
        4, ge=2, le=12, description="Number of cores, among which r (in_features + out_features) is divided as factors."
    )
    input_seed: int | None = Field(
        None, ge=0, lt=2**32, description="Seed of the frozen Gaussian inputs; None: training.seed."
    )
