"""The key of a prepared adapter: the SHA-256 of all that it is made from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path

from loraover.adapters.base_files import open_base
from loraover.adapters.convert.kind import read_method
from loraover.adapters.uniform.certificate import READ_FILES, record_source
from loraover.checkpoint.model_facts import CONFIG
from loraover.checkpoint.peft_adapter import BASE_WEIGHT
from loraover.checkpoint.tensor_file import sha256_of
from loraover.common.errors import ConfigError, LoraOverError
from loraover.common.provenance import environment
from loraover.models.load import ModelSource

FORM = 1
"""Number of the form of prepared adapters; another form gets other keys."""

VERSIONS = ("loraover", "torch", "transformers")
"""Packages on whose versions the written numbers may depend."""

BLOB_DIGITS = 64
"""Length of the names that the hub's cache gives to large files, which are their SHA-256."""


def digest_of(source: Path, base: ModelSource, options: Mapping[str, object], others: Sequence[Path]) -> str:
    """Return the key of an adapter, prepared for a base model with some options.

    Args:
        source: Folder of the adapter.
        base: The base model.
        options: All options that the result depends on, by name.
        others: Other files that the result depends on.

    Raises:
        CheckpointError: Files of the adapter that cannot be read.
        ConfigError: Files of the base model that cannot be read.
    """
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


def file_states(source: Path) -> dict[str, tuple[int, ...]]:
    """Return what changes when one of an adapter's files is written or replaced, by the file's name."""
    return {name: _state((source / name).stat()) for name in READ_FILES if (source / name).is_file()}


def _base_digests(source: Path, base: ModelSource) -> dict[str, str]:
    with ExitStack() as files:
        try:
            opened = open_base(base, files, may_be_quantised=True) if _reads_weights(source) else None
        except LoraOverError as error:
            raise ConfigError(f"{source}: its conversion needs the base model's weights: {error}") from error
        names = [CONFIG] if opened is None else [CONFIG, *opened.shards]
        folder = _config_folder(base) if opened is None else opened.folder
    try:
        return {name: _digest(folder / name) for name in names}
    except OSError as error:
        raise ConfigError(f"model: {base.origin}: {error.filename} cannot be read: {error.strerror}.") from error


def _reads_weights(source: Path) -> bool:
    """Whether what is made of the adapter depends on the base model's weights."""
    try:
        method, layout = read_method(source)
    except LoraOverError:  # which preparing it will say
        return False
    return method.reads_weights(layout.config) or any(key.endswith(BASE_WEIGHT) for key in layout.others)


def _config_folder(base: ModelSource) -> Path:
    """Return the folder of the base model's configuration, which the hub's cache holds since the model was found."""
    if Path(base.location).is_dir():
        return Path(base.location)
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(base.location, CONFIG, revision=base.revision)
    if not isinstance(found, str):
        raise ConfigError(f"model: {base.origin} has no {CONFIG} in the hub's cache; download the model first.")
    return Path(found).parent


def _digest(path: Path) -> str:
    blob = path.resolve().name
    if path.is_symlink() and len(blob) == BLOB_DIGITS:
        return blob
    return _hashed(path, _state(path.stat()))


@lru_cache(maxsize=256)
def _hashed(path: Path, state: tuple[int, ...]) -> str:
    return sha256_of(path)


def _state(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
