"""A checkpoint's `loraover.json`: sites, shapes, decomposition, schedule, versions and checksums."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from loraover.common.errors import CheckpointError
from loraover.common.strict_json import StrictModel, read_json
from loraover.overparam.config import LoraOverConfig
from loraover.overparam.round import Round

SCHEMA_VERSION = 3


class SiteRecord(StrictModel):
    """Record of one over-parameterised matrix of shape (m, n) in `loraover.json`."""

    name: str = Field(description="Name of the matrix, e.g. 'model.layers.0.mlp.up_proj.lora_A'.")
    m: int = Field(ge=1, description="Number of rows.")
    n: int = Field(ge=1, description="Number of columns.")
    step: int = Field(ge=0, description="Number of optimizer steps taken when the matrix got its cores.")
    joined: bool = Field(description="Whether the optimizer stepped it together with other sites of its shape.")
    shares: dict[int, str] = Field(
        description="Site that stores the core, by the core's index, for cores that several sites share."
    )
    state: dict[str, int | float | bool | str | None] = Field(
        default_factory=dict,
        description="Values of the optimizer's state that are not tensors, by keys like those of the tensors.",
    )

    def core_key(self, k: int) -> str:
        """Return the tensor key of core k in `loraover.safetensors`."""
        return f"{self.shares.get(k, self.name)}.core.{k}"

    @property
    def owner(self) -> str:
        """Name of the site under which the shared core is stored; the site's own name if it shares none."""
        return next(iter(self.shares.values()), self.name)

    @property
    def gauge_key(self) -> str:
        """Prefix of the keys of the moments that its bases follow."""
        return f"{self.name}.gauge."


class _Version(BaseModel):
    model_config = ConfigDict(extra="ignore")

    format: Literal["loraover-checkpoint"]
    schema_version: int


class Meta(StrictModel):
    """Contents of `loraover.json`."""

    format: Literal["loraover-checkpoint"] = "loraover-checkpoint"
    schema_version: int = SCHEMA_VERSION
    base_model: str | None = Field(description="Hub name or folder of the base model; null if it has none.")
    step: int = Field(ge=0, description="Number of steps taken, as the training loop or trainer counts them.")
    config: LoraOverConfig = Field(description="Configuration of the over-parameterisation.")
    core_dtype: Literal["float32", "float64"] = Field(description="Data type of the cores.")
    sites: list[SiteRecord] = Field(description="Matrices that have cores.")
    rounds: list[Round] = Field(description="Decisions that the schedule has made so far.")
    steps: int | None = Field(
        None, ge=0, description="Number of optimizer steps of the complete run; null if it is unknown."
    )
    optimizer_steps: int = Field(
        ge=0,
        description="Number of steps that the optimizer took; fewer than `step` where mixed precision skipped some.",
    )
    optimizer: str | None = Field(description="Class of the optimizer; null before one was attached.")
    world_size: int = Field(ge=1, description="Number of processes that trained together.")
    versions: dict[str, str] = Field(description="Versions of the packages that wrote the checkpoint, by name.")
    sha256: dict[str, str] = Field(description="SHA-256 of each other file of the checkpoint, by its name.")
    digest: str = Field("", description="SHA-256 of this file's canonical JSON with an empty digest.")

    def sealed(self) -> Meta:
        """Return a copy with its digest filled in."""
        return self.model_copy(update={"digest": digest_of(self.model_dump(mode="json"))})


def digest_of(content: dict[str, Any]) -> str:
    """Return the SHA-256 of the canonical JSON of a content with an empty digest."""
    return hashlib.sha256(json.dumps({**content, "digest": ""}, sort_keys=True).encode()).hexdigest()


def read_metadata(path: Path) -> Meta:
    """Read a checkpoint's `loraover.json`."""
    found = read_json(path, _Version)
    if found.schema_version != SCHEMA_VERSION:
        raise CheckpointError(
            f"{path}: schema_version is {found.schema_version}, this version reads {SCHEMA_VERSION}; use the version "
            "of loraover that wrote it, or a newer one."
        )
    meta = read_json(path, Meta)
    if meta.digest != digest_of(json.loads(path.read_bytes())):
        raise CheckpointError(f"{path}: its digest does not match its content; the file is damaged.")
    return meta
