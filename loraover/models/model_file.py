"""Files beside a model's weights, and what they say that its configuration does not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from loraover.common.errors import ConfigError
from loraover.common.strict_yaml import parse_yaml
from loraover.models.stand_in import STAND_INS, find_stand_in

if TYPE_CHECKING:
    from loraover.models.load import ModelSource

MODULES_FILE = "modules.json"
"""File in which sentence-transformers lists the parts of a model that it saved."""
CARD_FILE = "README.md"
MAX_CARD_BYTES = 2**20
_FRONT_MATTER = re.compile(r"---\s*\n(.*?)\n---\s*(\n|$)", re.DOTALL)


def find_model_file(source: ModelSource, name: str) -> Path | None:
    """Return a file of a model that is on this machine; None if it is not, or the model has none."""
    return _find(source.location, source.revision, name)


def _find(model: str, revision: str | None, name: str) -> Path | None:
    folder = Path(model)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, name, revision=revision)
    return Path(found) if isinstance(found, str) else None


def embeds_texts(source: ModelSource) -> bool:
    """Whether sentence-transformers saved a model with a pooling layer: it embeds texts, even if it could generate.

    Source: get_pooling_config in vllm/transformers_utils/config.py of vLLM 0.32, which serves such a model so.
    """
    file = find_model_file(source, MODULES_FILE)
    try:
        parts = [] if file is None else json.loads(file.read_bytes())
        return any(str(part["type"]).endswith(".Pooling") for part in parts)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"model: {source.origin} has no usable {MODULES_FILE}: {error}; save it again.") from error


def known_licence(name: str, revision: str | None = None) -> str | None:
    """Return the `license` of a model card's front matter, e.g. "apache-2.0"; None if no local card states one.

    The card is looked for in the model's folder, the hub's cache and the list of stand-ins, never on the network.

    Args:
        name: Folder or hub name of the model.
        revision: Commit on the hub.
    """
    stated = None
    try:
        card = _find(name, revision, CARD_FILE)
        if card is not None:
            with card.open("rb") as file:
                text = file.read(MAX_CARD_BYTES).decode("utf-8", errors="replace")
            front = _FRONT_MATTER.match(text)
            values = None if front is None else parse_yaml(front[1])
            stated = values.get("license") if isinstance(values, dict) else None
    except (OSError, ValueError):  # a folder without permission, no hub name (HFValidationError), or no YAML
        pass
    if isinstance(stated, str) and stated:
        return stated
    stand_in = STAND_INS.get(name) or find_stand_in(name)
    return None if stand_in is None else stand_in.licence
