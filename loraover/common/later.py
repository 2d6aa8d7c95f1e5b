"""Things that are found when they are first used: PyTorch, the public names of packages, and steps of later stages.

A base installation has no PyTorch; looking at adapters, and writing plain ones for vLLM, needs none. Commands start
fast without the public names. Packages of later stages supply steps after training, as they supply commands: by entry
points.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

GROUP = "loraover.steps"

if TYPE_CHECKING:
    import torch as torch
else:

    class _Torch:
        def __getattr__(self, name: str) -> Any:
            return getattr(import_module("torch"), name)

    torch = _Torch()


def has_torch() -> bool:
    """Whether PyTorch and transformers are installed, which the extra `torch` brings."""
    return all(find_spec(name) is not None for name in ("torch", "transformers"))


def later_step(name: str) -> Any:
    """Return the function of a step.

    Args:
        name: "fold", called with a checkpoint's folder and a new folder, writes a plain LoRA and returns its
            certificate; "record", called with an adapter's folder, writes its reference; "verify-rollouts", called with
            a trainer of TRL, judges at each step whether its engine samples from the policy that is trained.
    """
    from importlib.metadata import entry_points  # 15 ms, and every import of a package reads this module

    (found,) = entry_points(group=GROUP, name=name)
    return found.load()


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
