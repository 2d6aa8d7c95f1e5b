"""A checkpoint's schedule: its decisions, a map of layers and modules, and the scores over time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Drawn

from loraover.checkpoint.metadata import Meta
from loraover.common.atomic_output import publish_text
from loraover.common.errors import printable
from loraover.overparam.round import Round
from loraover.overparam.sites import layer_of
from loraover.reporting.figures import EDGE, WIDTH, Curve, curves_figure
from loraover.reporting.html_page import check_new
from loraover.reporting.svg import SMALL, Axis, Drawing, Figure, stacked, text_width
from loraover.reporting.table import Column, Table

MAP = "map"
"""Name of the figure of matrices."""
ROW, TINY = 14.0, 9.0
WIDEST_CELL = 22.0
WIDEST_PAIR = 5
"""Characters of two rounds, of A and B, beside one another."""


@dataclass(frozen=True)
class MapCell:
    """Place of a matrix in the map.

    Args:
        layer: Number of the layer, or "-" outside of layers; see `layer_of`.
        kind: Path of the module in its layer, e.g. "self_attn.q_proj", or its complete path outside of layers.
        matrix: "A" or "B"; another name's last letter, or nothing, which the map leaves out.
    """

    layer: str
    kind: str
    matrix: str


def placed(meta: Meta) -> dict[MapCell, int | None]:
    """Return the round, from 1, in which each matrix got cores, or None; in the order of the layers."""
    rounds = {name: number for number, found in enumerate(meta.rounds, 1) for name in found.chosen}
    names = dict.fromkeys([*(n for r in meta.rounds for n in r.scores), *(site.name for site in meta.sites)])
    found = {place_of(name): rounds.get(name, 1 if not meta.rounds else None) for name in names}
    return dict(sorted(found.items(), key=lambda item: _order(item[0].layer)))


def is_worth_a_map(rounds: Mapping[MapCell, int | None]) -> bool:
    """Whether matrices differ in the round in which they got cores."""
    return len({*rounds.values()}) > 1


def place_of(name: str) -> MapCell:
    """Return the place in the map of a matrix such as "model.layers.0.self_attn.q_proj.lora_A"."""
    module, _, matrix = name.rpartition(".lora_")
    parts = module.split(".")
    below = next((i + 1 for i, part in enumerate(parts) if part.isdigit()), 0)
    return MapCell(layer_of(module), ".".join(parts[below:]), matrix[-1:])


def _order(layer: str) -> tuple[str, int]:
    stack, _, number = layer.rpartition(" ")
    return ("" if stack == "encoder" else stack), int(number) if number.isdecimal() else -1


def show_schedule(meta: Meta, console: Console) -> None:
    """Print a table of the schedule's decisions, and the map, unless it says the same of every matrix.

    In the map, a number is the round in which a matrix got cores, and a point is a matrix without cores.
    """
    config = meta.config
    what = config.schedule if config.schedule == "all" else f"{config.schedule} by {config.score}"
    console.print(f"schedule {what}: {len(meta.sites)} over-parameterised matrices", highlight=False)
    if any(found.scores for found in meta.rounds):
        console.print(_decisions(meta))
    if is_worth_a_map(rounds := placed(meta)):
        room = console.width - 3 - max(len(place.layer) for place in (*rounds, MapCell("layer", "", "")))
        for kinds in _fitting(dict.fromkeys(place.kind for place in rounds), max(room, WIDEST_PAIR)):
            console.print(_map_on_terminal(rounds, kinds))


def _decisions(meta: Meta) -> Table[tuple[int, Round]]:
    def lowest(found: Round) -> str:
        chosen = [found.scores[name] for name in found.chosen if name in found.scores]
        return f"{min(chosen):.2e}" if chosen else "-"

    def highest(found: Round) -> str:
        left = [score for name, score in found.scores.items() if name not in set(found.chosen)]
        return f"{max(left):.2e}" if left else "-"

    return Table(
        [
            Column("round", lambda row: str(row[0])),
            Column("after step", lambda row: str(row[1].step)),
            Column("sites", lambda row: str(len(row[1].chosen))),
            Column("added", lambda row: f"{row[1].added:,}"),
            Column("lowest chosen", lambda row: lowest(row[1])),
            Column("highest left", lambda row: highest(row[1])),
            Column("forwards", lambda row: str(row[1].forwards)),
        ],
        list(enumerate(meta.rounds, 1)),
    )


def _fitting(kinds: Iterable[str], room: int) -> Iterator[list[str]]:
    """Yield the kinds of modules in groups, each for a map of a limited width without the layers' names."""
    group: list[str] = []
    left = room
    for kind in kinds:
        needed = 2 + max(WIDEST_PAIR, *map(len, kind.split(".")))
        if group and needed > left:
            yield group
            group, left = [], room
        group.append(kind)
        left -= needed
    yield group


def _map_on_terminal(rounds: Mapping[MapCell, int | None], kinds: Sequence[str]) -> Drawn:
    def mark(number: int | None) -> str:
        return " " if number == 0 else "·" if number is None else f"[magenta]{number}[/]"

    table = Drawn(box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("layer")
    for kind in kinds:
        parts = [_shown(part) for part in kind.split(".")]
        table.add_column("\n".join([*parts, "A B"]), justify="center", vertical="bottom")
    for layer in dict.fromkeys(place.layer for place in rounds):
        pairs = ([mark(rounds.get(MapCell(layer, kind, matrix), 0)) for matrix in "AB"] for kind in kinds)
        table.add_row(_shown(layer), *(" ".join(pair) for pair in pairs))
    return table


def _shown(name: str) -> str:
    """Return a part of a name in a file, which can neither mark up nor steer the terminal."""
    return escape(printable(name))


def schedule_figures(meta: Meta) -> list[Figure]:
    """Draw the map, unless it says the same of every matrix, and the mean scores of each kind of module by round."""
    rounds = placed(meta)
    return [*([_map(rounds)] if is_worth_a_map(rounds) else []), *_scores(meta)]


def plot_schedule(meta: Meta, path: Path) -> None:
    """Write the figures of a schedule to one new .svg file, one below the other."""
    check_new(path, ".svg")
    publish_text(path, stacked("schedule", schedule_figures(meta) or [_map(placed(meta))]).file())


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
                if place not in rounds:
                    continue
                number, x = rounds[place], left + (2 * i + j) * cell
                look = ("box", 1.0) if number is None else ("subject", 0.3)
                drawing.rect(x + 1, y + 1, cell - 2, ROW - 2, *look)
                if number is not None:
                    drawing.text(x + cell / 2, y + 10.5, str(number), size=TINY, anchor="middle")
    return drawing.figure(MAP, "Round in which each matrix got cores")


def _scores(meta: Meta) -> list[Figure]:
    """Draw the mean score of A and of B over the rounds, for each kind of module; empty without scores."""
    found: dict[str, dict[str, dict[int, list[float]]]] = {}
    for each in meta.rounds:
        for name, score in each.scores.items():
            place = place_of(name)
            found.setdefault(place.kind, {}).setdefault(place.matrix, {}).setdefault(each.step, []).append(score)

    def mean(scores: Sequence[float]) -> float:
        """Return the mean, also where the sum would be infinite."""
        return math.fsum(score / len(scores) for score in scores)

    means = {
        kind: {matrix: [(float(step), mean(s)) for step, s in sorted(steps.items())] for matrix, steps in by.items()}
        for kind, by in found.items()
    }
    values = [value for by in means.values() for points in by.values() for _, value in points]
    if not values:
        return []
    steps = sorted({each.step for each in meta.rounds if each.scores})
    x = Axis.around("optimizer steps", steps)
    y = Axis.around(f"{meta.config.score}, mean over matrices without cores", values, is_log=min(values) > 0)
    figures = []
    for kind, by in means.items():
        curves = [Curve(matrix, "subject", points) for matrix, points in sorted(by.items())]
        axis = Axis(x.label, x.low, x.high, ticks=steps)
        figures.append(curves_figure(f"scores-{kind}", f"{kind}: scores", curves, axis, y, height=110))
    return figures
