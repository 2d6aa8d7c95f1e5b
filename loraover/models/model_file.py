"""Files beside a model's weights, and what they say that its configuration does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from loraover.common.errors import ConfigError

if TYPE_CHECKING:
    from loraover.models.load import ModelSource

MODULES_FILE = "modules.json"
"""File in which sentence-transformers lists the parts of a model that it saved."""


def find_model_file(source: ModelSource, name: str) -> Path | None:
    """Return a file of a model that is on this machine; None if it is not, or the model has none."""
    folder = Path(source.location)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source.location, name, revision=source.revision)
    return Path(found) if isinstance(found, str) else None


def embeds_texts(source: ModelSource) -> bool:
    """Whether sentence-transformers saved a model with a pooling layer: it embeds texts, even if it could generate.

    Source: get_pooling_config in vllm/transformers_utils/config.py of vLLM 0.32, which serves such a model so.

    Raises:
        ConfigError: Its modules.json cannot be read.
    """
    file = find_model_file(source, MODULES_FILE)
    try:
        parts = [] if file is None else json.loads(file.read_bytes())
        return any(str(part["type"]).endswith(".Pooling") for part in parts)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"model: {source.origin} has no usable {MODULES_FILE}: {error}; save it again.") from error
