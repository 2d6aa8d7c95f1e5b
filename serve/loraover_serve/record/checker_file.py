"""The checker as one file: the room of the checker and the judge's, which import the standard library alone."""

from __future__ import annotations

import shutil
import tempfile
import zipapp
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
ROOMS = ("judge", "record/adapter_check")


def write_checker(path: Path) -> None:
    """Write the checker as a file that Python runs.

    Args:
        path: The file.
    """
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / PACKAGE.name
        for room in ROOMS:
            shutil.copytree(PACKAGE / room, root / room, ignore=shutil.ignore_patterns("__pycache__"))
        for folder in (root, root / "record"):
            (folder / "__init__.py").touch()
        main = f"{PACKAGE.name}.record.adapter_check.command:run"
        zipapp.create_archive(scratch, path, main=main, compressed=True)
