"""GLUE tasks as text to text: a prompt that ends in "result: ", and a label in words.

The prompts are those of LoRA-GA (Wang et al. 2024, arXiv:2407.05000), as in the code that its authors published.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from loraover.common.errors import DataError


@dataclass(frozen=True)
class GlueTask:
    """Task of GLUE.

    Args:
        instruction: Beginning of the prompt.
        columns: Columns of nyu-mll/glue that follow the instruction, one a line.
        labels: Words for the labels 0, 1, ...
    """

    instruction: str
    columns: tuple[str, ...]
    labels: tuple[str, ...]


GLUE_TASKS = {
    "mnli": GlueTask(
        "classify the semantic similarity of the text: ",
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
    ),
    "sst2": GlueTask("classify the sentiment of the text: ", ("sentence",), ("negative", "positive")),
    "cola": GlueTask("classify the grammaticality of the text: ", ("sentence",), ("unacceptable", "acceptable")),
    "qnli": GlueTask(
        "classify the semantic similarity of the question and the sentence: ",
        ("question", "sentence"),
        ("entailment", "not_entailment"),
    ),
    "mrpc": GlueTask(
        "classify the semantic similarity of the text: ", ("sentence1", "sentence2"), ("different", "equivalent")
    ),
}


def glue_reader(task: GlueTask) -> Callable[[Mapping[str, Any], str], Iterator[dict[str, Any]]]:
    """Return a function that reads the task's rows, as nyu-mll/glue has them."""

    def read(row: Mapping[str, Any], where: str) -> Iterator[dict[str, Any]]:
        texts = [row.get(column) for column in task.columns]
        for column, text in zip(task.columns, texts, strict=True):
            if not isinstance(text, str):  # an empty sentence is data
                raise DataError(f"{where}: field {column!r} is {text!r}, expected text.")
        label = row.get("label")
        if type(label) is not int or not 0 <= label < len(task.labels):
            words = ", ".join(f"{i} ({word})" for i, word in enumerate(task.labels))
            hint = "; the hub's test splits have no labels" if label == -1 else ""
            raise DataError(f"{where}: field 'label' is {label!r}, expected {words}{hint}.")
        yield {"prompt": task.instruction + "\n".join(map(str, texts)) + "\nresult: ", "completion": task.labels[label]}

    return read
