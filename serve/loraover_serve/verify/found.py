"""Findings of a verification, for its report, and logs that outlive it; no PyTorch is needed."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from loraover.common.atomic_output import publish_file
from loraover.common.errors import LoraOverError

KEPT_PREFIX = "loraover-verify-kept-"
"""Beginning of the names of temporary folders that outlive a verification."""


class Found(NamedTuple):
    """Findings of a verification.

    Args:
        facts: The fields of a report that say what was compared, and with what.
        results: Result of each engine, or of each adapter on a server.
        failures: Error of each of them that failed.
        logs: Engines' logs.
    """

    facts: Mapping[str, Any]
    results: Sequence[Any]
    failures: Sequence[LoraOverError] = ()
    logs: Sequence[Path] = ()


def copy_logs(logs: Sequence[Path], folder: Path) -> None:
    """Copy engines' logs to a folder."""
    for log in logs:
        publish_file(folder / log.name, partial(shutil.copyfile, log))
