"""Figures of a checkpoint's schedule: a map of layers and modules, and the scores over time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from loraover.checkpoint.metadata import Meta
from loraover.common.atomic_output import publish_text
from loraover.common.errors import ConfigError
from loraover.reporting.figures import EDGE, WIDTH, Curve, curves_figure
from loraover.reporting.schedule_map import MapCell, is_worth_a_map, place_of, placed
from loraover.reporting.svg import SMALL, Axis, Drawing, Figure, stacked, text_width

MAP = "map"
"""Name of the figure of matrices."""
ROW, TINY = 14.0, 9.0
WIDEST_CELL = 22.0


def schedule_figures(meta: Meta) -> list[Figure]:
    """Draw the map, unless it says the same of every matrix, and the mean scores of each kind of module at each round.

    Args:
        meta: Metadata of the checkpoint.
    """
    rounds = placed(meta)
    return [*([_map(rounds)] if is_worth_a_map(rounds) else []), *_scores(meta)]


def plot_schedule(meta: Meta, path: Path) -> None:
    """Write the figures of a schedule to one file, one below the other.

    Args:
        meta: Metadata of the checkpoint.
        path: New file, whose name ends in .svg.

    Raises:
        ConfigError: The file exists, or its name has another ending.
    """
    check_new(path, ".svg")
    publish_text(path, stacked("schedule", schedule_figures(meta) or [_map(placed(meta))]).file())


def check_new(path: Path, ending: str) -> None:
    """Raise ConfigError unless a file is new and its name has the right ending."""
    if path.suffix != ending:
        raise ConfigError(f"{path}: expected a name that ends in {ending}.")
    if path.exists():
        raise ConfigError(f"{path}: is there already; name a new file.")


def _map(rounds: Mapping[MapCell, int | None]) -> Figure:
    """Draw one row for each layer, and two columns, A and B, for each kind of module."""
    layers = list(dict.fromkeys(place.layer for place in rounds))
    kinds = list(dict.fromkeys(place.kind for place in rounds))
    short = [kind.rpartition(".")[2] for kind in kinds]
    names = short if len(set(short)) == len(kinds) else kinds
    left = EDGE + max(text_width(text, SMALL) for text in [*layers, "layer"]) + 6
    cell = min(WIDEST_CELL, (WIDTH - EDGE - left) / (2 * len(kinds)))
    top = 30 + 0.75 * max(text_width(name, SMALL) for name in names)
    drawing = Drawing(WIDTH, top + ROW * len(layers) + 8)
    drawing.text(EDGE, top - 5, "layer", size=SMALL, color="faint")
    for i, name in enumerate(names):
        drawing.text(left + (2 * i + 1) * cell + 4, top - 20, name, size=SMALL, turn=-45)
        for j, matrix in enumerate("AB"):
            middle = left + (2 * i + j + 0.5) * cell
            drawing.text(middle, top - 5, matrix, size=TINY, anchor="middle", color="faint")
    for row, layer in enumerate(layers):
        y = top + ROW * row
        drawing.text(EDGE, y + 11, layer, size=SMALL)
        for i, kind in enumerate(kinds):
            for j, matrix in enumerate("AB"):
                place = MapCell(layer, kind, matrix)
                if place in rounds:
                    _cell(drawing, left + (2 * i + j) * cell, y, cell, rounds[place])
    return drawing.figure(MAP, "Round in which each matrix got cores")


def _cell(drawing: Drawing, x: float, y: float, width: float, number: int | None) -> None:
    drawing.rect(x + 1, y + 1, width - 2, ROW - 2, "box" if number is None else "subject", 1 if number is None else 0.3)
    if number is not None:
        drawing.text(x + width / 2, y + 10.5, str(number), size=TINY, anchor="middle")


def _scores(meta: Meta) -> list[Figure]:
    """Draw the mean score of A and of B over the rounds, for each kind of module; empty without scores."""
    found: dict[str, dict[str, dict[int, list[float]]]] = {}
    for each in meta.rounds:
        for name, score in each.scores.items():
            place = place_of(name)
            found.setdefault(place.kind, {}).setdefault(place.matrix, {}).setdefault(each.step, []).append(score)
    means = {
        kind: {matrix: [(float(step), _mean(s)) for step, s in sorted(steps.items())] for matrix, steps in by.items()}
        for kind, by in found.items()
    }
    values = [value for by in means.values() for points in by.values() for _, value in points]
    if not values:
        return []
    steps = sorted({each.step for each in meta.rounds if each.scores})
    x = Axis.around("optimizer steps", steps)
    y = Axis.around(f"{meta.config.score}, mean over matrices without cores", values, is_log=min(values) > 0)
    return [_kind_scores(kind, by, Axis(x.label, x.low, x.high, ticks=steps), y) for kind, by in means.items()]


def _mean(scores: Sequence[float]) -> float:
    """Return the mean, also where the sum would be infinite."""
    return math.fsum(score / len(scores) for score in scores)


def _kind_scores(kind: str, by_matrix: Mapping[str, Sequence[tuple[float, float]]], x: Axis, y: Axis) -> Figure:
    curves = [Curve(matrix, "subject", points) for matrix, points in sorted(by_matrix.items())]
    return curves_figure(f"scores-{kind}", f"{kind}: scores", curves, x, y, height=110)
