"""Benchmarks that lm-evaluation-harness runs: its prompts and metrics, our reading of the data.

Source: Gao et al. 2024, doi:10.5281/zenodo.12608602. Departures: no examples before the question, the chat template
around it where the model has one, and GSM8K's answers are compared as numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loraover.common.errors import DataError
from loraover.evaluation.base import (
    Example,
    Keep,
    Options,
    Questions,
    Row,
    Task,
    TaskScores,
    label_field,
    read_questions,
    text_field,
    uses_chat,
)
from loraover.evaluation.final_number import final_number

if TYPE_CHECKING:
    from loraover.evaluation.subjects import Subject
    from loraover.reporting.reporter import Reporter

SPLIT = "questions"
STOPS = ("Question:", "</s>", "<|im_end|>")


@dataclass(frozen=True)
class HarnessTask(Task):
    """A task as the harness defines it.

    Args:
        name: in the harness.
        hub: name, subset and split of the questions.
        fields: of the harness's rows, each with the names that it may have in a file.
        text: the harness's template of a question.
        choices: its answers, one for each label; none where an answer is a number.
        labels: by which a file may call the choices, instead of by number.
        metrics: the harness's.
    """

    name: str
    hub: tuple[str, str, str]
    fields: Mapping[str, tuple[str, ...]] = field(hash=False)
    text: str
    choices: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ("acc",)
    max_new_tokens: int = 400
    packages: tuple[str, ...] = ("lm-eval",)

    def read(self, options: Options) -> Questions:
        name, subset, split = self.hub
        if options.data is not None:
            return read_questions(options.data, self._question, split=split, limit=options.examples)
        return read_questions(name, self._question, split=split, subset=subset, limit=options.examples)

    def measure(
        self, subject: Subject, questions: Questions, options: Options, report: Reporter, keep: Keep
    ) -> TaskScores:
        from lm_eval import simple_evaluate
        from lm_eval.api.task import ConfigurableTask
        from lm_eval.tasks import TaskManager

        logging.getLogger("lm_eval").setLevel(logging.CRITICAL)  # its errors show a request with its key
        found = simple_evaluate(
            model=subject.harness_model(),
            tasks=[ConfigurableTask(config=self._config(questions, options))],
            task_manager=TaskManager(include_defaults=False),
            apply_chat_template=uses_chat(options, subject.tokenizer),
            bootstrap_iters=0,
        )
        samples = sorted(found["samples"][self.name], key=lambda sample: sample["doc_id"])
        measures = {
            key.partition(",")[0]: float(value)
            for key, value in found["results"][self.name].items()
            if isinstance(value, float) and "stderr" not in key
        }
        return TaskScores(measures, [self._example(sample) for sample in samples])

    def settings(self, options: Options, tokenizer: Any) -> dict[str, str]:
        return {"prompt": "chat template" if uses_chat(options, tokenizer) else "plain text", "shots": "0"}

    def _question(self, row: Mapping[str, Any], where: str) -> Row:
        is_glue = bool(self.labels)  # where an empty sentence is data
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
        answer = self.labels[scores.index(max(scores))]
        expected = self.labels[sample["doc"]["label"]]
        return Example(number, float(answer == expected), answer, expected)

    def _config(self, questions: Questions, options: Options) -> dict[str, Any]:
        def rows(**_: Any) -> Any:
            from datasets import Dataset, DatasetDict

            return DatasetDict({SPLIT: Dataset.from_list(questions.rows)})

        common = {
            "task": self.name,
            "custom_dataset": rows,
            "test_split": SPLIT,
            "num_fewshot": 0,
            "doc_to_text": self.text,
            "metric_list": [{"metric": metric} for metric in self.metrics],
        }
        if self.choices:
            answers = {"doc_to_choice": list(self.choices), "doc_to_target": "label"}
            return common | answers | {"output_type": "multiple_choice"}
        return common | {
            "output_type": "generate_until",
            "doc_to_target": "{{answer}}",
            "process_results": number_matches,
            "generation_kwargs": {
                "until": list(STOPS),
                "do_sample": False,
                "max_gen_toks": options.max_new_tokens or self.max_new_tokens,
            },
        }


def number_matches(row: Mapping[str, Any], answers: list[str]) -> dict[str, float]:
    """Whether the answer's final number is the reference's, however it is written."""
    found = final_number(answers[0])
    return {"exact_match": float(found is not None and found == final_number(row["answer"]))}
