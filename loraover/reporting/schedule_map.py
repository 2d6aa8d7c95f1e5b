"""Display of a checkpoint's schedule: a map of layers and modules, and the scores over time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from loraover.checkpoint.checkpoint import Meta
from loraover.common.atomic_output import publish_file
from loraover.common.errors import ConfigError
from loraover.overparam.sites import layer_of
from loraover.reporting.html_page import COLORS

PLAIN = "#e3e6ea"
PLOT_TYPES = (".svg", ".png")


@dataclass(frozen=True)
class MapCell:
    """Place of a matrix in the map.

    Args:
        layer: Number of the layer, or "-" outside of layers; see `layer_of`.
        kind: Path of the module in its layer, e.g. "self_attn.q_proj", or its complete path outside of layers.
        matrix: "A" or "B".
    """

    layer: str
    kind: str
    matrix: str


def placed(meta: Meta) -> dict[MapCell, int | None]:
    """Return the round, from 1, in which each matrix got cores, or None; in the order of the layers."""
    rounds = {name: number for number, found in enumerate(meta.rounds, 1) for name in found.chosen}
    names = dict.fromkeys([*(n for r in meta.rounds for n in r.scores), *(site.name for site in meta.sites)])
    found = {_place(name): rounds.get(name, 1 if not meta.rounds else None) for name in names}
    return dict(sorted(found.items(), key=lambda item: _order(item[0].layer)))


def _place(name: str) -> MapCell:
    module, _, matrix = name.rpartition(".lora_")
    parts = module.split(".")
    below = next((i + 1 for i, part in enumerate(parts) if part.isdigit()), 0)
    return MapCell(layer_of(module), ".".join(parts[below:]), matrix[-1])


def _order(layer: str) -> tuple[str, int]:
    stack, _, number = layer.rpartition(" ")
    return ("" if stack == "encoder" else stack), int(number) if number.isdigit() else -1


def show_schedule(meta: Meta, console: Console) -> None:
    """Print a table of the schedule's decisions, and the map.

    In the map, a number is the round in which a matrix got cores, and a point is a matrix without cores.

    Args:
        meta: Metadata of the checkpoint.
        console: Console to print to.
    """
    config = meta.config
    what = config.schedule if config.schedule == "all" else f"{config.schedule} by {config.score}"
    console.print(f"schedule {what}: {len(meta.sites)} over-parameterised matrices", highlight=False)
    if any(found.scores for found in meta.rounds):
        table = Table(box=SIMPLE)
        for column in ("round", "after step", "sites", "added", "lowest chosen", "highest left", "forwards"):
            table.add_column(column, justify="right")
        for number, found in enumerate(meta.rounds, 1):
            chosen = [found.scores[name] for name in found.chosen if name in found.scores]
            left = [score for name, score in found.scores.items() if name not in set(found.chosen)]
            low = f"{min(chosen):.2e}" if chosen else "-"
            high = f"{max(left):.2e}" if left else "-"
            counts = (number, found.step, len(found.chosen), f"{found.added:,}")
            table.add_row(*map(str, counts), low, high, str(found.forwards))
        console.print(table)
    console.print(_map(placed(meta)))


def _map(rounds: Mapping[MapCell, int | None]) -> Table:
    kinds = list(dict.fromkeys(place.kind for place in rounds))
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("layer")
    for kind in kinds:
        table.add_column("\n".join([*escape(kind).split("."), "A B"]), justify="center", vertical="bottom")
    for layer in dict.fromkeys(place.layer for place in rounds):
        pairs = ([_cell(rounds.get(MapCell(layer, kind, matrix), 0)) for matrix in "AB"] for kind in kinds)
        table.add_row(layer, *(" ".join(pair) for pair in pairs))
    return table


def _cell(number: int | None) -> str:
    return " " if number == 0 else "·" if number is None else f"[{_color(number)}]{number}[/]"


def _color(number: int) -> str:
    return COLORS[(number - 1) % len(COLORS)]


def plot_schedule(meta: Meta, path: Path) -> None:
    """Draw the map, coloured by round, and beside it the mean score of each module type at each round.

    Args:
        meta: Metadata of the checkpoint.
        path: New file, whose name ends in .svg or .png.

    Raises:
        ConfigError: The file exists, or its name has another ending.
    """
    if path.suffix not in PLOT_TYPES:
        raise ConfigError(f"--plot {path}: expected a name that ends in {' or '.join(PLOT_TYPES)}.")
    if path.exists():
        raise ConfigError(f"--plot {path}: is there already; name a new file.")
    from matplotlib.figure import Figure

    rounds = placed(meta)
    has_scores = any(found.scores for found in meta.rounds)
    layers = list(dict.fromkeys(place.layer for place in rounds))
    figure = Figure(figsize=(13 if has_scores else 7, 2.5 + 0.22 * len(layers)), layout="constrained")
    axes = figure.subplots(1, 2 if has_scores else 1, squeeze=False)[0]
    _draw_map(axes[0], rounds)
    if has_scores:
        _draw_scores(axes[1], meta)
    publish_file(
        path,
        lambda draft: figure.savefig(
            draft, format=path.suffix[1:], metadata={"Date": None} if path.suffix == ".svg" else None
        ),
    )


def _draw_map(axes: Any, rounds: Mapping[MapCell, int | None]) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch

    layers = list(dict.fromkeys(place.layer for place in rounds))
    kinds = list(dict.fromkeys(f"{place.kind} {place.matrix}" for place in rounds))
    image = np.ones((len(layers), len(kinds), 3))
    for place, number in rounds.items():
        color = PLAIN if number is None else _color(number)
        image[layers.index(place.layer), kinds.index(f"{place.kind} {place.matrix}")] = to_rgb(color)
    axes.imshow(image, aspect="auto", interpolation="none")
    axes.set_xticks(range(len(kinds)), kinds, rotation=60, ha="right")
    axes.set_yticks(range(len(layers)), layers)
    axes.set_ylabel("layer")
    found = sorted({number for number in rounds.values() if number is not None})
    patches = [Patch(color=_color(number), label=f"round {number}") for number in found]
    if None in rounds.values():
        patches.append(Patch(color=PLAIN, label="plain"))
    axes.legend(handles=patches, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=5, frameon=False)


def _draw_scores(axes: Any, meta: Meta) -> None:
    steps = [found.step for found in meta.rounds]
    series: dict[str, list[float]] = {}
    for i, found in enumerate(meta.rounds):
        by_kind: dict[str, list[float]] = {}
        for name, score in found.scores.items():
            place = _place(name)
            by_kind.setdefault(f"{place.kind} {place.matrix}", []).append(score)
        for kind, scores in by_kind.items():
            series.setdefault(kind, [math.nan] * len(steps))[i] = float(np.mean(scores))
    for i, (kind, means) in enumerate(series.items()):
        axes.plot(steps, means, marker="o", label=kind, color=f"C{i // 2}", ls="-" if kind.endswith("A") else "--")
    values = [v for means in series.values() for v in means if not math.isnan(v)]
    axes.set_yscale("log" if min(values) > 0 else "linear")
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel(f"{meta.config.score}, mean over plain matrices")
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="center left", bbox_to_anchor=(1.0, 0.5))
