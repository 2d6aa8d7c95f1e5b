"""`loraover train`, as its tests call it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loraover.cli import cli
from loraover.common.command_line import run

STEPS = 4
METHODS = ("lora", "lora-over")
TURNS = [
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "and 2+2?"},
    {"role": "assistant", "content": "#### 4"},
]


def train(recipe: Path, out: Path, *options: object) -> int:
    return run(cli, ["train", str(recipe), "-o", str(out), *map(str, options)])


def data_file(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
