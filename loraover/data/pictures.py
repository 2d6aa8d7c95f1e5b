"""Images of rows: where they are read from, and where the messages of a conversation show them."""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loraover.common.errors import DataError
from loraover.common.paths import kind_of

PICTURES = ("images", "image")
"""Columns that hold a row's images; rows that are read have the first."""

MEDIA = (*PICTURES, "video", "videos", "audio", "audios")
"""Columns that hold other things than text."""

PLACE = "<image>"
"""Mark of an image in the text of a message, as in LLaVA's data (Liu et al. 2023, arXiv:2304.08485)."""

PARTS = ("prompt", "completion", "chosen", "rejected")
CHATS = ("messages", *PARTS)
"""Columns that may hold chat messages."""

ASKERS = ("user", "system")
"""Roles whose messages may show images."""


def with_pictures(row: Any, folder: Path | None, where: str) -> Any:
    """Return a row with its images in `images`, as `datasets.Image` encodes them; paths are relative to `folder`."""
    if not isinstance(row, Mapping) or not (named := [name for name in PICTURES if row.get(name)]):
        return row
    given = row[named[0]]
    if len(named) > 1 or not isinstance(given, list | str | Mapping):
        raise DataError(f"{where}: expected a list of images in {PICTURES[0]!r}, or one image in {PICTURES[1]!r}.")
    listed = given if isinstance(given, list) else [given]
    others = {name: value for name, value in row.items() if name not in PICTURES}
    found: list[dict[str, Any]] = []
    for one in listed:
        data, path = (one.get("bytes"), one.get("path")) if isinstance(one, Mapping) else (None, one)
        is_known = folder is not None or isinstance(one, Mapping)  # a text in data of the hub could name any file here
        if isinstance(data, bytes):
            found.append({"bytes": data, "path": None})
        elif isinstance(path, str) and is_known and ":" not in path[:8]:
            file = (folder or Path()) / path
            if kind_of(file) != "file":
                raise DataError(f"{where}: there is no image file {file}; paths are relative to the data file.")
            found.append({"bytes": None, "path": str(file)})
        else:
            raise DataError(
                f"{where}: an image is {reprlib.repr(one)}, expected the path of a local file; URLs are not fetched."
            )
    return others | {PICTURES[0]: found}


def as_json(row: Mapping[str, Any]) -> str:
    """Return a row as one line of JSON, with the SHA-256 of each image in place of the image."""
    if PICTURES[0] in row:
        files = (one["bytes"] or Path(one["path"]).read_bytes() for one in row[PICTURES[0]])
        row = {**row, PICTURES[0]: [hashlib.sha256(file).hexdigest() for file in files]}
    return json.dumps(row, sort_keys=True, default=str)


def has_media(row: Mapping[str, Any]) -> bool:
    """Whether a row has images or other media in a column, or among the parts of its messages."""
    return any(map(row.get, MEDIA)) or any(part.get("type") != "text" for part in _parts(row))


def has_others(row: Mapping[str, Any]) -> bool:
    """Whether a row holds other media than images in their column, which parts of messages show by their places."""
    filled = ({name for name, value in part.items() if value is not None} for part in _parts(row))
    kinds = ({"type", "text"} if part.get("type") == "text" else {"type"} for part in _parts(row))
    return (
        any(row.get(name) for name in MEDIA if name not in PICTURES)
        or any(part.get("type") not in ("text", "image") for part in _parts(row))
        or any(names - known for names, known in zip(filled, kinds, strict=True))
    )


def placed(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a row whose messages consist of parts, among them a place for each of its images.

    `PLACE` in a user's text is the place of an image; if no message has one, all images come first in the first message
    of the user, where TRL puts them too.
    """
    found = {name: [*map(_in_parts, row[name])] for name in CHATS if isinstance(row.get(name), list)}
    images, asked = row.get(PICTURES[0], ()), next(iter(found.values()), [])
    first = next((message for message in asked if message["role"] == "user"), None)
    if images and first is None:
        raise DataError(
            f"{where}: a row with images needs chat messages, at least one of the role user, and data.chat must not be "
            "false."
        )
    if first is not None and not places(asked):
        first["content"] = [{"type": "image"} for _ in images] + first["content"]
    if places(asked) != len(images):
        raise DataError(
            f"{where}: holds {len(images)} image(s), and its messages have {places(asked)} place(s) for them."
        )
    others = [message for messages in found.values() for message in messages if message["role"] not in ASKERS]
    if places(others):
        raise DataError(f"{where}: a message of the {others[0]['role']} shows an image, which only the user's may.")
    return {**row, **found}


def places(messages: Sequence[Mapping[str, Any]]) -> int:
    """Count the places for images in messages that consist of parts."""
    return sum(part.get("type") == "image" for part in _parts({"messages": messages}))


def _in_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message as one of parts, with a place for an image wherever a text of the user has `PLACE`."""
    content = message.get("content")
    if content is None:
        return dict(message)
    given = [{"type": "text", "text": content}] if isinstance(content, str) else content
    parts: list[dict[str, Any]] = []
    for part in given:
        text = part.get("text")
        if message["role"] in ASKERS and isinstance(text, str) and PLACE in text:
            for i, piece in enumerate(text.split(PLACE)):
                parts += [{"type": "image"}] * bool(i)
                parts += [{"type": "text", "text": piece.strip()}] * bool(piece.strip())
        else:
            parts.append({name: value for name, value in part.items() if value is not None})
    return {**message, "content": parts}


def _parts(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the parts of all messages of a row whose content is a list."""
    columns = [row[name] for name in CHATS if isinstance(row.get(name), list | tuple)]
    messages = [message for column in columns for message in column if isinstance(message, Mapping)]
    contents = [message["content"] for message in messages if isinstance(message.get("content"), list)]
    return [part for content in contents for part in content if isinstance(part, Mapping)]
