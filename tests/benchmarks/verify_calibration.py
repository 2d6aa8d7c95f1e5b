"""Draw the strengths of recorded engines for docs/verify.md, and write its table of misses and false alarms.

    cd tests && ../.venv/bin/python -m benchmarks.verify_calibration

The noise is that of `benchmarks.verify_noise`. Sets of 32 prompts are drawn from the recorded ones.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loraover.reporting.figures import Band, FigureRow, Point, rows_figure
from loraover.reporting.svg import Axis
from loraover_serve.verify.rules import allowed_strength
from loraover_serve.verify.strength import Projections, strength

from benchmarks.verify_noise import NOISE

DOCS = Path(__file__).parents[2] / "docs"
START, END = "<!-- calibration -->", "<!-- end of calibration -->"
SERVED = {"as trained": "adapter", "0.8 times": "weak", "1.2 times": "strong"}
COARSE = ("int4", "q4")  # whose allowed strength PyTorch has to compute
PROMPTS, RUNS = 32, 1000
Floats = NDArray[np.float64]


def sums(engine: str, arm: str) -> Projections:
    """Projections of what an engine changes in an arm."""
    with np.load(NOISE / f"{engine}.npz") as file:
        kept = {name: np.nan_to_num(file[name].astype(np.float64)) for name in file.files}
    effect = kept["effect"]
    change = effect + kept[arm] - kept["base"]
    return Projections((change * effect).sum(-1), np.square(effect).sum(-1), np.square(change).sum(-1))


def main() -> None:
    """Write the figure and the table."""
    rows, lines = [], ["| engine | served | strength | called differing |", "| --- | --- | --- | --- |"]
    allowed = allowed_strength("bf16", 1.0)
    for path in sorted(NOISE.glob("*.npz")):
        for served, arm in SERVED.items():
            all_ = sums(path.stem, arm)
            found = strength(all_)
            draw = np.random.default_rng(0)
            chosen = np.array([draw.choice(len(all_.size), PROMPTS, replace=False) for _ in range(RUNS)])
            drawn = strength(Projections(all_.along[chosen], all_.size[chosen], all_.total[chosen]))
            differing = np.mean((drawn.low > allowed[1]) | (drawn.high < allowed[0]))
            value, low, high = (float(each) for each in (found.value, found.low, found.high))
            note = f"{value:.2f} [{low:.2f}, {high:.2f}]"
            is_coarse = path.stem.endswith(COARSE)
            lines.append(f"| {path.stem} | {served} | {note} | {'-' if is_coarse else format(differing, '.1%')} |")
            bands = [] if is_coarse else [Band(*allowed)]
            rows.append(FigureRow(f"{path.stem}: {served}", note, [Point(value, "subject")], (low, high), bands))
    figure = rows_figure("verify-strength", "Strength by engine", rows, Axis.around("strength", [0.0, 1.25]))
    (DOCS / "figures" / f"{figure.name}.svg").write_text(figure.file(), encoding="utf-8")
    page = (DOCS / "verify.md").read_text(encoding="utf-8")
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    table = "\n".join(lines)
    (DOCS / "verify.md").write_text(f"{before}{START}\n\n{table}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
