"""Devices that a model can be run on: the processor, an NVIDIA GPU, or an Apple GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraover.common.errors import ConfigError

if TYPE_CHECKING:
    import torch

DEVICES = ("auto", "cpu", "cuda", "mps")
"""Names of devices; "auto" is the first that is there of cuda, mps and cpu."""


def choose_device(name: str = "auto") -> torch.device:
    """Return the device of a name.

    Args:
        name: One of `DEVICES`, or one GPU of several, such as "cuda:1".

    Raises:
        ConfigError: The name is unknown, or this machine or this installation of PyTorch has no such device.
    """
    import torch

    found = found_devices()
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if found.get(kind)))
    kind, colon, index = name.partition(":")
    if kind not in DEVICES[1:] or (colon and not (kind == "cuda" and index.isascii() and index.isdigit())):
        raise ConfigError(f"device is {name!r}, expected one of {', '.join(DEVICES)}, or one GPU such as cuda:1.")
    if int(index or 0) >= found[kind]:
        raise ConfigError(
            f"device: there is no {name} here; PyTorch {torch.__version__} finds {_in_words(found)}. Choose a device "
            "that is there, or auto. If the machine has a GPU, install a PyTorch that is built for it."
        )
    return torch.device(name)


def found_devices() -> dict[str, int]:
    """Return the number of devices of each kind that PyTorch finds: cpu, cuda and mps."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {"cpu": 1, "cuda": gpus, "mps": int(torch.backends.mps.is_available())}


def _in_words(found: dict[str, int]) -> str:
    names = [kind if count == 1 else f"{count} of {kind}" for kind, count in found.items() if count]
    return f"{', '.join(names)} only" if len(names) == 1 else ", ".join(names)
