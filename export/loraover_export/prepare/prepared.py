"""Contents of `prepared.json`, and the result of preparing an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from loraover.common.strict_json import StrictModel

RECORD_FILE = "prepared.json"

Done = Literal["taken", "rewritten", "converted", "approximated"]
"""Ways of preparing: the matrices were copied, written in another form, converted exactly from another kind, or
approximated by a smaller rank."""


@dataclass(frozen=True)
class PreparedAdapter:
    """An adapter that an engine can load.

    Args:
        path: Folder or file to load, in the cache.
        digest: SHA-256 of all that it was made from, in hexadecimal digits; also the name of its folder in the cache.
        rank: Rank of every module.
        done: What was done to the adapter.
        notes: What else was done, in sentences, such as a prefix that was mended.
        certificate: File with the errors of what was written; that of the conversion if there was one.
        seconds: Time that this call took.
        cached: Whether the cache held it already.
    """

    path: Path
    digest: str
    rank: int
    done: Done
    notes: tuple[str, ...]
    certificate: Path
    seconds: float
    cached: bool


class Record(StrictModel):
    """The contents of `prepared.json`, beside a prepared adapter."""

    schema_version: Literal[1] = 1
    digest: str = Field(description="SHA-256 of all that the adapter was made from")
    engine: str = Field(description="Engine that the adapter was prepared for")
    adapter: str = Field(description="Name of the folder or file to load, beside this file")
    rank: int = Field(description="Rank of every module")
    done: Done = Field(description="What was done to the adapter")
    notes: tuple[str, ...] = Field(description="What else was done, in sentences")
    certificate: str = Field(description="Path of the certificate, below the folder of this file")
    error: float = Field(
        description="Largest bound of the relative error of a module's delta_W by a conversion, else of a matrix"
    )
    seconds: float = Field(description="Time that preparing the adapter took")

    def opened(self, folder: Path, seconds: float, *, cached: bool) -> PreparedAdapter:
        """Return the prepared adapter.

        Args:
            folder: Folder that holds this record.
            seconds: Time that the present call took.
            cached: Whether the cache held it already.
        """
        return PreparedAdapter(
            path=folder / self.adapter,
            digest=self.digest,
            rank=self.rank,
            done=self.done,
            notes=self.notes,
            certificate=folder / self.certificate,
            seconds=seconds,
            cached=cached,
        )
