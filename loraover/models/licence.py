"""Licence of a base model, as its model card states it."""

from __future__ import annotations

import re
from pathlib import Path

from loraover.common.strict_yaml import parse_yaml
from loraover.models.stand_in import STAND_INS, find_stand_in

MAX_CARD_BYTES = 2**20
_FRONT_MATTER = re.compile(r"---\s*\n(.*?)\n---\s*(\n|$)", re.DOTALL)


def known_licence(name: str, revision: str | None = None) -> str | None:
    """Return the `license` of a model card's front matter, e.g. "apache-2.0"; None if no local card states one.

    The card is looked for in the model's folder, the hub's cache and the list of stand-ins, never on the network.

    Args:
        name: Folder or hub name of the model.
        revision: Commit on the hub.
    """
    card = _card(name, revision)
    stated = None if card is None else _stated(card)
    if stated is None:
        stand_in = STAND_INS.get(name) or find_stand_in(name)
        return None if stand_in is None else stand_in.licence
    return stated


def _card(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        if Path(name).is_dir():
            return Path(name) / "README.md"
        found = try_to_load_from_cache(name, "README.md", revision=revision)
    except (OSError, HFValidationError):  # a folder without permission, or not a hub name
        return None
    return Path(found) if isinstance(found, str) else None


def _stated(card: Path) -> str | None:
    try:
        with card.open("rb") as file:
            text = file.read(MAX_CARD_BYTES).decode("utf-8", errors="replace")
        front = _FRONT_MATTER.match(text)
        values = None if front is None else parse_yaml(front[1])
    except (OSError, ValueError):
        return None
    licence = values.get("license") if isinstance(values, dict) else None
    return licence if isinstance(licence, str) and licence else None
