"""A mend of vLLM: two adapters of one name and different ids are different.

vLLM compares `LoRARequest`s by their names, and collects those of a batch in a set (read in 0.32 and 0.33:
`make_lora_inputs` of vllm/v1/worker/gpu_input_batch.py, `get_activate_loras` of vllm/v1/worker/gpu/lora_utils.py). If a
name is loaded again beside a request that still runs, the batch has two ids under one name, and the set has one of
them. The other is not activated, so that looking it up raises KeyError, which ends the server (run in 0.32).
"""

from __future__ import annotations

import logging

from vllm import __version__
from vllm.lora.request import LoRARequest

logger = logging.getLogger("vllm.loraover")

KNOWN = {"0.32": "run on a CPU", "0.33": "read"}
"""Releases of vLLM whose comparison of adapters, and whose table of served adapters, were read or run."""


def is_known(version: str = __version__) -> bool:
    """Whether a version of vLLM is of a release whose private parts are known."""
    return ".".join(version.split(".")[:2]) in KNOWN


def tell_apart() -> None:
    """Let vLLM compare adapters by name and id, in this process; of a release that is not known, warn instead."""
    if LoRARequest("name", 1, "path") != LoRARequest("name", 2, "path"):
        return
    if not is_known():
        logger.warning(
            "vLLM %s compares adapters by name alone, and its sources were not read: do not unload an adapter that "
            "still answers, since loading it again may end the server. Known are %s.",
            __version__,
            ", ".join(KNOWN),
        )
        return
    LoRARequest.__eq__ = _is_equal
    LoRARequest.__hash__ = _hash


def _is_equal(one: LoRARequest, other: object) -> bool:
    return isinstance(other, LoRARequest) and (one.lora_name, one.lora_int_id) == (other.lora_name, other.lora_int_id)


def _hash(one: LoRARequest) -> int:
    return hash((one.lora_name, one.lora_int_id))
