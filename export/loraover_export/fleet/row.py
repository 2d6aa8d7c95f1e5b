"""Outcome for each adapter, and for all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from pydantic import Field

from loraover.common.strict_json import StrictModel

Verdict = Literal["right", "prepared", "right as exported", "right on some", "refused", "failed"]
"""The best first."""
Form = Literal["as it is", "as exported", "in no form"]
SERVED: tuple[Verdict, ...] = ("right", "prepared", "right as exported", "right on some")


class FleetRow(StrictModel):
    """Adapter of a fleet."""

    source: str = Field(description="The adapter, as it was named, without secrets")
    address: str = Field(description="Text that names the same files again, such as a hub name with its commit")
    verdict: Verdict = Field(
        description="Right: every engine is right on the adapter as it is; right as exported: some are so only on what "
        "the export writes; right on some: some are right on no form; refused: it lies in the adapter; failed: it "
        "could not be examined, and may be another time"
    )
    kind: str | None = Field(None, description="PEFT's name of the method")
    rank: int | None = Field(None, description="Largest rank of a module, of what was prepared if anything was")
    error: float | None = Field(None, description="Bound of the relative error of what was prepared")
    done: str = Field("", description="What was done, or what mends the adapter, in words")
    reason: str = Field("", description="Why the verdict is not better, a line for each reason")
    engines: Mapping[str, str] = Field(
        default_factory=dict, description="Verdict of a check for each engine, on the adapter as it is"
    )
    exported: Mapping[str, str] = Field(default_factory=dict, description="The same on what the export for it writes")
    path: str | None = Field(None, description="What the engine loads, in the cache")
    cached: bool = Field(False, description="Whether the cache held it already")
    seconds: float = Field(0.0, description="Time that this adapter took")

    def served(self, engine: str) -> Form:
        """Return in which form an engine that was judged is right on the adapter."""
        if self.engines[engine] == "right":
            return "as it is"
        return "as exported" if self.exported.get(engine) == "right" else "in no form"

    @property
    def told(self) -> str:
        """Work that was done, in words."""
        return "; ".join(text for text in (self.done, "from the cache" if self.cached else "") if text)


class FleetReport(StrictModel):
    """All adapters."""

    schema_version: Literal[1] = 1
    rows: Sequence[FleetRow] = Field(description="The adapters, in the order in which they were named")
    seconds: float = Field(description="Time that all took")

    @property
    def passed(self) -> bool:
        """Whether every adapter can be served, as it is or as exported."""
        return all(row.verdict in SERVED for row in self.rows)

    @property
    def verdict(self) -> Verdict:
        """The worst verdict of an adapter."""
        return max((row.verdict for row in self.rows), key=get_args(Verdict).index)

    @property
    def exit_code(self) -> int:
        """Exit code of the command: 0 if every adapter can be served, else 1."""
        return 0 if self.passed else 1

    @property
    def engines(self) -> list[str]:
        """Engines that were judged."""
        return list(dict.fromkeys(engine for row in self.rows for engine in row.engines))

    def counts(self) -> str:
        """Return the number of adapters with each verdict, in words."""
        return ", ".join(f"{number} {verdict}" for verdict, number in Counter(row.verdict for row in self.rows).items())
