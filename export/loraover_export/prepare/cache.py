"""The cache of prepared adapters: the key, a digest of everything that an adapter is made from, and its record.

A key is the name of a folder with a record, or of a remembered refusal: one that lies in the adapter, which no other
attempt would change.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from pydantic import Field

from loraover.adapters.base_weights import open_files
from loraover.adapters.convert.kind import read_method
from loraover.adapters.uniform.certificate import READ_FILES, record_source
from loraover.checkpoint.model_facts import CONFIG
from loraover.checkpoint.peft_adapter import BASE_WEIGHT
from loraover.checkpoint.tensor_file import sha256_of
from loraover.common.atomic_output import publish_file
from loraover.common.errors import CheckpointError, ConfigError, ExportError, FoldError, LoraOverError, OutputError
from loraover.common.file_lock import hold_lock
from loraover.common.provenance import environment
from loraover.common.strict_json import StrictModel, read_json
from loraover.models.load import ModelSource
from loraover.models.model_file import find_model_file

RECORD_FILE = "prepared.json"

LOCKS = "locks"
"""Folder of the cache with a lock for each key that is or was being made."""

FORM = 1
"""Number of the form of prepared adapters; another form gets other keys."""

VERSIONS = ("loraover", "torch", "transformers")
"""Packages on whose versions the written numbers may depend."""

BLOB_DIGITS = 64
"""Length of the names that the hub's cache gives to large files, which are their SHA-256."""

REMEMBERED: dict[str, type[LoraOverError]] = {kind.__name__: kind for kind in (CheckpointError, ExportError, FoldError)}
"""Errors that an adapter's files cause, by name; other errors may be temporary."""

PLACE = "{adapter}"
"""Stands for the adapter's folder in a message, since copies of one adapter lie in several folders."""

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
        """Return the prepared adapter in the folder of this record, after a call that took some seconds."""
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


class Refusal(StrictModel):
    """Why an adapter cannot be prepared."""

    error: str = Field(description="Name of the error's class")
    message: str = Field(description="The error's message, with a placeholder for the adapter's folder")


def digest_of(source: Path, base: ModelSource, options: Mapping[str, object], others: Sequence[Path]) -> str:
    """Return the key of an adapter, prepared for a base model: the digest of everything that the result depends on."""
    versions = environment()
    facts = {
        "form": FORM,
        "adapter": record_source(source).sha256,
        "base": {"name": base.name, "revision": base.revision, "files": _base_digests(source, base)},
        "options": dict(options),
        "others": {path.name: sha256_of(path) for path in others if path.is_file()},
        "versions": {name: versions.get(name) for name in VERSIONS},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _base_digests(source: Path, base: ModelSource) -> dict[str, str]:
    """Digests of the base model's configuration, and of its weights where the result depends on them."""
    reads_weights, folder, names = False, Path(base.location), [CONFIG]
    with suppress(LoraOverError):  # which preparing the adapter will say
        method, layout = read_method(source)
        reads_weights = method.reads_weights(layout.config) or any(key.endswith(BASE_WEIGHT) for key in layout.others)
    if reads_weights:
        with ExitStack() as files:
            try:
                opened = open_files(base, files, may_be_quantised=True)
            except LoraOverError as error:
                raise ConfigError(f"{source}: its conversion needs the base model's weights: {error}") from error
            folder, names = opened.folder, [CONFIG, *opened.shards]
    elif not folder.is_dir():
        found = find_model_file(base, CONFIG)  # the hub's cache holds it since the model was found
        if found is None:
            raise ConfigError(f"model: {base.origin} has no {CONFIG} in the hub's cache; download the model first.")
        folder = found.parent
    try:
        return {name: _digest(folder / name) for name in names}
    except OSError as error:
        raise ConfigError(f"model: {base.origin}: {error.filename} cannot be read: {error.strerror}.") from error


def _digest(path: Path) -> str:
    blob = path.resolve().name
    return blob if path.is_symlink() and len(blob) == BLOB_DIGITS else _hashed(path, _state(path.stat()))


@lru_cache(maxsize=256)
def _hashed(path: Path, state: tuple[int, ...]) -> str:
    return sha256_of(path)


def file_states(source: Path) -> dict[str, tuple[int, ...]]:
    """Return size, times and other marks of an adapter's files, which change with each write, by the file's name."""
    return {name: _state((source / name).stat()) for name in READ_FILES if (source / name).is_file()}


def _state(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def look_up(folder: Path, source: Path) -> Record | None:
    """Return the record of a key, or raise its refusal; None if there is neither, or a damaged one."""
    with suppress(CheckpointError):
        record = read_json(folder / RECORD_FILE, Record)
        if (folder / record.adapter).exists():
            return record
    try:
        refusal = read_json(_refused_file(folder), Refusal)
    except CheckpointError:
        return None
    raise REMEMBERED.get(refusal.error, ExportError)(refusal.message.replace(PLACE, str(source)))


def _refused_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.refused.json")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a key's folder during a block; wait for other processes that make the same adapter."""
    locks = folder.parent / LOCKS
    with ExitStack() as held:
        try:
            locks.mkdir(parents=True, exist_ok=True)
            held.enter_context(hold_lock(locks / folder.name, wait=True))
        except OSError as error:
            raise OutputError(
                f"cache {folder.parent}: cannot be written: {error.strerror or error}; choose another folder or free "
                "space."
            ) from error
        yield


@contextmanager
def remembered(folder: Path, source: Path, states: Mapping[str, tuple[int, ...]]) -> Iterator[None]:
    """Keep an error about an adapter that a block raises, unless its files have changed or it may be temporary."""
    try:
        yield
    except LoraOverError as error:
        name = next((name for name, kind in REMEMBERED.items() if isinstance(error, kind)), None)
        may_pass = isinstance(error, ConfigError) or isinstance(error.__cause__, OSError)
        if (
            (name is not None and not may_pass)
            and file_states(source) == states
            and record_source(source).sha256.keys() == states.keys()
        ):
            refusal = Refusal(error=name, message=str(error).replace(str(source), PLACE))
            text = refusal.model_dump_json(indent=1) + "\n"
            with suppress(OutputError):  # a full disk must not hide what is wrong with the adapter
                publish_file(_refused_file(folder), lambda path: path.write_text(text))
        raise
