"""A fault of the product, the tests that should notice it, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

ROOT = Path(__file__).resolve().parents[2]

Outcome = Literal["killed", "survived", "broken"]


class Selection(NamedTuple):
    """Tests, by the name of their file, wherever below `tests/` it lies, and pytest's `-k` expression."""

    file: str
    only: str = ""


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Args:
        name: What is wrong with it.
        old: Source that occurs exactly once in the product, so that no path has to be named.
        new: What stands there instead.
        tests: Tests that should fail.
    """

    name: str
    old: str
    new: str
    tests: Selection


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant."""

    name: str
    outcome: Outcome
    seconds: float
    note: str
