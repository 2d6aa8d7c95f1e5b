"""The checker as one file: what it needs of both packages, which imports the standard library alone."""

from __future__ import annotations

import shutil
import tempfile
import zipapp
from pathlib import Path

import loraover

SERVE = Path(__file__).parents[1]
ROOMS = ("judge", "record/adapter_check")
MODULES = ("at_once", "connection", "dialects", "endpoint", "speaker")
CLIENT = (*(f"client/{name}.py" for name in MODULES), "common/errors.py", "common/hosts.py")
"""Files of `loraover` that the checker needs."""


def write_checker(path: Path) -> None:
    """Write the checker as a file that Python runs.

    Args:
        path: The file.
    """
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        for room in ROOMS:
            shutil.copytree(SERVE / room, root / SERVE.name / room, ignore=shutil.ignore_patterns("__pycache__"))
        for module in CLIENT:
            file = root / loraover.__name__ / module
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(loraover.__file__).parent / module, file)
        for folder in {above for file in root.rglob("*.py") for above in file.relative_to(root).parents}:
            (root / folder / "__init__.py").touch()
        (root / "__init__.py").unlink()
        zipapp.create_archive(root, path, main=f"{SERVE.name}.record.adapter_check.command:run", compressed=True)
