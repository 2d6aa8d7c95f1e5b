"""Steps after training that packages of later stages supply, as they supply commands: by entry points."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

GROUP = "loraover.steps"


def later_step(name: str) -> Any:
    """Return the function of a step.

    Args:
        name: "fold", called with a checkpoint's folder and a new folder, writes a plain LoRA and returns its
            certificate; "record", called with an adapter's folder, writes its reference.
    """
    (found,) = entry_points(group=GROUP, name=name)
    return found.load()
