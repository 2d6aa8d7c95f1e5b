"""Refusals that the cache remembers: those that lie in the adapter, which no other attempt would change."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from loraover.common.atomic_output import publish_file
from loraover.common.errors import CheckpointError, ConfigError, ExportError, FoldError, LoraOverError
from loraover.common.strict_json import StrictModel

REMEMBERED: dict[str, type[LoraOverError]] = {kind.__name__: kind for kind in (CheckpointError, ExportError, FoldError)}
"""Errors that say what is wrong with an adapter, by name."""

PLACE = "{adapter}"
"""Stands for the adapter's folder in a message, since copies of one adapter lie in several folders."""


class Refusal(StrictModel):
    """Why an adapter cannot be prepared."""

    error: str = Field(description="Name of the error's class")
    message: str = Field(description="The error's message, with a placeholder for the adapter's folder")

    def raised(self, source: Path) -> LoraOverError:
        """Return the error again, for a folder that holds the same adapter."""
        return REMEMBERED.get(self.error, ExportError)(self.message.replace(PLACE, str(source)))


def refusal_of(error: LoraOverError, source: Path, scratch: Path) -> LoraOverError:
    """Return an error whose message names the adapter's folder in place of folders that are gone by then.

    Args:
        error: The error.
        source: Folder of the adapter.
        scratch: Folder that intermediate results lay in.
    """
    message = str(error)
    for folder in (path for path in (scratch / "folded", scratch / "converted") if str(path) in message):
        message = message.replace(str(folder), str(source))
    return error if message == str(error) else type(error)(message)


def remember(error: LoraOverError, source: Path, place: Path) -> None:
    """Write down a refusal, unless the error may not come again, such as a file that the system could not read.

    Args:
        error: The error.
        source: Folder of the adapter.
        place: File of the refusal.
    """
    name = next((name for name, kind in REMEMBERED.items() if isinstance(error, kind)), None)
    if name is None or isinstance(error, ConfigError) or isinstance(error.__cause__, OSError):
        return
    refusal = Refusal(error=name, message=str(error).replace(str(source), PLACE))
    publish_file(place, lambda path: path.write_text(refusal.model_dump_json(indent=1) + "\n"))
