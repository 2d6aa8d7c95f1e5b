"""Digests of the rows that a run uses, by which data that have changed are told: `data.json`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from loraover.common.atomic_output import publish_text
from loraover.common.errors import DataError
from loraover.common.strict_json import StrictModel, read_json
from loraover.data.formats import Row
from loraover.data.pictures import as_json
from loraover.training.rows.data import Examples

DATA_FILE = "data.json"


class RowDigests(StrictModel):
    """Contents of `data.json`: SHA-256 of rows with prompt and completion, as they are read."""

    train: str = Field(description="SHA-256 of the training rows.")
    test: str | None = Field(description="SHA-256 of the held-out rows; None: there are none.")
    chat_template: str | None = Field(
        None, description="SHA-256 of the recipe's own chat template; None: it takes the model's."
    )


def digest_rows(rows: Sequence[Row]) -> str:
    """Return the SHA-256 of rows, one line of JSON each, in which the SHA-256 of an image stands for it."""
    total = hashlib.sha256()
    for row in rows:
        total.update(as_json(row).encode() + b"\n")
    return total.hexdigest()


def keep_digests(output: Path, examples: Examples, template: str | None) -> None:
    """Write the digests of a run's rows into its folder, or compare them where the run is resumed.

    Args:
        output: The run's folder.
        examples: Rows of the run.
        template: Chat template of the recipe; None: it takes the model's.

    Raises:
        DataError: The run was begun with other rows, or with another template.
        CheckpointError: The digests in the folder cannot be read.
    """
    test = None if examples.test is None else digest_rows(examples.test.rows)
    own = None if template is None else hashlib.sha256(template.encode()).hexdigest()
    found = RowDigests(train=digest_rows(examples.train.rows), test=test, chat_template=own)
    begun = read_digests(output)
    if begun is None:
        publish_text(output / DATA_FILE, found.model_dump_json(indent=1) + "\n")
    elif begun.chat_template != found.chat_template:
        raise DataError(
            f"{output}: the run was begun with another text in the file that training.chat_template_path names; put "
            "the earlier text back, or start a new run."
        )
    elif begun != found:
        kind, rows = ("held-out", examples.test) if begun.train == found.train else ("training", examples.train)
        origin = "" if rows is None else f" ({rows.origin})"
        raise DataError(
            f"{output}: the run was begun with other {kind} rows than the data hold now{origin}; put the earlier data "
            "back, or start a new run."
        )


def read_digests(folder: Path) -> RowDigests | None:
    """Read the digests of a run's rows; None if they were not kept.

    Args:
        folder: The run's folder.

    Raises:
        CheckpointError: The file cannot be read.
    """
    path = folder / DATA_FILE
    return read_json(path, RowDigests) if path.is_file() else None
