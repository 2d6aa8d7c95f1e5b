"""Sealed references: whether one that is revealed at an audit is the one of which the SHA-256 was published."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from loraover.checkpoint.files import REFERENCE_FILE
from loraover.common.errors import CheckpointError
from loraover_serve.verify.request import VerifyRequest

SEALED = "sealed"
"""Name of the digest in a published reference."""


def check_seals(request: VerifyRequest) -> None:
    """Check each reference that a published one seals: the one that is named, or one that lies beside it."""
    for place in request.references:
        published = request.published
        if published is None:
            published = _beside(place)
        if published is not None:
            check_seal(place, published)
            request.report.line(f"{place} is the sealed reference that {published} names")


def _beside(place: Path) -> Path | None:
    """The published reference in the folder of a file that is none itself, if it seals another of this adapter."""
    beside = place.parent / REFERENCE_FILE
    if place.is_dir() or place.name.endswith(REFERENCE_FILE) or not beside.is_file():
        return None
    mine, digests = _digests(place), _digests(beside)
    return beside if SEALED in digests and digests["adapter"] == mine["adapter"] else None


def check_seal(sealed: Path, published: Path) -> None:
    """Check that a published reference names the SHA-256 of a sealed one."""
    named = _digests(published).get(SEALED)
    if named is None:
        raise CheckpointError(f"{published}: names no sealed reference, so nothing shows when {sealed} was made.")
    try:
        found = hashlib.sha256(sealed.read_bytes()).hexdigest()
    except OSError as error:
        raise CheckpointError(f"{sealed}: cannot be read: {error.strerror}.") from error
    if found != named:
        raise CheckpointError(
            f"{sealed}: its SHA-256 is {found}, and {published} names {named}; it was changed, or seals another "
            "adapter. Ask for the file that was published."
        )


def _digests(path: Path) -> Mapping[str, str]:
    from loraover.checkpoint.carried_files import reference_digests  # with all that reads adapters

    return reference_digests(path)
