"""Write the studies' data as prompt and completion: rows of GSM8K, MBPP, SVAMP, QNLI and SUBJ.

    python docs/study/prepare.py DATA OUT

DATA holds gsm8k/train.jsonl.gz and test.jsonl (question, answer), glue/qnli_train.jsonl and qnli_dev.jsonl
(sentence1, sentence2, label), glue_like/subj_train.jsonl and subj_dev.jsonl (sentence, label), instruct/mbpp.jsonl
(text, test_list, code) and instruct/svamp_rationales.jsonl (instruction, input, output). GSM8K's answers lose their
calculator marks. Rows longer than a limit are left out, so that a step takes a few seconds on one core. Where one file
holds all rows, the first ones train and the last ones test.
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
    train_rows: int | None = None  # of a file that holds both


def gsm8k(max_characters: int) -> Task:
    return Task(
        "gsm8k/train.jsonl.gz",
        "gsm8k/test.jsonl",
        max_characters,
        lambda row: f"Question: {row['question']}\nAnswer:",
        lambda row: " " + re.sub("<<.*?>>", "", row["answer"]),
    )


TASKS = {
    "gsm8k": gsm8k(280),
    "gsm8k-long": gsm8k(360),
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
    "mbpp": Task(
        "instruct/mbpp.jsonl",
        "instruct/mbpp.jsonl",
        400,
        lambda row: f"{row['text']}\nYour code should pass this test:\n{row['test_list'][0]}\n",
        lambda row: row["code"].replace("\r\n", "\n"),
        train_rows=600,
    ),
    "svamp": Task(
        "instruct/svamp_rationales.jsonl",
        "instruct/svamp_rationales.jsonl",
        500,
        lambda row: f"Question: {row['instruction']} {row['input']}".rstrip() + "\nAnswer:",
        lambda row: " " + row["output"].strip().removeprefix("A: "),
        train_rows=440,
    ),
}


def read(path: Path, task: Task, part: slice) -> list[Row]:
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    rows = map(json.loads, text.decode().splitlines()[part])
    found = [{"prompt": task.prompt(row), "completion": task.completion(row)} for row in rows]
    return [row for row in found if len(row["prompt"] + row["completion"]) <= task.max_characters]


def main(data: Path, out: Path) -> None:
    for name, task in TASKS.items():
        (out / name).mkdir(parents=True, exist_ok=True)
        parts = (slice(task.train_rows), slice(task.train_rows if task.train == task.test else 0, None))
        for split, source, part in zip(("train", "test"), (task.train, task.test), parts, strict=True):
            rows = read(data / source, task, part)
            path = out / name / f"{split}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
