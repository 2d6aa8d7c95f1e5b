"""Public data sets that some tests read: in the folder $LORAOVER_DATA, or in `shared/data` beside the checkout."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

BESIDE = Path(__file__).resolve().parents[3] / "shared" / "data"


def data_folder() -> Path:
    return Path(os.environ.get("LORAOVER_DATA") or BESIDE)


def real_data(name: str) -> Path:
    """The data file of that name, e.g. "gsm8k/train.jsonl.gz"; skips the test where it is absent."""
    path = data_folder() / name
    if not path.is_file():
        pytest.skip(f"{path}: no such file; name the folder that holds {name} in LORAOVER_DATA")
    return path
