"""The command that writes an adapter for an engine, as reports name it."""

from __future__ import annotations

import shlex
from pathlib import Path


def export_command(folder: Path, *words: str, ending: str) -> str:
    """Return an export command for an adapter, such as "loraover export gguf /a -o /a.gguf".

    Args:
        folder: Folder of the adapter; its path is resolved, so that the output lies beside it and not in it.
        words: Name of the command, then options.
        ending: Ending of the output's name.
    """
    path = folder.resolve()
    name, *options = words
    return shlex.join(["loraover", "export", name, str(path), "-o", f"{path}{ending}", *options])
