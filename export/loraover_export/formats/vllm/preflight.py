"""The pre-flight report: what vLLM would refuse in an adapter, and what it would serve wrongly without a message."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from loraover.adapters.uniform.request_fields import max_lora_rank
from loraover.adapters.verdict import Certificate
from loraover.common.strict_json import StrictModel
from loraover_export.formats.vllm.candidate import Candidate
from loraover_export.formats.vllm.rules import RULES

PREFLIGHT_FILE = "preflight.json"


class Violation(StrictModel):
    """Violated rule."""

    rule: str = Field(description="Name of the rule")
    level: Literal["error", "warning"] = Field(description="An error keeps the adapter from being written")
    found: str = Field(description="The violation, in words")
    remedy: str = Field(description="Next step for the user")


class Preflight(Certificate):
    """Result of checking an adapter against vLLM's rules, and the contents of `preflight.json`."""

    verdict: Literal["passed", "failed"] = Field(description="Passed: no rule found an error; warnings are allowed")
    vllm_version: str = Field(description="Release of vLLM whose rules were applied")
    served_model: str = Field(description="Folder or hub name of the model to be served")
    architecture: str = Field(description="Model class that the served model's configuration names")
    modules: int = Field(description="Number of adapted modules")
    rank: int = Field(description="Largest rank of a module")
    max_lora_rank: int | None = Field(description="Value for vLLM's --max-lora-rank; None if the rank is too large")
    rules: dict[str, Literal["passed", "warning", "error"]] = Field(description="Outcome of each rule, by its name")
    findings: list[Violation] = Field(description="Violated rules")


def preflight(candidate: Candidate) -> Preflight:
    """Apply every rule of `RULES` to an adapter."""
    findings = [
        Violation(
            rule=rule, level="warning" if problem.is_warning else "error", found=problem.found, remedy=problem.remedy
        )
        for rule, check in RULES.items()
        for problem in check(candidate)
    ]
    rules = dict.fromkeys(RULES, "passed") | {finding.rule: finding.level for finding in findings}
    rules |= {finding.rule: "error" for finding in findings if finding.level == "error"}
    return Preflight(
        verdict="failed" if "error" in rules.values() else "passed",
        vllm_version=candidate.architectures.version,
        served_model=candidate.served.source.name,
        architecture=candidate.served.architecture,
        modules=len(candidate.modules),
        rank=candidate.adapter.rank,
        max_lora_rank=max_lora_rank(candidate.adapter.rank),
        rules=rules,
        findings=findings,
    )
