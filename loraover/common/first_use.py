"""Public names of a package that are imported on first use, so that commands start fast."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any


def names_on_first_use(
    package: str, file: str, of_the_lab: Sequence[str] = ()
) -> tuple[Callable[[str], Any], list[str]]:
    """Return a package's `__getattr__`, and the names that it finds.

    They are what the package imports for type checkers alone, a line for each: `from MODULE import NAME as NAME`.

    Args:
        package: Name of the package.
        file: Path of its `__init__.py`.
        of_the_lab: Names that moved to `loraover_lab`, as the error for them says.
    """
    text = Path(file).read_text(encoding="utf-8")
    homes = {name: home for home, name in re.findall(r"^    from (\S+) import (\w+) as \2$", text, re.MULTILINE)}

    def find(name: str) -> Any:
        if name not in homes:
            now = ": import it from loraover_lab" if name in of_the_lab else ""
            raise AttributeError(f"module {package!r} has no attribute {name!r}{now}")
        return getattr(import_module(homes[name]), name)

    return find, [*homes]
