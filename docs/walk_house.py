"""Print how far a reader walks through our code who follows a command from its first line to its last.

    python docs/walk_house.py export fold runs/demo/adapter -o folded --check-error

The command runs, and each call from one module of ours to another is one step, counted once. Calls that an import
makes, such as those that declare the fields of a request, are no steps. A step goes into a *file* for the first time,
or *returns* to a file that was read before from another place; it *climbs* where the room that is called lies above
the one that calls.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from measure_house import PACKAGES, ROOT, read_layers, row

Step = tuple[str, str]
"""Modules of ours that call and that are called."""


class Walk(NamedTuple):
    """Counts of a walk."""

    files: int
    climbs: int
    returns: int


class Steps:
    """Steps between modules of ours, in the order of their first call.

    Args:
        root: Folder of the repository.
        packages: Folder of each package in it.
    """

    def __init__(self, root: Path = ROOT, packages: Mapping[str, str] = PACKAGES) -> None:
        self.found: dict[Step, None] = {}
        self._folders = {f"{root / folder}/": package for package, folder in packages.items()}
        self._modules: dict[str, str | None] = {}

    def module(self, file: str) -> str | None:
        """Return the dotted name of a module of ours; None for any other file."""
        if file not in self._modules:
            places = (p + "." + file[len(f) :] for f, p in self._folders.items() if file.startswith(f))
            found = next(places, None)
            self._modules[file] = found and found.removesuffix(".py").replace("/", ".")
        return self._modules[file]

    def heard(self, frame: FrameType, event: str, _: Any) -> None:
        """Receive an event of `sys.setprofile`."""
        called = self.module(frame.f_code.co_filename) if event == "call" else None
        if called is None or frame.f_code.co_name == "<module>":
            return
        caller, above = None, frame.f_back
        while above is not None and (caller := self.module(above.f_code.co_filename)) is None:
            above = above.f_back
        if caller in (None, called) or (str(caller), called) in self.found:
            return
        while above is not None and not (above.f_code.co_name == "<module>" and self.module(above.f_code.co_filename)):
            above = above.f_back
        if above is None:  # no module of ours is being imported
            self.found[str(caller), called] = None


def count(steps: Iterable[Step], layers: Mapping[str, list[list[str]]]) -> Walk:
    """Count the files, climbs and returns of steps; `layers` are as `read_layers` has them."""
    seen: set[str] = set()
    climbs = returns = 0
    for caller, called in steps:
        seen.add(caller)
        returns += called in seen
        climbs += height(called, layers) < height(caller, layers)
        seen.add(called)
    return Walk(len(seen), climbs, returns)


def height(module: str, layers: Mapping[str, list[list[str]]]) -> tuple[int, int]:
    """Rows of a module's package and room; 0 is at the top."""
    package, room, *_ = (*module.split("."), "")
    return row(layers[""], package), row(layers.get(package, []), room)


def main(words: list[str]) -> None:
    """Run the command and print its walk."""
    from loraover.cli import cli

    steps = Steps()
    sys.setprofile(steps.heard)
    threading.setprofile(steps.heard)
    try:
        cli(words, standalone_mode=False)
    except SystemExit:  # a verdict that is not a pass
        pass
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    walk = count(steps.found, read_layers())
    print(f"{walk.files} files, {walk.climbs} climbs, {walk.returns} returns", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
