"""PEFT's `adapter_config.json`: the fields that decide what a LoRA adapter computes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt

from loraover.checkpoint.expert_stacks import targeted_parameter
from loraover.checkpoint.files import CONFIG_FILE
from loraover.checkpoint.path_patterns import ENDING, match_path

T = TypeVar("T")

KEPT_BASE = ("gaussian", "eva", "orthogonal", "mica")
"""Initialisations of A and B, as PEFT names them, that leave the base weights unchanged."""

REPEATED_STARTS = ("pissa", "olora")
"""Initialisations that PEFT repeats from the base weights alone whenever it loads an adapter, as it names them."""

PATTERN_ERRORS = (re.error, OverflowError, RecursionError)
"""Errors of Python for a text that is not a regular expression, or has a huge repetition or too many brackets."""


def _are_patterns(patterns: dict[str, T]) -> dict[str, T]:
    for pattern in patterns:
        try:
            re.compile(ENDING.replace("{}", pattern))
        except PATTERN_ERRORS as error:
            raise ValueError(f"{pattern!r:.200} is not a regular expression: {error}") from error
    return patterns


Patterns = Annotated[dict[str, T], AfterValidator(_are_patterns)]
"""Values by regular expressions of module paths, as `first_match` reads them."""


Task = Literal["SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"]
"""Tasks by PEFT's names; PEFT loads no adapter of another one."""


class AdapterConfig(BaseModel):
    """The fields of PEFT's LoraConfig that decide what an adapter computes; other fields are kept unread."""

    model_config = ConfigDict(extra="allow", frozen=True)

    peft_type: str
    task_type: Task | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    r: int = Field(8, ge=1)
    lora_alpha: float = 8
    rank_pattern: Patterns[PositiveInt] = Field(default_factory=dict)
    alpha_pattern: Patterns[float] = Field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False

    @property
    def parameters(self) -> list[str]:
        """Entries of `target_parameters`, which names single parameters, such as those of experts."""
        found = (self.model_extra or {}).get("target_parameters")
        return [entry for entry in found if isinstance(entry, str)] if isinstance(found, list) else []

    @property
    def peft_version(self) -> str | None:
        """Version of PEFT that saved the adapter; None if it is not recorded, as before PEFT 0.18."""
        found = (self.model_extra or {}).get("peft_version")
        return found if isinstance(found, str) else None

    @property
    def keeps_base(self) -> bool:
        """Whether A and B fit the unchanged base weights; some initialisations of A and B change these weights."""
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

    def adapts_weight(self, module: str) -> bool:
        """Return whether PEFT adds B A to a module's weight, named in `target_parameters`, for any class of module."""
        return any(targeted_parameter(target, module) == "weight" for target in self.parameters)

    def rank(self, module: str) -> int:
        """Return the rank that the configuration gives one module."""
        return int(first_match(self.rank_pattern, module, self.r))


def first_match(pattern: Mapping[str, Any], module: str, default: float) -> float:
    """Return the value of the first pattern that matches the end of a module's path, as in PEFT, or the default."""
    return next(
        (float(value) for key, value in pattern.items() if match_path(ENDING, key, module) is not None), default
    )


def write_config(config: Mapping[str, Any], directory: Path) -> None:
    """Write `adapter_config.json` into a folder."""
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
