"""Draw the answer of the registered replication, docs/study/replication, as docs/figures/answer.svg.

    python docs/draw_answer.py [--check]

`--check` writes nothing, and fails if the kept picture is not the one of the replication.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraover.common.atomic_output import publish_text
from loraover.reporting.figures import FigureRow, Point, rows_figure
from loraover.reporting.svg import Axis

DOCS = Path(__file__).parent
ANSWER, FIGURE = DOCS / "study" / "replication" / "replication.json", DOCS / "figures" / "answer.svg"
NAMES = {"gsm8k-100": "GSM8K, 100 steps", "gsm8k-300": "GSM8K, 300 steps", "mbpp": "MBPP", "mnli": "MNLI"}
REACH = 9.0
"""Per cent of the loss that the axis shows; a longer interval ends in an arrow."""


def draw(tasks: Mapping[str, Any]) -> str:
    """The picture as a file: the difference of each task with its interval."""
    rows = []
    for name, title in NAMES.items():
        low, high = tasks[name]["interval_percent"]
        ends = (f"{end:+.{0 if abs(end) >= 10 else 1}f}" for end in (low, high))
        note = f"{tasks[name]['percent']:+.1f} % [{', '.join(ends)}]"
        rows.append(FigureRow(title, note, [Point(tasks[name]["percent"], "subject")], (low, high)))
    axis = Axis("test loss of eigen beside LoRA+, % (left is better)", -REACH, REACH)
    description = "Difference of eigen to LoRA+ with its 95 % interval, which contains zero on every task"
    return rows_figure("answer", description, rows, axis, reference=0).file()


def main() -> None:
    """Draw the picture, or check the kept one."""
    drawn = draw(json.loads(ANSWER.read_text())["tasks"])
    if "--check" not in sys.argv[1:]:
        publish_text(FIGURE, drawn)
    elif drawn != FIGURE.read_text():
        sys.exit(f"{FIGURE} is not the picture of {ANSWER.name}: python docs/draw_answer.py")


if __name__ == "__main__":
    main()
