"""The benchmarks of `loraover eval`; a new one is one line here."""

from __future__ import annotations

from loraover.evaluation.base import Task
from loraover.evaluation.harness import HarnessTask
from loraover.evaluation.humaneval import HumanEval
from loraover.evaluation.mt_bench import MtBench

GLUE = "nyu-mll/glue"

TASKS: dict[str, Task] = {
    "gsm8k": HarnessTask(
        name="gsm8k",
        hub=("openai/gsm8k", "main", "test"),
        fields={"question": ("question",), "answer": ("answer",)},
        text="Question: {{question}}\nAnswer:",
        metrics=("exact_match",),
    ),
    "qnli": HarnessTask(
        name="qnli",
        hub=(GLUE, "qnli", "validation"),
        fields={"question": ("question", "sentence1"), "sentence": ("sentence", "sentence2")},
        text="{{question}}\n{{sentence}}\nQuestion: Does this response answer the question?\nAnswer:",
        choices=("yes", "no"),
        labels=("entailment", "not_entailment"),
    ),
    "mnli": HarnessTask(
        name="mnli",
        hub=(GLUE, "mnli", "validation_matched"),
        fields={"premise": ("premise", "sentence1"), "hypothesis": ("hypothesis", "sentence2")},
        text="{{premise}}\nQuestion: {{hypothesis.strip()}}{{'' if hypothesis.strip().endswith('.') else '.'}} "
        "True, False or Neither?\nAnswer:",
        choices=("True", "Neither", "False"),
        labels=("entailment", "neutral", "contradiction"),
    ),
    "sst2": HarnessTask(
        name="sst2",
        hub=(GLUE, "sst2", "validation"),
        fields={"sentence": ("sentence",)},
        text="{{sentence}}\nQuestion: Is this sentence positive or negative?\nAnswer:",
        choices=("negative", "positive"),
        labels=("negative", "positive"),
    ),
    "cola": HarnessTask(
        name="cola",
        hub=(GLUE, "cola", "validation"),
        fields={"sentence": ("sentence",)},
        text="{{sentence}}\nQuestion: Does this sentence make sense?\nAnswer:",
        choices=("no", "yes"),
        labels=("unacceptable", "acceptable"),
        metrics=("mcc",),
    ),
    "mrpc": HarnessTask(
        name="mrpc",
        hub=(GLUE, "mrpc", "validation"),
        fields={"sentence1": ("sentence1",), "sentence2": ("sentence2",)},
        text="Sentence 1: {{sentence1}}\nSentence 2: {{sentence2}}\n"
        "Question: Do both sentences mean the same thing?\nAnswer:",
        choices=("no", "yes"),
        labels=("not_equivalent", "equivalent"),
        metrics=("acc", "f1"),
    ),
    "humaneval": HumanEval(),
    "mtbench": MtBench(),
}

__all__ = ["TASKS", "Task"]
