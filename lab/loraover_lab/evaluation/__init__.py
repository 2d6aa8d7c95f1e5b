"""Benchmarks of `loraover eval`. A new one is a line in `TASKS`."""

from __future__ import annotations

from loraover_lab.evaluation.base import Task
from loraover_lab.evaluation.harness import HarnessTask
from loraover_lab.evaluation.humaneval import HumanEval
from loraover_lab.evaluation.mt_bench import MtBench


def _glue(name: str, labels: tuple[str, ...], split: str = "validation", **fields: tuple[str, ...]) -> HarnessTask:
    """A task of GLUE: the names of its labels, and those that each of its fields may have in a file."""
    return HarnessTask(name, f"glue/{name}", ("nyu-mll/glue", name, split), fields, labels)


TASKS: dict[str, Task] = {
    "gsm8k": HarnessTask(
        name="gsm8k",
        folder="gsm8k",
        hub=("openai/gsm8k", "main", "test"),
        fields={"question": ("question",), "answer": ("answer",)},
    ),
    "qnli": _glue(
        "qnli",
        ("entailment", "not_entailment"),
        question=("question", "sentence1"),
        sentence=("sentence", "sentence2"),
    ),
    "mnli": _glue(
        "mnli",
        ("entailment", "neutral", "contradiction"),
        split="validation_matched",
        premise=("premise", "sentence1"),
        hypothesis=("hypothesis", "sentence2"),
    ),
    "sst2": _glue("sst2", ("negative", "positive"), sentence=("sentence",)),
    "cola": _glue("cola", ("unacceptable", "acceptable"), sentence=("sentence",)),
    "mrpc": _glue("mrpc", ("not_equivalent", "equivalent"), sentence1=("sentence1",), sentence2=("sentence2",)),
    "humaneval": HumanEval(),
    "mtbench": MtBench(),
}
