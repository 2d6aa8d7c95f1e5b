"""HumanEval: functions that a model completes from their docstring, scored by unit tests.

Source: Chen et al. 2021, arXiv:2107.03374. Departures: pass@1 is the share of problems whose one greedy answer passes,
and the end of a Markdown block also ends a function, since instructed models write one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loraover.client.at_once import at_once
from loraover.common.errors import ConfigError
from loraover_lab.evaluation.base import (
    Example,
    Keep,
    Questions,
    Row,
    Task,
    TaskScores,
    read_questions,
    text_field,
)
from loraover_lab.evaluation.sandbox import Limits, check_sandbox, run_program

if TYPE_CHECKING:
    from loraover_lab.evaluation.request import EvaluationRequest
    from loraover_lab.evaluation.subjects import Answerer

STOPS = (
    "\nclass",
    "\ndef",
    "\n#",
    "\nif",
    "\nprint",
    "\n```",
)  # the first five are from section 2.1 of the paper; a function ends before each of them


@dataclass(frozen=True)
class HumanEval(Task):
    """Share of functions that pass their tests."""

    hub: str = "openai/openai_humaneval"
    max_new_tokens: int = 512
    limits: Limits = field(default_factory=Limits)

    def check(self, request: EvaluationRequest) -> None:
        super().check(request)
        if request.apply_chat_template:
            template = request.named("apply_chat_template")
            raise ConfigError(f"{template}: the prompts of humaneval are always plain text; leave it out.")
        if not request.allow_code_execution:
            raise ConfigError(
                "humaneval runs code that a model writes, in a sandbox. To agree, add "
                f"{request.named('allow_code_execution', True)}."
            )
        check_sandbox()

    def read(self, request: EvaluationRequest) -> Questions:
        def problem(row: Mapping[str, Any], where: str) -> Row:
            return {name: text_field(row, (name,), where) for name in ("task_id", "prompt", "entry_point", "test")}

        return read_questions(request.data or self.hub, problem, split="test", limit=request.limit)

    def measure(self, subject: Answerer, questions: Questions, request: EvaluationRequest, keep: Keep) -> TaskScores:
        problems = questions.rows
        completions = subject.answers(
            [problem["prompt"] for problem in problems],
            max_new_tokens=request.new_tokens or self.max_new_tokens,
            stop=STOPS,
            report=request.report,
        )

        def run(pair: tuple[Row, str]) -> Example:
            problem, completion = pair
            body = cut(completion, STOPS)
            outcome = run_program(program(problem, body), self.limits)
            return Example(problem["task_id"], float(outcome.passed), body, note=outcome.reason)

        pairs = list(zip(problems, completions, strict=True))
        with request.report.task("programs", len(pairs)) as advance:
            examples = at_once(run, pairs, os.cpu_count() or 1, advance)
        return TaskScores({"pass@1": sum(example.score == 1 for example in examples) / len(examples)}, examples)

    def settings(self, request: EvaluationRequest, tokenizer: Any) -> dict[str, str]:
        return {"prompt": "plain text", "seconds for each program": f"{self.limits.seconds:g}"}


def program(problem: Mapping[str, Any], body: str) -> str:
    """Program to run: the function, its tests, and the call that starts them."""
    return f"{problem['prompt']}{body}\n{problem['test']}\ncheck({problem['entry_point']})\n"


def cut(text: str, stops: tuple[str, ...]) -> str:
    """The text up to the first of the stops."""
    return text[: min((found for stop in stops if (found := text.find(stop)) >= 0), default=len(text))]
