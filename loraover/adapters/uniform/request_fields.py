"""Fields that the requests of several verbs have, and how reports name such a command."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loraover.common.request import Request, argument, option
from loraover.models.device import COMPUTE_DTYPES, DEVICES, DTYPES, choose_compute, is_one_gpu

ADDRESSES = "folder, hub name such as owner/name@revision, or address such as s3://bucket/folder"
"""Ways to name an adapter, in help texts."""

MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of --max-lora-rank: vllm/config/lora.py of vLLM 0.32."""

DEFAULT_MAX_LORA_RANK = 16
"""Value of --max-lora-rank if the server is started without it: the same file."""

SPELLINGS = "; PyTorch's names, such as bfloat16, are accepted too."


def given_adapter(kind: str, **more: Any) -> Any:
    """Declare a field that takes an adapter, or several.

    Args:
        kind: What the adapter is, in words.
        more: Keywords of `argument`; without `is_source`, the verb fetches adapters one by one, so that a missing one
            does not end the command.
    """
    return argument(f"{kind}: {ADDRESSES}.", **{"is_source": True} | more)


def plain_adapter() -> Any:
    """Declare the field `source`, the adapter to export."""
    return given_adapter("LoRA-Over checkpoint, folded adapter or any plain PEFT LoRA")


def base_model(purpose: str = "") -> Any:
    """Declare the field `model`, the base model."""
    return option(
        f"Base model{purpose}: folder, hub name or address.",
        default=None,
        default_text="the one that the adapter names",
    )


def approximate_to_rank(**more: Any) -> Any:
    """Declare the field `approximate_to_rank`, which allows adapters to be approximated."""
    description = "Rank of the approximation of an adapter that has no exact LoRA within the largest rank."
    return option(description, default=None, default_text="such adapters are refused", least=1, **more)


def replaces(product: str) -> Any:
    """Declare the field `force`, which allows an export to replace an earlier one of its kind."""
    return option(f"Replace the {product} that is already at the output.", default=False, is_recorded=False)


def prompts() -> Any:
    """Declare the field `prompts`, the texts for a comparison of logits."""
    return option(
        "Text file with one prompt a line for the comparison of logits.", default=None, default_text="a built-in set"
    )


def logits_device() -> Any:
    """Declare the field `device`, where a comparison of logits runs models."""
    return device("Device to run the models on for the comparison of logits; cuda:1 names one GPU of several.")


def logits_dtype() -> Any:
    """Declare the field `compute_dtype`, in which a comparison of logits runs models."""
    return compute_dtype("Data type to run the models in for the comparison of logits.")


def check_faults(request: Request, switch: str, *names: str) -> Iterator[str]:
    """Yield what is wrong with the arguments of a check that runs models.

    `switch` is the argument that asks for the check; the last two of its other `names` are its device and data type. A
    ConfigError says that the device is not there, or does not compute in that type.
    """
    if getattr(request, switch):
        choose_compute(*(getattr(request, name) for name in names[-2:]))
    elif given := request.given(*names):
        yield f"{given}: for {request.named(switch)} only, which runs the model; ask for it, or leave this out."


def export_command(folder: Path, *words: str, ending: str) -> str:
    """Return an export command for an adapter, such as "loraover export gguf /a -o /a.gguf".

    The folder's path is resolved, so that the output lies beside it and not in it.
    """
    path = folder.resolve()
    name, *options = words
    return shlex.join(["loraover", "export", name, str(path), "-o", f"{path}{ending}", *options])


def max_lora_rank(r: int) -> int | None:
    """Return the smallest allowed --max-lora-rank for adapters of rank r; None if r is above all of them.

    A larger value costs time and memory: vLLM pads every adapter to it.
    """
    return next((allowed for allowed in MAX_LORA_RANKS if allowed >= r), None)


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


def records(product: str, where: str = "") -> Any:
    """Declare the field `record`, with which a verb also records the reference of the adapter that it writes.

    Args:
        product: The adapter, in words.
        where: Words that follow, on the weights that are recorded.
    """
    return option(f"Also record the reference of {product} beside it, as `loraover record` does{where}.", default=False)


def device(description: str, default: str = "auto") -> Any:
    """Declare a field for the device on which PyTorch runs models; one GPU of several, such as cuda:1, is allowed."""
    text = "the first available one of cuda, mps and cpu" if default == "auto" else default
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
