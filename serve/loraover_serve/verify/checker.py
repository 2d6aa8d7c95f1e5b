"""The checker: a program in one file that needs Python alone, and compares a server with a reference."""

from __future__ import annotations

import shutil
import tempfile
import zipapp
from pathlib import Path

import loraover

JUDGE = Path(__file__).parents[1] / "judge"
MODULES = ("at_once", "connection", "dialects", "endpoint", "speaker")
CLIENT = (*(f"client/{name}.py" for name in MODULES), "common/errors.py", "common/hosts.py")
"""Files of `loraover` that the checker needs."""

CHECKER_MAIN = """import sys

if sys.version_info < (3, 11):
    sys.stderr.write("Python %d.%d runs this checker, expected 3.11 or later.\\n" % sys.version_info[:2])
    sys.exit(2)
from loraover_serve.judge.command import run

run()
"""
"""First file of the checker, which older versions of Python can read as well."""


def write_checker(path: Path) -> None:
    """Write the checker as a file that Python runs."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        room = Path("loraover_serve", "judge")
        shutil.copytree(JUDGE, root / room, ignore=shutil.ignore_patterns("__pycache__"))
        for module in CLIENT:
            file = root / loraover.__name__ / module
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(loraover.__file__).parent / module, file)
        for folder in {above for file in root.rglob("*.py") for above in file.relative_to(root).parents}:
            (root / folder / "__init__.py").touch()
        (root / "__init__.py").unlink()
        (root / "__main__.py").write_text(CHECKER_MAIN)
        zipapp.create_archive(root, path, compressed=True)
