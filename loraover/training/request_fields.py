"""Fields that requests which train have in common."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from loraover.common.request import option


def values_by_key(description: str, flag: str = "--set", **more: Any) -> Any:
    """Declare a field of values by key, such as `settings`: values of recipe keys, by dotted key."""
    form: dict[str, Any] = {"metavar": "KEY=VALUE", "converts": _by_key, "writes": _as_texts}
    return option(description, default=None, flag=flag, **form, **more)


def ray_address(work: str) -> Any:
    """Declare the field `ray`: the cluster to which work is given."""
    description = f"Address of a Ray cluster for {work}, or 'local' for one on this machine."
    return option(description, default=None, is_recorded=False)


def _by_key(given: Mapping[str, Any] | Iterable[str] | None) -> dict[str, Any]:
    if given is None or isinstance(given, Mapping):
        return dict(given or {})
    from loraover.training.recipe import parse_override

    return dict(map(parse_override, given))


def _as_texts(values: Mapping[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]
