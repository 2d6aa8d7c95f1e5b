"""Routes for those who run the server, and the reload of changed adapters; only the server's API process imports it.

Read in vLLM 0.32 and 0.33: vllm/plugins/endpoint_plugins/interface.py, and vllm/entrypoints/openai/models/serving.py,
whose table of served adapters is private. vLLM loads routes of a plug-in only if VLLM_PLUGINS names it.
"""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from vllm import __version__, envs
from vllm.entrypoints.openai.models.api_router import models
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest
from vllm.entrypoints.serve.utils.api_utils import validate_json_request
from vllm.lora.request import LoRARequest

from loraover_serve.plugin.front import logger
from loraover_serve.plugin.parts import KNOWN, is_known
from loraover_serve.plugin.service import RETRY_S, PluginServer, Service
from loraover_serve.plugin.settings import PLUGIN, RefusedError
from loraover_serve.plugin.vllm import DEFAULT_DTYPE, service

LOOK_S = 1.0
"""Seconds between two looks at the folders of served adapters."""

DTYPES = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16"}
"""Data types of adapters by the data types of models."""


class Routes:
    """Entry point of vllm.endpoint_plugins."""

    name = PLUGIN
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes; those below /v1 need the server's key."""
        if service() is None:
            return
        app.get("/v1/adapters")(list_adapters)
        app.get("/v1/adapters/{name:path}/certificate")(show_certificate)
        app.post("/v1/adapters/{name:path}/prefetch")(prefetch)
        if envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING:
            app.post("/v1/load_lora_adapter", dependencies=[Depends(validate_json_request)])(load_adapter)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Read the server's options, start the worker, and keep adapters prepared and current.

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
        tasks = [_prepare_first(found)]
        if is_known(__version__):
            found.reloads = found.settings.reload
            tasks.append(keep_current(found, state.openai_serving_models))
        elif found.settings.reload:
            known = ", ".join(KNOWN)
            logger.warning("vLLM %s is not one of %s: changed folders are not reloaded", __version__, known)
        state.loraover = [asyncio.create_task(task) for task in tasks]  # held, or they may be collected


async def _prepare_first(found: Service) -> None:
    for name in found.settings.prepare:
        try:
            if await found.find(name) is None:
                raise RefusedError("there is no such adapter")
        except RefusedError as error:
            logger.warning("%s cannot be prepared: %s", name, error)


async def list_adapters(raw_request: Request) -> dict[str, Any]:
    """Return the adapters that are there, which version of each is served, and why some are refused."""
    return await asyncio.to_thread(_service().shown, served_by(models(raw_request)))


async def show_certificate(name: str, raw_request: Request) -> Response:
    """Return what was measured when an adapter was prepared."""
    found = _service().certificate(name, served_by(models(raw_request)))
    return _refusal(404, f"{name!r} has not been prepared") if found is None else JSONResponse(found)


async def prefetch(name: str, raw_request: Request) -> Response:
    """Prepare an adapter before the first request for it."""
    try:
        if await _service().find(name) is None:
            return _refusal(404, f"there is no adapter {name!r}")
    except RefusedError as error:
        return _refusal(400, str(error))
    return JSONResponse(_service().status(name, served_by(models(raw_request))))


async def load_adapter(request: LoadLoRAAdapterRequest, raw_request: Request) -> Response:
    """Prepare the adapter in a folder, and let vLLM load the result, in place of vLLM's own route.

    With `load_inplace`, a served name gets the new version under another id: under one id, requests that run would go
    on with other weights than they began with, and vLLM 0.32 would read the adapter again at each step.
    """
    found, served, name = _service(), models(raw_request), request.lora_name
    try:
        prepared = await found.prepare(name, **found.settings.source_of(request.lora_path))
    except RefusedError as error:
        return _refusal(400, str(error))
    path = prepared["path"]
    if request.load_inplace and name in served.lora_requests and is_known(__version__):
        try:
            is_anew = await serve_anew(served, name, path, is_3d=request.is_3d_lora_weight)
        except Exception as error:  # as vLLM's own route answers
            return _refusal(500, str(error))
        if is_anew or name in served.lora_requests:  # else it was unloaded meanwhile
            return Response(f"Success: LoRA adapter '{name}' added successfully.")
    answer = await served.load_lora_adapter(request.model_copy(update={"lora_path": path}))
    if isinstance(answer, ErrorResponse):
        return JSONResponse(answer.model_dump(), status_code=answer.error.code)
    return Response(answer)


def served_by(models: OpenAIServingModels) -> dict[str, str]:
    """Return the path that vLLM has loaded for each name."""
    return {name: request.lora_path for name, request in models.lora_requests.items()}


async def serve_anew(models: OpenAIServingModels, name: str, path: str, *, is_3d: bool | None = None) -> bool:
    """Let vLLM serve a folder under a name that is served already, and return whether the folder is a new one.

    The folder gets a new id. Running requests end with the version that they began with, and no request finds the name
    missing. If vLLM cannot load the folder, it still serves the earlier one. `is_3d` says whether the file holds the
    weights of a layer's experts as one tensor; None means as in the served one.
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


def used_by(models: OpenAIServingModels) -> set[str]:
    """Return the paths that vLLM may read again: those of served adapters, and those of running requests."""
    states = models.engine_client.output_processor.request_states.values()
    running = {state.lora_request.lora_path for state in states if state.lora_request is not None}
    return running | {*served_by(models).values()}


async def keep_current(service: Service, models: OpenAIServingModels) -> None:
    """Let go of old versions, prepare lost ones again, and serve changed folders anew, while the server runs.

    Folders that change are served anew only if the settings ask for it.
    """
    while True:
        await asyncio.sleep(LOOK_S)
        try:
            service.let_go(used_by(models))
            changed = await asyncio.to_thread(service.changed, served_by(models))
            await asyncio.gather(*(_renew(service, models, name, folder) for name, folder in changed.items()))
        except Exception:  # whatever it is, the next look may succeed
            logger.exception("the served adapters cannot be checked for changes; next attempt in %g seconds", RETRY_S)
            await asyncio.sleep(RETRY_S)


async def _renew(service: Service, models: OpenAIServingModels, name: str, folder: Path) -> None:
    try:
        prepared: Mapping[str, Any] | None = await service.renew(name, folder)
        if prepared is not None and service.settings.reload:
            await serve_anew(models, name, prepared["path"])
    except RefusedError as error:
        service.refuse(name, str(error), folder)
        logger.warning("%s has changed, and its earlier version is still served: %s", name, error)
    except Exception as error:  # of vLLM's engine, such as an adapter that its memory does not hold
        logger.exception("%s has changed, and vLLM cannot load it; its earlier version is still served", name)
        service.refuse(name, f"vLLM cannot load it: {error}", folder)


def _service() -> Service:
    found = service()
    assert found is not None
    return found


def _refusal(code: int, message: str) -> JSONResponse:
    """Return an error in vLLM's form."""
    kind = {404: "NotFoundError", 500: "InternalServerError"}.get(code, "BadRequestError")
    return JSONResponse({"error": {"message": message, "type": kind, "param": "model", "code": code}}, code)
