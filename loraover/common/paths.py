"""What a path leads to."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Literal

from loraover.common.errors import ConfigError


def kind_of(path: str | Path) -> Literal["file", "folder"] | None:
    """Whether a path leads to a file or a folder; None if to nothing, or to something else, such as a pipe.

    `Path.is_file` and `Path.is_dir` raise some of the system's errors and, from Python 3.14 on, take all of them for a
    missing file.

    Raises:
        ConfigError: The system cannot say, since the path is too long, or a folder on it may not be entered.
    """
    try:
        mode = Path(path).stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a null character
        return None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be looked at: {error.strerror or error}; check the path.") from error
    return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else None
