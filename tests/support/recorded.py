"""A reference of a tiny model's adapter, and what PyTorch answers to the same questions."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from loraover.checkpoint.carried_files import adapter_digest
from loraover.checkpoint.files import REFERENCE_FILE
from loraover_serve.judge.reference import read_reference
from loraover_serve.verify.recorder import record_adapter

from support.verified import Case, make_case

QUESTIONS, ANSWER = 8, 4
LINES = (
    "The train leaves at nine",
    "A farmer has 17 sheep",
    "def is_even(number):",
    "Water boils at a lower",
    "Dear all, please find",
    "Question: which planet",
    "Der Zug um neun Uhr ab",
    "1, 1, 2, 3, 5, 8, 13,",
)


def write_reference(adapter: Path, digest: str | None = None) -> Path:
    """What an export reads of a reference of an adapter: its digests; returns the path."""
    path = adapter / REFERENCE_FILE
    content = {"digests": {"adapter": digest or adapter_digest(adapter)}}
    path.write_bytes(gzip.compress(json.dumps(content).encode(), mtime=0))
    return path


def record(base: Path, adapter: Path, folder: Path, **options: Any) -> Path:
    """The path of a reference with these questions."""
    prompts = folder / "questions.txt"
    prompts.write_text("\n".join(LINES))
    return record_adapter(
        adapter,
        model=str(base),
        prompts=prompts,
        new_tokens=ANSWER,
        device="cpu",
        output=folder / "reference.json.gz",
        **options,
    ).path


def asked_alike(base: Path, adapter: Path, recorded: Path) -> Case:
    """PyTorch's models, with the questions of a reference."""
    questions = read_reference(recorded).questions
    return make_case(base, adapter, ANSWER, [question.prompt for question in questions])
