"""Routes for those who run the server, which its API process imports alone.

Read in vLLM 0.32 and 0.33: vllm/plugins/endpoint_plugins/interface.py. vLLM loads routes of a plug-in only if
VLLM_PLUGINS names it.
"""

from __future__ import annotations

import asyncio
from argparse import Namespace
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from vllm import __version__, envs
from vllm.entrypoints.openai.models.api_router import models
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest
from vllm.entrypoints.serve.utils.api_utils import validate_json_request

from loraover_serve.plugin.front import logger
from loraover_serve.plugin.service import PluginServer, Service
from loraover_serve.plugin.settings import PLUGIN, RefusedError
from loraover_serve.plugin.vllm import DEFAULT_DTYPE, service

DTYPES = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16"}
"""Data types of adapters by those of models."""


class Routes:
    """Entry point of vllm.endpoint_plugins."""

    name = PLUGIN
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes; what lies below /v1 is guarded by the server's key."""
        if service() is None:
            return
        app.get("/v1/adapters")(list_adapters)
        app.get("/v1/adapters/{name:path}/certificate")(show_certificate)
        app.post("/v1/adapters/{name:path}/prefetch")(prefetch)
        if envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING:
            app.post("/v1/load_lora_adapter", dependencies=[Depends(validate_json_request)])(load_adapter)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Learn what the server was started with, start the worker, and have adapters prepared that are asked for.

        Raises:
            ValueError: Settings that do not fit the server, which ends.
        """
        found = service()
        if found is None or engine_client is None:
            return
        config = engine_client.model_config
        dtype = DTYPES.get(str(config.dtype), DEFAULT_DTYPE)
        found.serve(PluginServer(config.model, dtype, args.max_lora_rank, __version__))
        await found.front.start()
        state.loraover = asyncio.create_task(_prepare_first(found))  # held, or it may be collected


async def _prepare_first(found: Service) -> None:
    for name in found.settings.prepare:
        try:
            if await found.find(name) is None:
                raise RefusedError("there is no such adapter")
        except RefusedError as error:
            logger.warning("%s cannot be prepared: %s", name, error)


async def list_adapters() -> dict[str, Any]:
    """Return the adapters that are there, what was done to each, and why some are refused."""
    return _service().shown()


async def show_certificate(name: str) -> Response:
    """Return what was measured when an adapter was prepared."""
    found = _service().certificate(name)
    return _refusal(404, f"{name!r} has not been prepared") if found is None else JSONResponse(found)


async def prefetch(name: str) -> Response:
    """Prepare an adapter before the first request for it."""
    try:
        if await _service().find(name) is None:
            return _refusal(404, f"there is no adapter {name!r}")
    except RefusedError as error:
        return _refusal(400, str(error))
    return JSONResponse(_service().status(name))


async def load_adapter(request: LoadLoRAAdapterRequest, raw_request: Request) -> Response:
    """Prepare the adapter in a folder, and let vLLM load the result, in place of vLLM's own route."""
    found = _service()
    try:
        prepared = await found.prepare(request.lora_name, **found.settings.source_of(request.lora_path))
    except RefusedError as error:
        return _refusal(400, str(error))
    answer = await models(raw_request).load_lora_adapter(request.model_copy(update={"lora_path": prepared["path"]}))
    if isinstance(answer, ErrorResponse):
        return JSONResponse(answer.model_dump(), status_code=answer.error.code)
    return Response(answer)


def _service() -> Service:
    found = service()
    assert found is not None
    return found


def _refusal(code: int, message: str) -> JSONResponse:
    """Return an error in vLLM's form."""
    kind = "NotFoundError" if code == 404 else "BadRequestError"
    return JSONResponse({"error": {"message": message, "type": kind, "param": "model", "code": code}}, code)
