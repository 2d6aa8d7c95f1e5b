"""Print the validation loss per token of each finished run of a study's folder, also of one that is not complete.

`python docs/study/validation_losses.py docs/study/gauge-trials` prints those of the trials.
"""

from __future__ import annotations

import sys
from pathlib import Path

from loraover_lab.study.outcome import read_kept
from loraover_lab.study.tuning import validation_loss


def main(folder: Path) -> None:
    for found in read_kept(folder):
        print(found.failure or f"{validation_loss([found]):.4f}", found.run)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
