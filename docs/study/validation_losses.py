"""Print the validation loss per token of each finished run of a study's folder, also of one that is not complete.

`python docs/study/validation_losses.py docs/study/gauge-trials` prints those of the trials.
"""

from __future__ import annotations

import sys
from pathlib import Path

from loraover.common.strict_json import read_json
from loraover.study.analysis import Halves
from loraover.study.outcome import OUTCOME_FILE, Outcome


def main(folder: Path) -> None:
    for file in sorted(folder.rglob(OUTCOME_FILE)):
        found = read_json(file, Outcome)
        half = Halves(len(found.tokens)).validation
        loss = found.failure or f"{sum(found.nats[half]) / sum(found.tokens[half]):.4f}"
        print(loss, file.parent.relative_to(folder / "runs"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
