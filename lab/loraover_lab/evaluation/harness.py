"""Benchmarks of lm-evaluation-harness: tasks from its files, on rows that we read.

Source: Gao et al. 2024, doi:10.5281/zenodo.12608602. Departures: no examples precede the question, it is put into the
chat template if the model has one, and GSM8K's answers are compared as numbers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraover.common.errors import ConfigError, DataError, EngineError
from loraover.data.word_problems import final_number
from loraover_lab.evaluation.base import (
    IN_CHAT_TEMPLATE,
    Example,
    Keep,
    Questions,
    Row,
    Task,
    TaskScores,
    label_field,
    read_questions,
    text_field,
    uses_chat,
)

if TYPE_CHECKING:
    from loraover_lab.evaluation.request import EvaluationRequest
    from loraover_lab.evaluation.subjects import Answerer

SPLIT = "questions"
DROPPED = ("training_split", "validation_split", "fewshot_split", "filter_list")  # keys of the harness's task


@dataclass(frozen=True)
class HarnessTask(Task):
    """A task as the harness defines it.

    Args:
        name: The task's name in the harness.
        folder: Folder, below the harness's `lm_eval/tasks`, that defines it.
        hub: Name, configuration and split of the questions on the hub.
        fields: Fields of the harness's rows, each with the names that it may have in a file.
        labels: Names of the choices, which a file may use in place of numbers; empty where an answer is a number.
    """

    name: str
    folder: str
    hub: tuple[str, str, str]
    fields: Mapping[str, tuple[str, ...]] = field(hash=False)
    labels: tuple[str, ...] = ()
    max_new_tokens: int = 400
    packages: tuple[str, ...] = ("lm-eval",)

    def check(self, request: EvaluationRequest) -> None:
        super().check(request)
        import_module("lm_eval")  # said before a study trains for hours
        if self.labels and request.new_tokens is not None:
            raise ConfigError(
                f"{request.named('new_tokens')}: {self.name} compares the likelihoods of its labels and generates "
                "nothing; leave it out."
            )

    def read(self, request: EvaluationRequest) -> Questions:
        name, subset, split = self.hub
        if request.data is not None:
            return read_questions(request.data, self._question, split=split, limit=request.limit)
        return read_questions(name, self._question, split=split, subset=subset, limit=request.limit)

    def measure(self, subject: Answerer, questions: Questions, request: EvaluationRequest, keep: Keep) -> TaskScores:
        from lm_eval import simple_evaluate

        logging.getLogger("lm_eval").setLevel(logging.CRITICAL)  # again, since its import sets the level
        found = simple_evaluate(
            model=subject.harness_model(),
            tasks=[self.harness_task(questions)],
            task_manager=self._tasks(),
            gen_kwargs={"max_gen_toks": request.new_tokens or self.max_new_tokens},
            apply_chat_template=uses_chat(request, subject.tokenizer),
            bootstrap_iters=0,
        )
        samples = sorted(found["samples"][self.name], key=lambda sample: sample["doc_id"])
        measures = {
            key.partition(",")[0]: float(value)
            for key, value in found["results"][self.name].items()
            if isinstance(value, float) and "stderr" not in key
        }
        return TaskScores(measures, [self._example(sample) for sample in samples])

    def settings(self, request: EvaluationRequest, tokenizer: Any) -> dict[str, str]:
        return {"prompt": IN_CHAT_TEMPLATE if uses_chat(request, tokenizer) else "plain text", "shots": "0"}

    def _question(self, row: Mapping[str, Any], where: str) -> Row:
        is_glue = bool(self.labels)  # GLUE has empty sentences
        found: Row = {name: text_field(row, n, where, may_be_empty=is_glue) for name, n in self.fields.items()}
        if self.labels:
            found["label"] = label_field(row, self.labels, where)
        elif final_number(found["answer"]) is None:
            raise DataError(f"{where}: field 'answer' is {found['answer']!r:.80}, which holds no number.")
        return found

    def _example(self, sample: Mapping[str, Any]) -> Example:
        number = str(sample["doc_id"] + 1)  # as messages count rows
        if not self.labels:
            answer, expected = sample["filtered_resps"][0], str(final_number(sample["doc"]["answer"]))
            return Example(number, sample["exact_match"], answer, expected)
        scores = [response[0] for response in sample["filtered_resps"]]
        if not all(map(math.isfinite, scores)):  # the largest of them would be the first label
            raise EngineError(
                f"question {number}: the log-likelihoods of its answers are {scores}, expected finite numbers; check "
                "the model's weights, or compute in fp32."
            )
        answer = self.labels[scores.index(max(scores))]
        expected = self.labels[sample["doc"]["label"]]
        return Example(number, float(answer == expected), answer, expected)

    def harness_task(self, questions: Questions) -> Any:
        """The harness's task, a `ConfigurableTask`, with our rows in place of its data."""
        from datasets import Dataset, DatasetDict

        def rows(**_: Any) -> Any:
            return DatasetDict({SPLIT: Dataset.from_list(questions.rows)})

        ours = dict.fromkeys(DROPPED) | {"custom_dataset": rows, "test_split": SPLIT, "num_fewshot": 0}
        if not self.labels:
            ours["process_results"] = number_matches
        # Only a group may change a task that the manager knows.
        group = {"group": SPLIT, "task": [{"task": self.name, **ours}]}
        return self._tasks().load(group)["tasks"][self.name]

    def _tasks(self) -> Any:
        """The harness's index of one folder; an index of all its tasks takes many seconds."""
        import lm_eval.tasks

        folder = Path(lm_eval.tasks.__file__).parent / self.folder
        return lm_eval.tasks.TaskManager(include_defaults=False, include_path=folder)


def number_matches(row: Mapping[str, Any], answers: list[str]) -> dict[str, float]:
    """Score 1 if the answer's final number equals the reference's, whatever its format."""
    found = final_number(answers[0])
    return {"exact_match": float(found is not None and found == final_number(row["answer"]))}
