"""Options for the device and the data type in which PyTorch runs models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from loraover.common.command_line import DeviceChoice, DtypeChoice
from loraover.common.dtypes import COMPUTE_DTYPES
from loraover.models.device import DEVICES

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def device_option(name: str, help_text: str) -> Decorator:
    """Return an option that names the device on which PyTorch runs models."""
    return click.option(
        name,
        type=DeviceChoice(*DEVICES),
        default="auto",
        show_default="the first that is there of cuda, mps and cpu",
        help=help_text,
    )


def compute_dtype_option(help_text: str) -> Decorator:
    """Return the option `--compute-dtype`, the data type in which PyTorch runs models."""
    return click.option(
        "--compute-dtype", type=DtypeChoice(*COMPUTE_DTYPES), default="fp32", show_default=True, help=help_text
    )
