"""Options that several commands of `loraover-export` take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from loraover.common.command_line import DeviceChoice, DtypeChoice
from loraover.common.dtypes import COMPUTE_DTYPES
from loraover.models.device import DEVICES

PATH = click.Path(path_type=Path)

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

MODEL = click.option("--model", show_default="the one that the adapter names", help="Base model, folder or hub name.")


def dtype_option(product: str = "adapter", default: str = "fp32") -> Decorator:
    """Return the option `--dtype`, the data type in which a command stores its product."""
    return click.option(
        "--dtype",
        type=DtypeChoice("fp32", "bf16", "fp16"),
        default=default,
        show_default=True,
        help=f"Data type to store the {product} in; PyTorch's names, such as bfloat16, are accepted too.",
    )


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


def logits_options(flag: str, models: str = "models") -> Decorator:
    """Return the options `--prompts`, `--device` and `--compute-dtype` of a comparison of logits.

    Args:
        flag: Option that asks for the comparison.
        models: Word for what is run.
    """
    prompts = click.option(
        "--prompts",
        type=PATH,
        show_default="a built-in set",
        help=f"Text file with one prompt a line for {flag}.",
    )
    place = device_option("--device", f"Device to run the {models} on for {flag}; cuda:1 names one GPU of several.")
    dtype = compute_dtype_option(f"Data type to run the {models} in for {flag}.")
    return lambda command: prompts(place(dtype(command)))
