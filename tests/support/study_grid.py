"""Grids of studies, by the rates of their methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loraover_lab.study.grid import Run, grid_of
from loraover_lab.study.request import StudyRequest


def make_grid(
    recipes: Sequence[str],
    rates: Mapping[str, Sequence[float]],
    seeds: int,
    settings: Mapping[str, Any],
    rulers: Sequence[str] = (),
    names: Mapping[str, str] | None = None,
) -> list[Run]:
    """Runs of a study whose methods and rulers are the keys of `rates`."""
    methods = [method for method in rates if method not in rulers]
    asked: dict[str, Any] = {
        "methods": methods,
        "rulers": rulers,
        "lr_sweep": rates,
        "settings": settings,
        "names": names or {},
    }
    return grid_of(StudyRequest(recipes, "out", seeds=seeds, **asked))
