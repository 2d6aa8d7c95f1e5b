"""The verdict on a logit error: the rule that every comparison of logits has."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field

from loraover.checkpoint.carried_files import KEPT_FILE
from loraover.checkpoint.files import REFERENCE_FILE
from loraover.checkpoint.tensor_file import sha256_of
from loraover.common.atomic_output import AbandonedError
from loraover.common.paths import list_folder
from loraover.common.strict_json import StrictModel

NOISE_FACTOR = 3.0
POWER = 2.0
"""Multiple of the allowed error by which an adapter must change some logit, so that its loss would be noticed."""

CheckVerdict = Literal["passed", "failed", "inconclusive"]
ExportVerdict = Literal["passed", "failed", "inconclusive", "not checked"]
EXIT_CODES = {"passed": 0, "not checked": 0, "failed": 1, "inconclusive": 3}
"""Exit code of the command of each verdict."""


class Proof(StrictModel):
    """Verdict on an output, and what it rests on."""

    schema_version: int = 1
    verdict: str

    @property
    def passed(self) -> bool:
        """Whether the verdict is "passed"."""
        return self.verdict == "passed"

    @property
    def exit_code(self) -> int:
        """Exit code of the command."""
        return EXIT_CODES[self.verdict]


class Certificate(Proof):
    """A proof that lies beside the output, whose files it names."""

    output: dict[str, str] = Field(
        default={}, description="SHA-256 of each file that lay beside the certificate when it was written, by its path"
    )

    def keep(self, file: Path) -> Self:
        """Write the certificate beside the output, and return it with the digests of the output's files.

        It names no reference, which may be recorded again.

        Raises:
            AbandonedError: The verdict is "failed".
        """
        if self.verdict == "failed":
            raise AbandonedError
        found = list_folder(file.parent).files.items()
        output = {name: sha256_of(path) for name, path in found if not name.endswith((REFERENCE_FILE, KEPT_FILE))}
        kept = self.model_copy(update={"output": output})
        file.write_text(kept.model_dump_json(indent=1) + "\n")
        return kept


def verdict_on(error: float, bound: float, adapter_effect: float) -> CheckVerdict:
    """Return the verdict on a logit error.

    It is inconclusive where the error is within its bound, but an adapter that does nothing could be within it as
    well: where the adapter changes no logit, or none by POWER times the bound.

    Args:
        error: Largest logit error; NaN fails.
        bound: Largest allowed error.
        adapter_effect: Largest change of a logit that the adapter makes to the base model; NaN proves nothing.
    """
    if not error <= bound:
        return "failed"
    return "passed" if adapter_effect > 0 and adapter_effect >= POWER * bound else "inconclusive"
