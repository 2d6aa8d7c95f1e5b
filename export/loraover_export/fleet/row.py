"""What became of each adapter, and of all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field

from loraover.common.strict_json import StrictModel

Verdict = Literal["right", "prepared", "refused", "failed"]
GOOD: tuple[Verdict, ...] = ("right", "prepared")


class FleetRow(StrictModel):
    """One adapter."""

    source: str = Field(description="The adapter, as it was named, without secrets")
    address: str = Field(description="Text that names the same files again, such as a hub name with its commit")
    verdict: Verdict = Field(
        description="Refused: it lies in the adapter; failed: it could not be examined, and may be another time"
    )
    kind: str | None = Field(None, description="PEFT's name of the method")
    rank: int | None = Field(None, description="Largest rank of a module, of what was prepared if anything was")
    error: float | None = Field(None, description="Bound of the relative error of what was prepared")
    done: str = Field("", description="What was done, or what mends the adapter, in words")
    reason: str = Field("", description="Why the verdict is not better")
    engines: Mapping[str, str] = Field(default_factory=dict, description="Verdict of a check for each engine")
    path: str | None = Field(None, description="What the engine loads, in the cache")
    cached: bool = Field(False, description="Whether the cache held it already")
    seconds: float = Field(0.0, description="Time that this adapter took")


class FleetReport(StrictModel):
    """All adapters."""

    schema_version: Literal[1] = 1
    rows: Sequence[FleetRow] = Field(description="The adapters, in the order in which they were named")
    seconds: float = Field(description="Time that all took")

    @property
    def passed(self) -> bool:
        """Whether every adapter is right or prepared."""
        return all(row.verdict in GOOD for row in self.rows)

    @property
    def exit_code(self) -> int:
        """Exit code of the command: 0 if every adapter is right or prepared, else 1."""
        return 0 if self.passed else 1

    def counts(self) -> str:
        """Return the number of adapters with each verdict, in words."""
        return ", ".join(f"{number} {verdict}" for verdict, number in Counter(row.verdict for row in self.rows).items())
