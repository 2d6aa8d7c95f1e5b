"""A PEFT LoRA adapter on disk: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt

from loraover.checkpoint.tensor_file import FLOATS, open_tensors
from loraover.common.errors import CheckpointError
from loraover.common.strict_json import read_json

CONFIG_FILE, TENSORS_FILE = "adapter_config.json", "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."
BASE_WEIGHT = ".base_layer.weight"
"""Ending of the key of an adapted module's frozen weight, which PEFT saves beside an adapted embedding."""
_SITE_KEY = re.compile(r"(?P<module>.+)\.(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B)")

T = TypeVar("T")

KEPT_BASE = ("gaussian", "eva", "orthogonal", "mica")
"""Initializations of A and B, as PEFT names them, that leave the base weights unchanged."""


def _are_patterns(patterns: dict[str, T]) -> dict[str, T]:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
    return patterns


Patterns = Annotated[dict[str, T], AfterValidator(_are_patterns)]
"""Values by regular expressions of module paths, as `first_match` reads them."""


class AdapterConfig(BaseModel):
    """The fields of PEFT's LoraConfig that decide what an adapter computes; other fields are kept unread."""

    model_config = ConfigDict(extra="allow", frozen=True)

    peft_type: str
    base_model_name_or_path: str | None = None
    revision: str | None = None
    r: int = Field(8, ge=1)
    lora_alpha: float = 8
    rank_pattern: Patterns[PositiveInt] = Field(default_factory=dict)
    alpha_pattern: Patterns[float] = Field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False

    @property
    def keeps_base(self) -> bool:
        """Whether A and B fit the unchanged base weights; some initializations of A and B change these weights."""
        start = (self.model_extra or {}).get("init_lora_weights")
        return not isinstance(start, str) or start.lower() in KEPT_BASE

    def scaling(self, module: str) -> float:
        """Return the factor in delta_W = scaling * B @ A of one module.

        It is alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023, arXiv:2312.03732). As in PEFT, r and alpha
        come from the first pattern that matches the module's path.
        """
        r = first_match(self.rank_pattern, module, self.r)
        alpha = first_match(self.alpha_pattern, module, self.lora_alpha)
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r

    def rank(self, module: str) -> int:
        """Return the rank that the configuration gives one module."""
        return int(first_match(self.rank_pattern, module, self.r))


@dataclass(frozen=True)
class AdapterDir:
    """A LoRA adapter whose configuration and tensor names have been checked.

    Args:
        path: Folder of the adapter.
        config: Contents of `adapter_config.json`.
        shapes: Shape of every tensor in the file, by key.
        sites: Tensor key of each A and B matrix, by site name such as "model.layers.0.q_proj.lora_A".
    """

    path: Path
    config: AdapterConfig
    shapes: Mapping[str, tuple[int, ...]]
    sites: Mapping[str, str]

    @property
    def tensors_path(self) -> Path:
        """File that holds the tensors."""
        return self.path / TENSORS_FILE

    def check_keeps_base(self) -> None:
        """Raise CheckpointError unless A and B fit the unchanged base weights."""
        if not self.config.keeps_base:
            start = (self.config.model_extra or {})["init_lora_weights"]
            raise CheckpointError(
                f"{self.path / CONFIG_FILE}: init_lora_weights is {start!r}, which changes the base weights, so A and "
                "B only fit the changed base model. Save the adapter again with PEFT's "
                "save_pretrained(path_initial_model_for_weight_conversion=...), which makes it a plain LoRA."
            )


def site_key(name: str) -> str:
    """Return a site's tensor key in a PEFT adapter file, which ends in `.weight` except for embeddings."""
    return f"{KEY_PREFIX}{name}" + ("" if "lora_embedding_" in name.rpartition(".")[2] else ".weight")


def site_name(key: str) -> str | None:
    """Return the site that a tensor key in a PEFT adapter file belongs to; None for any other tensor."""
    name = key.removeprefix(KEY_PREFIX).removesuffix(".weight")
    return name if _SITE_KEY.fullmatch(name) and site_key(name) == key else None


def saved_labels(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Return the number of rows of a classification head that an adapter replaces; None if it replaces none.

    Args:
        shapes: Shapes of an adapter's tensors, by key.
    """
    heads = [key for key in shapes if key.endswith((".classifier.weight", ".score.weight", ".out_proj.weight"))]
    return next((shapes[key][0] for key in heads if "lora" not in key), None)


def read_adapter_dir(path: Path) -> AdapterDir:
    """Read the configuration and the tensor layout of an adapter.

    Raises:
        CheckpointError: The folder holds no adapter, or one that is not a LoRA of plain products B A; it has no LoRA
            matrices; or the shapes of A and B contradict each other or the configuration.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; expected a PEFT adapter directory.")
    config = read_json(path / CONFIG_FILE, AdapterConfig)
    if config.peft_type != "LORA":
        raise CheckpointError(f"{path / CONFIG_FILE}: peft_type is {config.peft_type!r}, expected 'LORA'.")
    if config.use_dora:
        raise CheckpointError(
            f"{path / CONFIG_FILE}: use_dora is true. DoRA rescales the columns of W + B A, so it is not a plain "
            "low-rank product: it cannot be folded, and vLLM refuses it; train without use_dora."
        )
    with open_tensors(path / TENSORS_FILE) as file:
        shapes = {key: file.shape(key) for key in file.keys}
        dtypes = {key: file.dtype(key) for key in file.keys}
    sites = {name: key for key in shapes if (name := site_name(key)) is not None}
    adapter = AdapterDir(path, config, shapes, sites)
    _check_pairs(adapter)
    for key in sites.values():
        if dtypes[key] not in FLOATS:
            raise CheckpointError(
                f"{adapter.tensors_path}: {key} is {dtypes[key]}, expected one of {', '.join(FLOATS)}."
            )
    return adapter


def _check_pairs(adapter: AdapterDir) -> None:
    where = adapter.tensors_path
    if not adapter.sites:
        raise CheckpointError(f"{where}: no lora_A or lora_B tensors; this adapter has no LoRA layers.")
    for name, key in adapter.sites.items():
        match = _SITE_KEY.fullmatch(name)
        assert match is not None
        module, kind = match["module"], match["kind"]
        if len(adapter.shapes[key]) != 2 or 0 in adapter.shapes[key]:
            raise CheckpointError(f"{where}: {key} has shape {adapter.shapes[key]}, expected a matrix.")
        embedding = kind.replace("lora_", "lora_embedding_")
        if f"{module}.{embedding}" in adapter.sites:
            raise CheckpointError(f"{where}: {module} is listed twice, with {kind} and with {embedding}; remove one.")
        is_a = kind.endswith("A")
        twin = adapter.sites.get(f"{module}.{kind[:-1]}{'B' if is_a else 'A'}")
        if twin is None:
            raise CheckpointError(f"{where}: {key} has no {'B' if is_a else 'A'} beside it.")
        rank = adapter.shapes[key][0 if is_a else 1]
        if rank != adapter.config.rank(module):
            raise CheckpointError(
                f"{where}: {key} has rank {rank}, but {CONFIG_FILE} gives {module} rank {adapter.config.rank(module)}."
            )


def first_match(pattern: Mapping[str, Any], module: str, default: float) -> float:
    """Return the value of the first pattern that matches the end of a module's path, as in PEFT, or the default."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return float(value)
    return default
