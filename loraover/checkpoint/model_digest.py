"""Digest by which an evaluation recognises a base model that it has asked already."""

from __future__ import annotations

import hashlib
from pathlib import Path

from loraover.checkpoint.tensor_file import sha256_of
from loraover.common.errors import ConfigError
from loraover.models.load import ModelSource

WEIGHTS = ".safetensors"
TEXTS = (".json", ".jinja", ".model", ".txt")  # configuration, chat template, tokenizer


def model_digest(source: ModelSource, *, weights: bool) -> str:
    """Commit of a base model on the hub, or SHA-256 over the names and the SHA-256 of the files in its folder.

    Only files of which answers depend are read: the configurations, the tokenizer, the chat template and the weights.

    Args:
        source: The base model.
        weights: Whether the weights are read, which takes seconds; a model on a server has other files.

    Raises:
        ConfigError: A file of the folder cannot be read.
    """
    if source.revision is not None:
        return source.revision
    digest, endings = hashlib.sha256(), (*TEXTS, WEIGHTS) if weights else TEXTS
    try:
        for path in sorted(Path(source.location).iterdir()):
            if path.suffix in endings and path.is_file():
                digest.update(f"{path.name} {sha256_of(path)}\n".encode())
    except OSError as error:
        raise ConfigError(f"model: {source.origin} cannot be read: {error}.") from error
    return digest.hexdigest()
