"""Images of rows: where they are read from, and to which turns of a conversation they belong."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loraover.common.errors import DataError
from loraover.common.paths import kind_of

PICTURES = ("images", "image")
"""Columns that hold a row's images; rows that are read have the first."""

PLACE = "<image>"
"""What stands for an image in the text of a message, as in LLaVA's data (Liu et al. 2023, arXiv:2304.08485)."""

CHATS = ("messages", "prompt", "completion", "chosen", "rejected")
"""Columns that may hold chat messages."""


def with_pictures(row: Any, folder: Path | None, where: str) -> Any:
    """Return a row with all its images in `images`, as `datasets.Image` encodes them: a path, or bytes of a file.

    Args:
        row: The row, as its source holds it.
        folder: Folder of the data file, to which paths are relative; None for data of the hub.
        where: Place of the row, for messages.

    Raises:
        DataError: An image is neither a file nor bytes.
    """
    if not isinstance(row, Mapping) or not (named := [name for name in PICTURES if row.get(name)]):
        return row
    given = row[named[0]]
    if len(named) > 1 or not isinstance(given, list | str | Mapping):
        raise DataError(f"{where}: expected a list of images in {PICTURES[0]!r}, or one image in {PICTURES[1]!r}.")
    listed = given if isinstance(given, list) else [given]
    others = {name: value for name, value in row.items() if name not in PICTURES}
    return others | {PICTURES[0]: [_picture(one, folder, where) for one in listed]}


def _picture(given: Any, folder: Path | None, where: str) -> dict[str, Any]:
    data, path = (given.get("bytes"), given.get("path")) if isinstance(given, Mapping) else (None, given)
    if isinstance(data, bytes):
        return {"bytes": data, "path": None}
    if folder is not None and isinstance(path, str):
        if kind_of(folder / path) == "file":
            return {"bytes": None, "path": str(folder / path)}
        raise DataError(f"{where}: there is no image file {folder / path}; paths are relative to the data file.")
    raise DataError(f"{where}: an image is {reprlib.repr(given)}, expected the path of a local file.")


def has_media(row: Mapping[str, Any]) -> bool:
    """Whether a row has images in a column, or any media among the parts of its messages."""
    return any(map(row.get, PICTURES)) or any(part.get("type") != "text" for part in _parts(row))


def has_others(row: Mapping[str, Any]) -> bool:
    """Whether the parts of a row's messages hold other media than places of images, such as sound or an image."""
    return any(part.get("type") not in ("text", "image") or "image" in part for part in _parts(row))


def placed(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a row with images whose messages consist of parts, among them a place for each image.

    Args:
        row: The row. In a message of text, `PLACE` is the place of an image; if there is none in any message, all
            images come first in the first message of the user, where TRL puts them too.
        where: Place of the row, for messages.

    Raises:
        DataError: There are no messages, or other places than images.
    """
    found = {name: [*map(_in_parts, row[name])] for name in CHATS if isinstance(row.get(name), list)}
    images, asked = row[PICTURES[0]], next(iter(found.values()), [])
    first = next((message for message in asked if message.get("role") == "user"), None)
    if first is None:
        raise DataError(f"{where}: images stand in chat messages of a user; write the row so, and leave data.chat out.")
    if not places(asked):
        first["content"] = [{"type": "image"} for _ in images] + (first.get("content") or [])
    if places(asked) != len(images):
        raise DataError(f"{where}: holds {len(images)} images, and its messages have {places(asked)} places for them.")
    return {**row, **found}


def places(messages: Sequence[Mapping[str, Any]]) -> int:
    """Count the places for images in messages that consist of parts."""
    return sum(part.get("type") == "image" for part in _parts({"messages": messages}))


def _in_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message of text as one of parts, with a place for an image wherever its text has `PLACE`."""
    text = message.get("content")
    if not isinstance(text, str):
        return dict(message)
    parts: list[dict[str, Any]] = []
    for i, piece in enumerate(text.split(PLACE)):
        parts += [{"type": "image"}] * bool(i)
        parts += [{"type": "text", "text": piece.strip()}] * bool(piece.strip())
    return {**message, "content": parts}


def _parts(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the parts of all messages of a row whose content is a list."""
    columns = [row[name] for name in CHATS if isinstance(row.get(name), list | tuple)]
    messages = [message for column in columns for message in column if isinstance(message, Mapping)]
    contents = [message["content"] for message in messages if isinstance(message.get("content"), list)]
    return [part for content in contents for part in content if isinstance(part, Mapping)]
