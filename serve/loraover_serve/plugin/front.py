"""The server's side of the worker: it starts the process, waits without blocking the server, and restarts it."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
from asyncio.subprocess import PIPE, Process
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from loraover_serve.plugin.settings import ADAPTERS, RefusedError, Settings

logger = logging.getLogger("vllm.loraover")

TRIES = 2
"""Number of workers that may crash on one adapter before it is refused."""

LINE_BYTES = 2**20
"""Longest answer of a worker."""


class WorkerEndedError(Exception):
    """The worker ended before it answered."""


class Front:
    """The worker of one server process.

    Args:
        settings: Settings of the plug-in.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._starting = asyncio.Lock()
        self._process: Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}

    @property
    def pid(self) -> int | None:
        """Id of the worker's process; None if none runs."""
        return None if self._process is None or self._process.returncode is not None else self._process.pid

    async def start(self) -> None:
        """Start the worker, if none runs."""
        async with self._starting:
            if self.pid is not None:
                return
            root = str(Path(__file__).parents[2])
            paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
            inherited = {name: value for name, value in os.environ.items() if name != ADAPTERS}
            given = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(dict.fromkeys([*paths, root]))}
            self._process = await asyncio.create_subprocess_exec(
                *(self._settings.python, "-m", "loraover_serve.plugin.worker", str(self._settings.threads)),
                stdin=PIPE,
                stdout=PIPE,
                env=inherited | given,
                limit=LINE_BYTES,
            )
            self._waiting = {}  # of this process alone: an earlier one's requests end with it
            self._reader = asyncio.create_task(_read(self._process, self._waiting))

    async def prepare(self, **request: Any) -> dict[str, Any]:
        """Let the worker prepare an adapter, and return the fields of the prepared adapter.

        Args:
            request: Arguments of `prepare_adapter`; or `hub` in place of `source`.

        Raises:
            RefusedError: The adapter is refused, or the worker ended several times.
        """
        for _ in range(TRIES):
            try:
                answer = await self._ask(request)
            except WorkerEndedError:
                logger.warning("the process that prepares adapters ended, and is restarted")
                continue
            if "refused" in answer:
                raise RefusedError(answer["refused"])
            prepared: dict[str, Any] = answer["prepared"]
            return prepared
        raise RefusedError(
            "the process that prepares adapters ended while it worked on this one; see the server's log."
        )

    async def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        await self.start()
        process, waiting, number = self._process, self._waiting, next(self._numbers)
        assert process is not None
        assert process.stdin is not None
        answer = waiting[number] = asyncio.get_running_loop().create_future()
        try:
            if process.stdin.is_closing():  # vLLM's event loop, uvloop, raises RuntimeError if one writes there
                raise BrokenPipeError
            process.stdin.write(json.dumps({"id": number, **request}).encode() + b"\n")
            await process.stdin.drain()
            found: dict[str, Any] = await answer
        except (BrokenPipeError, ConnectionResetError) as error:
            await process.wait()  # or the next try would meet the same one
            raise WorkerEndedError from error
        else:
            return found
        finally:
            waiting.pop(number, None)


async def _read(process: Process, expected: Mapping[int, asyncio.Future[dict[str, Any]]]) -> None:
    """Pass each answer to the request that waits for it, until the worker ends; end it if an answer is unreadable."""
    assert process.stdout is not None
    try:
        async for line in process.stdout:
            if not line.endswith(b"\n"):
                break  # the worker was killed while it wrote
            answer = json.loads(line)
            waiting = expected.get(answer.pop("id"))
            if waiting is not None and not waiting.done():
                waiting.set_result(answer)
    except ValueError as error:
        logger.warning("an answer of the process that prepares adapters cannot be read: %s", error)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        for waiting in expected.values():
            if not waiting.done():
                waiting.set_exception(WorkerEndedError())
