"""Faults of vLLM that show no message, by release: `known_faults.json`, kept by hand."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Literal

from loraover.common.strict_json import StrictModel
from loraover_export.formats.vllm.versions import Versions

Platform = Literal["cpu", "cuda"]


class NoOp(StrictModel):
    """A module whose matrices vLLM loads and applies nowhere.

    Args:
        module: Last part of the module's path.
        classes: Model classes, by vLLM's names.
        versions: Releases that have this fault.
        reason: Cause, in words.
        thread: Link to the issue or pull request that discusses it.
    """

    module: str
    classes: tuple[str, ...]
    versions: Versions
    reason: str
    thread: str


class EngineFault(StrictModel):
    """A fault that can affect any adapter.

    Args:
        platform: Kind of device that has the fault.
        versions: Releases that have the fault.
        found: The fault, in words.
        remedy: Next step for the user.
    """

    platform: Platform
    versions: Versions
    found: str
    remedy: str


class KnownFaults(StrictModel):
    """Contents of `known_faults.json`."""

    source: str
    no_ops: tuple[NoOp, ...]
    engine: tuple[EngineFault, ...]


@cache
def known_faults() -> KnownFaults:
    """Read the table that comes with this package."""
    return KnownFaults.model_validate_json(files(__package__).joinpath("known_faults.json").read_bytes())
