"""Data of the study as prompt and completion: short rows of GSM8K, QNLI and SUBJ.

    python docs/study/prepare.py DATA OUT

DATA holds gsm8k/train.jsonl.gz and test.jsonl (question, answer), glue/qnli_train.jsonl and qnli_dev.jsonl
(sentence1, sentence2, label), glue_like/subj_train.jsonl and subj_dev.jsonl (sentence, label). GSM8K's answers lose
their calculator marks, and rows longer than a limit are left out, so that a step takes a second or two on one core.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

Row = dict[str, str]


class Task(NamedTuple):
    train: str
    test: str
    max_characters: int  # of prompt and completion together
    prompt: Callable[[Row], str]
    completion: Callable[[Row], str]


TASKS = {
    "gsm8k": Task(
        "gsm8k/train.jsonl.gz",
        "gsm8k/test.jsonl",
        280,
        lambda row: f"Question: {row['question']}\nAnswer:",
        lambda row: " " + re.sub("<<.*?>>", "", row["answer"]),
    ),
    "qnli": Task(
        "glue/qnli_train.jsonl",
        "glue/qnli_dev.jsonl",
        220,
        lambda row: f"Question: {row['sentence1']}\nSentence: {row['sentence2']}\nDoes it answer the question?",
        lambda row: {"entailment": " yes", "not_entailment": " no"}[row["label"]],
    ),
    "subj": Task(
        "glue_like/subj_train.jsonl",
        "glue_like/subj_dev.jsonl",
        160,
        lambda row: f"Sentence: {row['sentence']}\nSubjective or objective?",
        lambda row: f" {row['label']}",
    ),
}


def read(path: Path, task: Task) -> list[Row]:
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    rows = map(json.loads, text.decode().splitlines())
    found = [{"prompt": task.prompt(row), "completion": task.completion(row)} for row in rows]
    return [row for row in found if len(row["prompt"] + row["completion"]) <= task.max_characters]


def main(data: Path, out: Path) -> None:
    for name, task in TASKS.items():
        (out / name).mkdir(parents=True, exist_ok=True)
        for split, source in (("train", task.train), ("test", task.test)):
            rows = read(data / source, task)
            path = out / name / f"{split}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
