"""HumanEval: functions completed from their docstring, and their unit tests run.

Source: Chen et al. 2021, arXiv:2107.03374. Departures: one greedy sample for each problem, so pass@1 has no estimator,
and the end of a Markdown block ends the function too, as an instructed model writes it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loraover.common.errors import ConfigError
from loraover.evaluation.base import (
    Example,
    Keep,
    Options,
    Questions,
    Row,
    Task,
    TaskScores,
    read_questions,
    text_field,
)
from loraover.evaluation.parallel import in_parallel
from loraover.evaluation.sandbox import Limits, check_sandbox, run_program

if TYPE_CHECKING:
    from loraover.evaluation.subjects import Subject
    from loraover.reporting.reporter import Reporter

STOPS = (
    "\nclass",
    "\ndef",
    "\n#",
    "\nif",
    "\nprint",
    "\n```",
)  # but for the last, section 2.1 of the paper; what follows is no part of the function
FIELDS = ("task_id", "prompt", "entry_point", "test")


@dataclass(frozen=True)
class HumanEval(Task):
    """Share of functions that pass their tests."""

    hub: str = "openai/openai_humaneval"
    max_new_tokens: int = 512
    limits: Limits = field(default_factory=Limits)

    def check(self, options: Options) -> None:
        if not options.allow_code_execution:
            raise ConfigError(
                "humaneval runs the code that a model writes. It is held in a sandbox; to agree, add "
                "--allow-code-execution."
            )
        check_sandbox()

    def read(self, options: Options) -> Questions:
        return read_questions(options.data or self.hub, _problem, split="test", limit=options.examples)

    def measure(
        self, subject: Subject, questions: Questions, options: Options, report: Reporter, keep: Keep
    ) -> TaskScores:
        problems = questions.rows
        completions = subject.complete(
            [problem["prompt"] for problem in problems],
            max_new_tokens=options.max_new_tokens or self.max_new_tokens,
            stop=STOPS,
            report=report,
        )

        def run(pair: tuple[Row, str]) -> Example:
            problem, completion = pair
            body = cut(completion, STOPS)
            outcome = run_program(program(problem, body), self.limits)
            return Example(problem["task_id"], float(outcome.passed), body, note=outcome.reason)

        pairs = list(zip(problems, completions, strict=True))
        examples = in_parallel(run, pairs, os.cpu_count() or 1, "programs", report)
        return TaskScores({"pass@1": sum(example.score == 1 for example in examples) / len(examples)}, examples)

    def settings(self, options: Options, tokenizer: Any) -> dict[str, str]:
        return {"prompt": "plain text", "seconds for each program": f"{self.limits.seconds:g}"}


def program(problem: Mapping[str, Any], body: str) -> str:
    """What is run: the function, its tests, and the call that starts them."""
    return f"{problem['prompt']}{body}\n{problem['test']}\ncheck({problem['entry_point']})\n"


def cut(text: str, stops: tuple[str, ...]) -> str:
    """The text up to the first of the stops."""
    return text[: min((found for stop in stops if (found := text.find(stop)) >= 0), default=len(text))]


def _problem(row: Mapping[str, Any], where: str) -> Row:
    return {name: text_field(row, (name,), where) for name in FIELDS}
