"""Fields that the requests of several verbs have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loraover.common.dtypes import COMPUTE_DTYPES, DTYPES
from loraover.common.request import option
from loraover.models.device import DEVICES, is_one_gpu

SPELLINGS = "; PyTorch's names, such as bfloat16, are accepted too."


def stored_dtype(default: str = "fp32", product: str = "adapter") -> Any:
    """Declare the field `dtype`, the data type in which a verb stores its product."""
    return dtype_option(f"Data type to store the {product} in{SPELLINGS}", DTYPES, default)


def compute_dtype(description: str) -> Any:
    """Declare a field for the data type in which PyTorch runs models."""
    return dtype_option(description, COMPUTE_DTYPES)


def dtype_option(description: str, dtypes: Mapping[str, str], default: str = "fp32") -> Any:
    """Declare a field for one of some data types, given PyTorch's name of each, which is accepted too."""
    also = {long: short for short, long in dtypes.items()}
    return option(description, default=default, choices=tuple(dtypes), also=also)


def records(product: str) -> Any:
    """Declare the field `record`, with which a verb also records the reference of the adapter that it writes."""
    return option(f"Also record the reference of {product} beside it, as `loraover record` does.", default=False)


def device(description: str, default: str = "auto") -> Any:
    """Declare a field for the device on which PyTorch runs models; one GPU of several, such as cuda:1, is allowed."""
    text = "the first that is there of cuda, mps and cpu" if default == "auto" else default
    return option(description, default=default, default_text=text, choices=DEVICES, accepts=is_one_gpu)


def max_memory() -> Any:
    """Declare the field `max_memory_gib`, above which a base model's weights stay in their files."""
    return option(
        "Largest size of the base model's weights in memory, in GiB; larger ones stay in their files, and each is read "
        "whenever it is used.",
        default=None,
        default_text="what the device has free",
        above=0,
    )
