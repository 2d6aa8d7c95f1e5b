"""Served adapters whose folders change: prepared and served anew, while requests run.

Read in vLLM 0.32 and 0.33: vllm/entrypoints/openai/models/serving.py, whose table of served adapters is private.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.lora.request import LoRARequest

from loraover_serve.plugin.front import logger
from loraover_serve.plugin.service import Service
from loraover_serve.plugin.settings import RefusedError

LOOK_S = 1.0
"""Seconds between two looks at the folders of served adapters."""


def served_by(models: OpenAIServingModels) -> dict[str, str]:
    """Return the path that vLLM has loaded, by name."""
    return {name: request.lora_path for name, request in models.lora_requests.items()}


async def serve_anew(models: OpenAIServingModels, name: str, path: str, *, is_3d: bool | None = None) -> bool:
    """Let vLLM serve a folder under a name that it serves already, and return whether it did not yet.

    The folder gets another id. Requests that run end with the version that they began with, and no request finds the
    name missing.

    Args:
        models: vLLM's table of served adapters.
        name: Name of the adapter.
        path: Folder to load.
        is_3d: Whether the weights of experts lie in the file as one tensor a layer; None: as those of the served one.

    Raises:
        Exception: vLLM cannot load the folder, and serves the earlier one.
    """
    async with models.lora_resolver_lock[name]:
        served = models.lora_requests.get(name)
        if served is None or served.lora_path == path:
            return False
        found = LoRARequest(
            lora_name=name,
            lora_int_id=models.lora_id_counter.inc(1),
            lora_path=path,
            base_model_name=served.base_model_name,
            is_3d_lora_weight=served.is_3d_lora_weight if is_3d is None else is_3d,
        )
        await models.engine_client.add_lora(found)
        models.lora_requests[name] = found
    logger.info("%s has changed, and is served from %s", name, path)
    return True


async def keep_current(service: Service, models: OpenAIServingModels) -> None:
    """Serve every adapter anew whose folder has changed and is complete, for as long as the server runs."""
    while True:
        await asyncio.sleep(LOOK_S)
        changed = await asyncio.to_thread(service.changed, served_by(models))
        await asyncio.gather(*(_renew(service, models, name, folder) for name, folder in changed.items()))


async def _renew(service: Service, models: OpenAIServingModels, name: str, folder: Path) -> None:
    try:
        prepared: Mapping[str, Any] | None = await service.renew(name, folder)
        if prepared is not None:
            await serve_anew(models, name, prepared["path"])
    except RefusedError as error:
        service.refuse(name, str(error), folder)
        logger.warning("%s has changed, and its earlier version is served still: %s", name, error)
    except Exception as error:  # of vLLM's engine, such as an adapter that its memory does not hold
        logger.exception("%s has changed, and vLLM cannot load it; its earlier version is served still", name)
        service.refuse(name, f"vLLM cannot load it: {error}", folder)
