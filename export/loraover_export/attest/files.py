"""Files of an adapter's folder that a statement names, or a signature covers."""

from __future__ import annotations

from pathlib import Path

from loraover.common.errors import CheckpointError


def visible_files(adapter: Path) -> dict[str, Path]:
    """Return the files of a folder by their paths in it, without those that are hidden or in a hidden folder.

    A clone has git's files in such a folder, and a download by `hf download --local-dir` those of the hub's client. In
    the hub's cache, files are links.

    Args:
        adapter: The folder.

    Raises:
        CheckpointError: No such folder.
    """
    if not adapter.is_dir():
        raise CheckpointError(f"{adapter}: not a folder; name that of an adapter.")
    found = {path.relative_to(adapter): path for path in sorted(adapter.rglob("*"))}
    return {
        name.as_posix(): path
        for name, path in found.items()
        if path.is_file() and not any(part.startswith(".") for part in name.parts)
    }
