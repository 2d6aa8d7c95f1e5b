"""Files that travel with an adapter: its chat template, which may be another than its base model's, and its reference.

A reference names the digest of the adapter that it was recorded of, in docs/formats.md. An export writes the same
adapter in other files. It keeps the reference, and writes beside it the digests of these files:

    DIR/adapter_reference.json.gz      the reference, unchanged
    DIR/adapter_reference.kept.json    of which files of an export it is the reference too

Where a folder may hold several adapters, such as GGUF files, both names begin with the adapter's: NAME.adapter_...
"""

from __future__ import annotations

import copy
import gzip
import hashlib
import io
import json
import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from loraover.checkpoint.adapter_config import AdapterConfig
from loraover.checkpoint.files import CONFIG_FILE, REFERENCE_FILE, TEMPLATE_FILE, TENSORS_FILE
from loraover.checkpoint.tensor_file import sha256_of
from loraover.common.atomic_output import publish_file, publish_text
from loraover.common.errors import CheckpointError
from loraover.common.later import later_step
from loraover.common.strict_json import MAX_JSON_BYTES, StrictModel, read_json

KEPT_FILE = "adapter_reference.kept.json"
ADAPTER_FILES = (CONFIG_FILE, TENSORS_FILE)


class KeptReference(StrictModel):
    """Reason why a reference belongs to an exported adapter: the contents of `adapter_reference.kept.json`."""

    schema_version: Literal[1] = 1
    reference: str = Field(description="SHA-256 of the reference, in hexadecimal digits")
    adapter: str = Field(description="Digest of the adapter that was recorded, as the reference names it")
    files: dict[str, str] = Field(description="SHA-256 of each file that the export wrote of this adapter, by its path")


def adapter_digest(adapter: Path) -> str:
    """SHA-256 of an adapter's configuration and tensors."""
    read_json(adapter / CONFIG_FILE, AdapterConfig)
    digest = hashlib.sha256()
    try:
        for name in ADAPTER_FILES:
            digest.update(bytes.fromhex(sha256_of(adapter / name)))
    except OSError as error:
        raise CheckpointError(f"{adapter / name}: cannot be read: {error.strerror}.") from error
    return digest.hexdigest()


def reference_digests(reference: Path) -> dict[str, Any]:
    """Return the digests that a reference names: of the adapter that was recorded, of its base model, and others."""
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(reference.read_bytes())) as file:
            raw = file.read(MAX_JSON_BYTES + 1)
        found = json.loads(raw)["digests"]
        if len(raw) > MAX_JSON_BYTES or not isinstance(found["adapter"], str):
            raise ValueError("not the digests of a reference")
    except (OSError, EOFError, zlib.error, RecursionError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{reference}: not a reference that can be read: {error!s:.200}.") from error
    return dict(found)


def misfit(reference: Path) -> str | None:
    """Say why a reference does not belong to the adapter beside it; None if it does.

    It does if it names the digest of this adapter, or if an export kept it and the files are still those of the export.
    """
    try:
        recorded = reference_digests(reference)["adapter"]
        if _is_kept(reference, recorded):
            return None
        found = adapter_digest(reference.parent)
    except CheckpointError as error:
        return str(error)
    except OSError as error:  # of a file that an export has named
        return f"{_kept_beside(reference)} names a file that cannot be read: {error.strerror}"
    if found == recorded:
        return None
    return f"{reference} is a recording of an adapter with the digest {recorded:.12}, and this one has {found:.12}"


def covered_files(reference: Path) -> list[str]:
    """Return the paths of the files that `misfit` compares with a reference that fits."""
    if not _is_kept(reference, reference_digests(reference)["adapter"]):
        return list(ADAPTER_FILES)
    return [*read_json(_kept_beside(reference), KeptReference).files, _kept_beside(reference).name]


def _is_kept(reference: Path, recorded: str) -> bool:
    folder, file = reference.parent, _kept_beside(reference)
    if not file.is_file():
        return False
    kept = read_json(file, KeptReference)
    return (
        (kept.reference, kept.adapter) == (sha256_of(reference), recorded)
        and bool(kept.files)
        and all((folder / name).is_file() and sha256_of(folder / name) == sum_ for name, sum_ in kept.files.items())
    )


def _kept_beside(reference: Path) -> Path:
    return reference.with_name(reference.name.removesuffix(REFERENCE_FILE) + KEPT_FILE)


def keep_reference(
    source: Path,
    written: Path,
    say: Callable[[str], None],
    files: Sequence[str] = ADAPTER_FILES,
    *,
    stem: str | None = None,
) -> None:
    """Copy the reference of an adapter into the folder of its export, in place of one that lies there.

    A reference of another adapter is left out, and `say` gets the reason.

    Args:
        source: Folder of the adapter, which may hold no reference.
        written: Folder of the export.
        say: Receiver of the reason.
        files: Paths of the adapter's files in this folder.
        stem: Beginning of the files' names, where the folder may hold several adapters.

    Raises:
        OutputError: A file that cannot be written.
    """
    reference = source / REFERENCE_FILE
    place = written / (REFERENCE_FILE if stem is None else f"{stem}.{REFERENCE_FILE}")
    for stale in (place, _kept_beside(place)):
        stale.unlink(missing_ok=True)
    if not reference.is_file():
        return
    reason = misfit(reference)
    if reason is not None:
        say(f"the reference is left out: {reason}; record it again with `loraover record`")
        return
    publish_file(place, lambda draft: shutil.copyfile(reference, draft))
    _name_files(place, files)


def record_for_export(source: Path, written: Path, files: Sequence[str], *, stem: str, **options: Any) -> None:
    """Record the reference of an adapter for the files of its export, in place of one that was kept there.

    Args:
        source: Folder of the adapter.
        written: Folder of the export.
        files: Paths of the adapter's files in this folder.
        stem: Beginning of the reference's name.
        **options: Further arguments of `record_adapter`, such as the weights of the base model that a server has.
    """
    place = written / f"{stem}.{REFERENCE_FILE}"
    later_step("record")(source, output=place, force=True, **options)
    _name_files(place, files)


def _name_files(reference: Path, files: Sequence[str]) -> None:
    """Write beside the reference of an export the digests of the files that it holds for, which lie in its folder."""
    kept = KeptReference(
        reference=sha256_of(reference),
        adapter=reference_digests(reference)["adapter"],
        files={name: sha256_of(reference.parent / name) for name in files},
    )
    publish_text(_kept_beside(reference), kept.model_dump_json(indent=1) + "\n")


def record_beside(adapter: Path, **options: Any) -> None:
    """Record the reference of an adapter beside it as `record_adapter` does, in place of one that is there."""
    later_step("record")(adapter, force=True, **options)
    (adapter / KEPT_FILE).unlink(missing_ok=True)


def keep_chat_template(adapter: Path, written: Path, *, stem: str | None = None) -> None:
    """Copy the chat template of an adapter, if it has one, into the folder of its export.

    The file's name begins with `stem` where the folder may hold several adapters; an earlier one is replaced.
    """
    template, place = adapter / TEMPLATE_FILE, written / TEMPLATE_FILE
    if stem is not None:
        place = written / f"{stem}.{TEMPLATE_FILE}"
        place.unlink(missing_ok=True)
    if template.is_file():
        publish_file(place, lambda draft: shutil.copyfile(template, draft))


def tokenizer_of(adapter: Path, tokenizer: Any) -> Any:
    """Return a base model's tokenizer; if an adapter has another chat template, a copy with that one."""
    path, known = adapter / TEMPLATE_FILE, tokenizer.chat_template
    try:
        template = path.read_text(encoding="utf-8") if path.is_file() else None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if template is None or template in (known.values() if isinstance(known, dict) else [known]):
        return tokenizer
    own = copy.copy(tokenizer)
    own.chat_template = template
    return own
