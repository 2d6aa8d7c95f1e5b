"""Rows of training data, and how they are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraover.common.errors import DataError
from loraover.data.formats import RowForm
from loraover.data.sources import Rows, load_rows

PAIR = {"prompt": "1+1?", "completion": " 2"}
GSM8K = {"question": "1+1?", "answer": "1+1=<<1+1=2>>2\n#### 2"}
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "And 2+2?"},
    {"role": "assistant", "content": "4"},
]
MESSAGES = {"messages": TURNS}
METAMATH = {
    "type": "GSM_Rephrased",
    "query": "1+1?",
    "original_question": "one and one?",
    "response": "It is 1+1 = 2.\n#### 2\nThe answer is: 2",
}
WIZARD = {"instruction": "Say hi.", "output": "Hi!"}
TALK = {"idx": "a", "conversations": [{"from": "human", "value": "Say hi."}, {"from": "gpt", "value": "Hi!"}]}
MNLI = {"premise": "It rained.", "hypothesis": "It was dry.", "label": 2, "idx": 0}

Write = Callable[..., Path]


def lines(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def load(source: object, *, split: str = "train", limit: int | None = None, **options: Any) -> Rows:
    chosen: dict[str, Any] = {"subset": None, "revision": None, "format": "auto"} | options
    form = RowForm(chat=chosen.pop("chat", False))
    return load_rows(str(source), split=split, limit=limit, form=form, **chosen)


def fault(source: object, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        load(source, **options)
    return str(caught.value)
