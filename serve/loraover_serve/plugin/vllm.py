"""The resolver of adapters' names. Every process of vLLM imports this module, so it imports little itself.

Read in vLLM 0.32 and 0.33: vllm/lora/resolver.py and vllm/entrypoints/openai/models/serving.py. If a resolver raises
VLLMValidationError, the answer has status 400 and the error's text; any other error gives status 500.
"""

from __future__ import annotations

import os
from functools import cache

from vllm import __version__
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

from loraover_serve.plugin.front import Front
from loraover_serve.plugin.mends import mend
from loraover_serve.plugin.service import PluginServer, Service
from loraover_serve.plugin.settings import PLUGIN, RefusedError, read_settings

DEFAULT_DTYPE = "bf16"


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


def register_resolver() -> None:
    """Entry point of vllm.general_plugins, which every process of vLLM calls; it repairs vLLM in that process.

    Raises:
        ValueError: Environment variables that cannot be used.
    """
    found = service()
    if found is not None:
        mend(found.settings.cache)
        LoRAResolverRegistry.register_resolver(PLUGIN, AnyAdapter())
