"""A checkpoint's schedule for people: a map of layers and modules, and the scores over time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from loraover.checkpoint import Meta
from loraover.errors import ConfigError
from loraover.output import publish_file
from loraover.sites import layer_of

COLORS = ("#3b7dd8", "#d9822b", "#2e9e6b", "#c2406b", "#8a63d2", "#7a8a99")
"""Of rounds, from the first on, over and over."""
PLOT_TYPES = (".svg", ".png")


def placed(meta: Meta) -> dict[tuple[str, str], int | None]:
    """Round (from 1) in which the matrix at (layer, module type and A or B) was injected; None: it is plain."""
    rounds = {name: number for number, found in enumerate(meta.rounds, 1) for name in found.chosen}
    names = dict.fromkeys([*(site.name for site in meta.sites), *(n for r in meta.rounds for n in r.scores)])
    return {_place(name): rounds.get(name, 1 if not meta.rounds else None) for name in names}


def _place(name: str) -> tuple[str, str]:
    module, _, matrix = name.rpartition(".lora_")
    return layer_of(module), f"{module.rpartition('.')[2]} {matrix}"


def show_schedule(meta: Meta, console: Console) -> None:
    """Decisions, and the map: a number is the round in which a matrix was injected, a point a plain matrix."""
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


def _map(rounds: Mapping[tuple[str, str], int | None]) -> Table:
    kinds = list(dict.fromkeys(kind for _, kind in rounds))
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("layer")
    for kind in kinds:
        table.add_column(kind.replace(" ", "\n"), justify="center")
    for layer in dict.fromkeys(layer for layer, _ in rounds):
        cells = []
        for kind in kinds:
            number = rounds.get((layer, kind), 0)
            cells.append("" if number == 0 else "·" if number is None else f"[{_color(number)}]{number}[/]")
        table.add_row(layer, *cells)
    return table


def _color(number: int) -> str:
    return COLORS[(number - 1) % len(COLORS)]


def plot_schedule(meta: Meta, path: Path) -> None:
    """The map, coloured by round, beside the mean score of each module type at each round.

    Raises:
        ConfigError: a file that is there already, or of another type.
    """
    if path.suffix not in PLOT_TYPES:
        raise ConfigError(f"--plot {path}: expected a name that ends in {' or '.join(PLOT_TYPES)}.")
    if path.exists():
        raise ConfigError(f"--plot {path}: is there already; name a new file.")
    from matplotlib.figure import Figure

    rounds = placed(meta)
    has_scores = any(found.scores for found in meta.rounds)
    layers = list(dict.fromkeys(layer for layer, _ in rounds))
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


def _draw_map(axes: Any, rounds: Mapping[tuple[str, str], int | None]) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch

    layers = list(dict.fromkeys(layer for layer, _ in rounds))
    kinds = list(dict.fromkeys(kind for _, kind in rounds))
    image = np.ones((len(layers), len(kinds), 3))
    for (layer, kind), number in rounds.items():
        color = "#e3e6ea" if number is None else _color(number)
        image[layers.index(layer), kinds.index(kind)] = to_rgb(color)
    axes.imshow(image, aspect="auto", interpolation="none")
    axes.set_xticks(range(len(kinds)), kinds, rotation=60, ha="right")
    axes.set_yticks(range(len(layers)), layers)
    axes.set_ylabel("layer")
    found = sorted({number for number in rounds.values() if number is not None})
    patches = [Patch(color=_color(number), label=f"round {number}") for number in found]
    if None in rounds.values():
        patches.append(Patch(color="#e3e6ea", label="plain"))
    axes.legend(handles=patches, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False)


def _draw_scores(axes: Any, meta: Meta) -> None:
    steps = [found.step for found in meta.rounds]
    series: dict[str, list[float]] = {}
    for i, found in enumerate(meta.rounds):
        by_kind: dict[str, list[float]] = {}
        for name, score in found.scores.items():
            by_kind.setdefault(_place(name)[1], []).append(score)
        for kind, scores in by_kind.items():
            series.setdefault(kind, [math.nan] * len(steps))[i] = float(np.mean(scores))
    for i, (kind, means) in enumerate(series.items()):
        axes.plot(
            steps, means, marker="o", label=kind, color=COLORS[(i // 2) % 6], ls="-" if kind.endswith("A") else "--"
        )
    values = [v for means in series.values() for v in means if not math.isnan(v)]
    axes.set_yscale("log" if min(values) > 0 else "linear")
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel(f"{meta.config.score}, mean over plain matrices")
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="center left", bbox_to_anchor=(1.0, 0.5))
