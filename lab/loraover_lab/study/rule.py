"""The rule by which a study calls LoRA-Over better, written down before its first run: `rule.json`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from loraover.common.atomic_output import publish_file
from loraover.common.errors import ConfigError
from loraover.common.strict_json import StrictModel, read_json
from loraover_lab.study.request import StudyRequest

RULE_FILE = "rule.json"


class Rule(StrictModel):
    """On how many tasks LoRA-Over has to be better, and when that was decided."""

    schema_version: Literal[1] = 1
    required: int = Field(description="Number of tasks on which the loss has to be below a tuned plain LoRA's.")
    tasks: int = Field(description="Number of tasks of the study.")
    finished_before: int = Field(
        description="Number of the study's runs that had finished when the rule was written down, reused ones included."
    )

    @property
    def was_first(self) -> bool:
        """Whether the rule was written down before the first run had finished."""
        return self.finished_before == 0

    def __str__(self) -> str:
        runs = "the first run" if self.finished_before == 1 else f"{self.finished_before} of the runs"
        when = "fixed before the first run" if self.was_first else f"written down after {runs} had finished"
        return (
            f"LoRA-Over counts as better if its loss is below a tuned plain LoRA's on at least {self.required} of "
            f"{self.tasks} task{'' if self.tasks == 1 else 's'}; this rule was {when}."
        )


def fixed_rule(request: StudyRequest, finished: int) -> Rule:
    """Return the rule of a study, and write it down if the study is to train and its folder has none.

    Args:
        request: What the study is asked for.
        finished: Number of its runs that have finished.

    Raises:
        ConfigError: The study was begun with another rule.
        OutputError: The file cannot be written.
    """
    file, tasks = request.output / RULE_FILE, len(request.tasks)
    if not file.is_file():
        rule = Rule(required=request.required or tasks, tasks=tasks, finished_before=finished)
        if not request.report_only:
            publish_file(file, lambda draft: draft.write_text(rule.model_dump_json(indent=1) + "\n"), parents=True)
        return rule
    rule = read_json(file, Rule)
    asked = (rule.required if request.required is None else request.required, tasks)
    if asked != (rule.required, rule.tasks):
        required = StudyRequest.named("required")
        raise ConfigError(
            f"{file}: the study was begun with {required} {rule.required} of {rule.tasks} tasks, found {asked[0]} of "
            f"{asked[1]}. A rule that is changed after runs have been read proves nothing; begin a new study."
        )
    return rule
