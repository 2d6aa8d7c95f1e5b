"""The pre-flight report: everything that vLLM refuses in an adapter, and what it would serve wrongly in silence."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from loraover_export.vllm.candidate import Candidate, Problem
from loraover_export.vllm.launch import max_lora_rank
from loraover_export.vllm.rules import RULES

PREFLIGHT_FILE = "preflight.json"


class Finding(BaseModel):
    """One violated rule."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rule: str
    level: Literal["error", "warning"]
    found: str
    remedy: str


class Preflight(BaseModel):
    """Contents of `preflight.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = 1
    verdict: Literal["passed", "failed"]
    vllm_version: str = Field(description="whose rules were applied")
    served_model: str
    architecture: str
    modules: int = Field(description="adapted")
    rank: int
    max_lora_rank: int | None
    rules: dict[str, Literal["passed", "warning", "error"]]
    findings: list[Finding]

    @property
    def passed(self) -> bool:
        return self.verdict == "passed"


def preflight(candidate: Candidate) -> Preflight:
    """Apply every rule of `RULES`."""
    findings = [_finding(rule, problem) for rule, check in RULES.items() for problem in check(candidate)]
    failed = any(finding.level == "error" for finding in findings)
    return Preflight(
        verdict="failed" if failed else "passed",
        vllm_version=candidate.architectures.version,
        served_model=candidate.served.source.name,
        architecture=candidate.served.architecture,
        modules=len(candidate.modules),
        rank=candidate.rank,
        max_lora_rank=max_lora_rank(candidate.rank),
        rules={rule: _outcome([finding.level for finding in findings if finding.rule == rule]) for rule in RULES},
        findings=findings,
    )


def _finding(rule: str, problem: Problem) -> Finding:
    return Finding(
        rule=rule, level="warning" if problem.is_warning else "error", found=problem.found, remedy=problem.remedy
    )


def _outcome(levels: list[Literal["error", "warning"]]) -> Literal["passed", "warning", "error"]:
    return "error" if "error" in levels else "warning" if levels else "passed"
