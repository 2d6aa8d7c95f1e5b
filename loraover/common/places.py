"""Places of things that are imported when they are first needed, so that commands start fast."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def imported(place: str) -> Any:
    """Import what a place, "module:name", names."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)
