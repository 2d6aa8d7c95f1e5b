"""Benchmarks of `loraover eval`. A new one is a line in `TASKS`."""

from __future__ import annotations

from loraover.evaluation.base import Task
from loraover.evaluation.harness import HarnessTask
from loraover.evaluation.humaneval import HumanEval
from loraover.evaluation.mt_bench import MtBench

GLUE = "nyu-mll/glue"

TASKS: dict[str, Task] = {
    "gsm8k": HarnessTask(
        name="gsm8k",
        folder="gsm8k",
        hub=("openai/gsm8k", "main", "test"),
        fields={"question": ("question",), "answer": ("answer",)},
    ),
    "qnli": HarnessTask(
        name="qnli",
        folder="glue/qnli",
        hub=(GLUE, "qnli", "validation"),
        fields={"question": ("question", "sentence1"), "sentence": ("sentence", "sentence2")},
        labels=("entailment", "not_entailment"),
    ),
    "mnli": HarnessTask(
        name="mnli",
        folder="glue/mnli",
        hub=(GLUE, "mnli", "validation_matched"),
        fields={"premise": ("premise", "sentence1"), "hypothesis": ("hypothesis", "sentence2")},
        labels=("entailment", "neutral", "contradiction"),
    ),
    "sst2": HarnessTask(
        name="sst2",
        folder="glue/sst2",
        hub=(GLUE, "sst2", "validation"),
        fields={"sentence": ("sentence",)},
        labels=("negative", "positive"),
    ),
    "cola": HarnessTask(
        name="cola",
        folder="glue/cola",
        hub=(GLUE, "cola", "validation"),
        fields={"sentence": ("sentence",)},
        labels=("unacceptable", "acceptable"),
    ),
    "mrpc": HarnessTask(
        name="mrpc",
        folder="glue/mrpc",
        hub=(GLUE, "mrpc", "validation"),
        fields={"sentence1": ("sentence1",), "sentence2": ("sentence2",)},
        labels=("not_equivalent", "equivalent"),
    ),
    "humaneval": HumanEval(),
    "mtbench": MtBench(),
}

__all__ = ["TASKS", "Task"]
