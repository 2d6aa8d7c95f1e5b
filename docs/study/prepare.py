"""Write the studies' data as prompt and completion: rows of GSM8K, MBPP, SVAMP, QNLI, MNLI and SUBJ.

    python docs/study/prepare.py DATA OUT

DATA holds gsm8k/train.jsonl.gz and test.jsonl (question, answer), glue/qnli_train.jsonl, qnli_dev.jsonl,
mnli_train.jsonl and mnli_dev.jsonl (sentence1, sentence2, label), glue_like/subj_train.jsonl and subj_dev.jsonl
(sentence, label), instruct/mbpp.jsonl (text, test_list, code) and instruct/svamp_rationales.jsonl (instruction, input,
output). GSM8K's answers lose their calculator marks. Rows longer than a limit are left out, so that a step takes a few
seconds on one core. Where one file holds all rows, the first ones train and the last ones test; in the replication
(mbpp-rest), all that do not train test. Test rows of the tasks named "unread" have chosen no rate in an earlier study,
and those of mnli-sweep are training rows of mnli.
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
    test_characters: tuple[int, int] | None = None  # limits of all rows that do not train, in place of the last ones
    apart: str | None = None  # column whose values in training rows no test row has
    chosen_on: str | None = None  # task whose even test rows chose rates, and do not test here


GSM8K = Task(
    "gsm8k/train.jsonl.gz",
    "gsm8k/test.jsonl",
    280,
    lambda row: f"Question: {row['question']}\nAnswer:",
    lambda row: " " + re.sub("<<.*?>>", "", row["answer"]),
)
MBPP = Task(
    "instruct/mbpp.jsonl",
    "instruct/mbpp.jsonl",
    400,
    lambda row: f"{row['text']}\nYour code should pass this test:\n{row['test_list'][0]}\n",
    lambda row: row["code"].replace("\r\n", "\n"),
    train_rows=600,
)

QNLI = Task(
    "glue/qnli_train.jsonl",
    "glue/qnli_dev.jsonl",
    220,
    lambda row: f"Question: {row['sentence1']}\nSentence: {row['sentence2']}\nDoes it answer the question?",
    lambda row: {"entailment": " yes", "not_entailment": " no"}[row["label"]],
)
MNLI = Task(
    "glue/mnli_train.jsonl",
    "glue/mnli_dev.jsonl",
    400,
    lambda row: f"Premise: {row['sentence1']}\nHypothesis: {row['sentence2']}\nEntailment, neutral or contradiction?",
    lambda row: f" {row['label']}",
    apart="sentence1",
)

TASKS = {
    "gsm8k": GSM8K,
    "gsm8k-long": GSM8K._replace(max_characters=360),
    "gsm8k-500": GSM8K._replace(max_characters=500, test_characters=(361, 700)),
    "qnli": QNLI,
    "qnli-unread": QNLI._replace(test_characters=(221, 250)),
    "subj": Task(
        "glue_like/subj_train.jsonl",
        "glue_like/subj_dev.jsonl",
        160,
        lambda row: f"Sentence: {row['sentence']}\nSubjective or objective?",
        lambda row: f" {row['label']}",
    ),
    "mbpp": MBPP,
    "mbpp-rest": MBPP._replace(test_characters=(0, 1200)),
    "mbpp-unread": MBPP._replace(test_characters=(0, 1200), chosen_on="mbpp"),
    "mnli": MNLI,
    "mnli-sweep": MNLI._replace(test=MNLI.train, train_rows=3700),
    "svamp": Task(
        "instruct/svamp_rationales.jsonl",
        "instruct/svamp_rationales.jsonl",
        500,
        lambda row: f"Question: {row['instruction']} {row['input']}".rstrip() + "\nAnswer:",
        lambda row: " " + row["output"].strip().removeprefix("A: "),
        train_rows=440,
    ),
}


def read(path: Path) -> list[Row]:
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in text.decode().splitlines()]


def split(task: Task, data: Path) -> tuple[list[Row], list[Row]]:
    """Training and test rows of a task."""

    def within(rows: list[Row], low: int, high: int) -> list[Row]:
        return [row for row in rows if low <= len(task.prompt(row) + task.completion(row)) <= high]

    rows, held_out = read(data / task.train), read(data / task.test)
    train = within(rows[: task.train_rows], 0, task.max_characters)
    if task.test_characters is None:
        first = task.train_rows or 0 if task.train == task.test else 0
        test = within(held_out[first:], 0, task.max_characters)
    else:
        test = within([row for row in held_out if row not in train], *task.test_characters)
    if task.chosen_on is not None:
        chose = split(TASKS[task.chosen_on], data)[1][::2]
        test = [row for row in test if row not in chose]
    used = set() if task.apart is None else {row[task.apart] for row in train}
    return train, [row for row in test if task.apart is None or row[task.apart] not in used]


def main(data: Path, out: Path) -> None:
    for name, task in TASKS.items():
        (out / name).mkdir(parents=True, exist_ok=True)
        for part, rows in zip(("train", "test"), split(task, data), strict=True):
            path = out / name / f"{part}.jsonl"
            made = [{"prompt": task.prompt(row), "completion": task.completion(row)} for row in rows]
            path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
            print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
