"""The report of `check_adapter`: for each engine, a verdict on the adapter as it is and as exported."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import Field

from loraover.adapters.logits.judge import Proof
from loraover.common.strict_json import StrictModel

Level = Literal["refused", "wrong silently", "note"]
Verdict = Literal["right", "refused", "wrong silently"]


class Finding(StrictModel):
    """Fact about an adapter on an engine."""

    feature: str = Field(description="Property of the adapter, or name of the rule")
    level: Level = Field(description="What the engine does; a note does not change the verdict")
    found: str = Field(description="What was found, and what the engine does with it, in words")


class Judgement(StrictModel):
    """Treatment of one form of an adapter by an engine."""

    verdict: Verdict = Field(description="The worst of the findings; a refusal outweighs a silent error")
    findings: tuple[Finding, ...] = Field(description="The facts that the verdict rests on")


class EngineCheck(StrictModel):
    """Engine with both forms of the adapter, and the command that writes the second."""

    engine: str = Field(description="Name that --engine takes")
    reader: str = Field(description="Program that reads the adapter, with the release whose sources were read")
    as_it_is: Judgement = Field(description="The adapter's folder, in PEFT's form")
    exported: Judgement = Field(description="What the export command writes of the adapter")
    converted: Judgement | None = Field(
        description="What the export command writes of the adapter's conversion; None if the export needs none, or if "
        "there is no exact one"
    )
    conversion: str | None = Field(description="Command that converts the adapter; None where `converted` is None")
    export: str = Field(description="Command that writes the exported form, of the conversion where there is one")

    @property
    def by_us(self) -> Judgement:
        """The adapter as exported by us: after a conversion where the export needs one."""
        return self.exported if self.converted is None else self.converted

    @property
    def commands(self) -> str:
        """Command line that writes the form of `by_us`."""
        return self.export if self.conversion is None else f"{self.conversion} && {self.export}"

    @property
    def is_served(self) -> bool:
        """Whether the engine is right on the adapter as exported by us, or as it is."""
        return "right" in (self.by_us.verdict, self.as_it_is.verdict)

    @property
    def is_mended(self) -> bool:
        """Whether the export mends what is wrong with the adapter as it is."""
        return self.as_it_is.verdict != "right" and self.by_us.verdict == "right"


class CheckReport(Proof):
    """Result of judging an adapter for several engines without running any."""

    schema_version: int = 2
    verdict: Literal["passed", "failed"] = Field(
        description="Failed: an engine that was asked for is right on no form of the adapter; without a choice, every "
        "engine is"
    )
    adapter: str = Field(description="Folder of the adapter")
    peft_type: str = Field(description="PEFT's name of the method")
    base_model: str = Field(description="Folder or hub name of the base model")
    architecture: str = Field(description="Model class that the base model's configuration names")
    modules: int = Field(description="Number of adapted modules")
    ranks: tuple[int, ...] = Field(description="Ranks of the modules, each once")
    engines: tuple[EngineCheck, ...]


def judge(findings: Iterable[Finding]) -> Judgement:
    """Return findings with the verdict that follows from them.

    Args:
        findings: What an engine does with an adapter.
    """
    found = tuple(findings)
    worst: tuple[Verdict, ...] = ("refused", "wrong silently")
    levels = {finding.level for finding in found}
    return Judgement(verdict=next((level for level in worst if level in levels), "right"), findings=found)
