"""The resolver of adapters' names, and a mend of vLLM: every process of vLLM imports this, so that it imports little.

Read in vLLM 0.32 and 0.33: vllm/lora/resolver.py and vllm/entrypoints/openai/models/serving.py. Of a resolver's errors,
VLLMValidationError becomes an answer of status 400 with its text, and any other one of status 500.
"""

from __future__ import annotations

import os
from functools import cache

from vllm import __version__
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

from loraover_serve.plugin.front import Front, logger
from loraover_serve.plugin.service import PluginServer, Service
from loraover_serve.plugin.settings import PLUGIN, RefusedError, read_settings

DEFAULT_DTYPE = "bf16"

KNOWN = {"0.32": "run on a CPU", "0.33": "read"}
"""Releases of vLLM whose comparison of adapters, and whose table of served adapters, were read or run."""


@cache
def service() -> Service | None:
    """Return the service of this process; None if the environment names no folder of adapters."""
    settings = read_settings(os.environ)
    return None if settings is None else Service(settings, Front(settings))


class AnyAdapter(LoRAResolver):
    """Adapters of any kind by name."""

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """Prepare the adapter of a name, and return what vLLM loads; None if there is none.

        Raises:
            VLLMValidationError: The adapter is not served; the text says why.
        """
        found = service()
        assert found is not None
        if found.served is None:  # the routes were not loaded, so the server's options are not known
            found.serve(PluginServer(base_model_name, DEFAULT_DTYPE, None, __version__))
        try:
            prepared = await found.find(lora_name)
        except RefusedError as error:
            raise VLLMValidationError(str(error)) from None
        return None if prepared is None else LoRARequest(lora_name, 1, prepared["path"])


def is_known(version: str = __version__) -> bool:
    """Whether a version of vLLM is of a release whose private parts are known."""
    return ".".join(version.split(".")[:2]) in KNOWN


def tell_apart() -> None:
    """Let vLLM compare adapters by name and id, in this process; warn instead if its release is not known.

    vLLM compares `LoRARequest`s by their names, and collects those of a batch in a set (read in 0.32 and 0.33:
    `make_lora_inputs` of vllm/v1/worker/gpu_input_batch.py, `get_activate_loras` of vllm/v1/worker/gpu/lora_utils.py).
    If a name is loaded again beside a request that still runs, the batch has two ids under one name, and the set has
    one of them. The other is not activated, so that looking it up raises KeyError, which ends the server (run in 0.32).
    """
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

    def is_equal(one: LoRARequest, other: object) -> bool:
        if not isinstance(other, LoRARequest):
            return False
        return bool((one.lora_name, one.lora_int_id) == (other.lora_name, other.lora_int_id))

    LoRARequest.__eq__ = is_equal
    LoRARequest.__hash__ = lambda one: hash((one.lora_name, one.lora_int_id))


def register_resolver() -> None:
    """Entry point of vllm.general_plugins, which every process of vLLM calls; it mends how vLLM compares adapters.

    Raises:
        ValueError: Environment variables that cannot be used.
    """
    if service() is not None:
        tell_apart()
        LoRAResolverRegistry.register_resolver(PLUGIN, AnyAdapter())
