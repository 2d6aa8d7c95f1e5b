"""Print the validation loss per token of each finished run of a study's folder, also of one that is not complete.

`python docs/study/validation_losses.py docs/study/gauge-trials` prints those of the trials.
"""

from __future__ import annotations

import sys
from pathlib import Path

from loraover.study.analysis import Halves
from loraover.study.kept_runs import read_kept


def main(folder: Path) -> None:
    for found in read_kept(folder):
        half = Halves(len(found.tokens)).validation
        loss = found.failure or f"{sum(found.nats[half]) / sum(found.tokens[half]):.4f}"
        print(loss, found.run)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
