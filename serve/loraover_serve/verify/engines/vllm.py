"""vLLM, started for the comparison with the adapter in the form that `loraover export vllm` writes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import final

from loraover.client.dialects import Speaker
from loraover.client.endpoint import Endpoint
from loraover.common.errors import ExportError
from loraover.models.load import load_tokenizer
from loraover_export.combine.combine import combine_adapters
from loraover_export.vllm.run import export_vllm
from loraover_serve.engines.installed import vllm_hint
from loraover_serve.verify.answers import ADAPTER, BASE, OTHER
from loraover_serve.verify.engines.base import Setting, VerifyEngine
from loraover_serve.verify.engines.endpoint import OpenAiEngine
from loraover_serve.vllm.request import KEY_VARIABLE, LOOPBACK
from loraover_serve.vllm.serve import serve_adapters
from loraover_serve.vllm.server import free_port

LOG_FILE = "vllm.log"
ROOM = 8  # tokens by which the server's largest length exceeds the longest request


@final
class Vllm(OpenAiEngine):
    """A vLLM server, asked over HTTP."""

    takes_options = True

    @classmethod
    def install(cls, vllm: str) -> str | None:
        if shutil.which(vllm) is not None:
            return None
        return f"{vllm_hint()}, or name the command that starts it with --vllm or LORAOVER_VLLM (found no {vllm})"

    @classmethod
    @contextmanager
    def start(cls, setting: Setting) -> Iterator[VerifyEngine]:
        folder = export_uniform(setting)
        options = list(setting.request.options)
        if not any(option.replace("_", "-").startswith("--max-model-len") for option in options):
            options += ["--max-model-len", str(setting.longest + ROOM)]
        with serve_adapters(
            [folder, *_opposite(folder)],
            model=setting.base.location,
            vllm=setting.request.vllm,
            port=free_port(LOOPBACK),  # not vLLM's usual one, which a server that starts meanwhile would take as well
            log=setting.scratch / LOG_FILE,
            start_timeout_s=setting.request.start_timeout_s,
            options=options,
            report=setting.request.report,
        ) as server:
            base = next(name for name in server.models() if name not in server.names)
            key = KEY_VARIABLE if server.asks_for_key else None
            names = {BASE: base, **dict(zip((ADAPTER, OTHER), server.names, strict=False))}
            endpoint = Endpoint(server.url, key, timeout_s=setting.request.timeout_s)
            engine = cls(Speaker(endpoint, load_tokenizer(setting.base), base), names)
            engine.version = server.version()
            yield engine


def _opposite(adapter: Path) -> list[Path]:
    """A second adapter beside the given one, to mix batches of two: its negative; none if it has more than A and B."""
    other = adapter.with_name(OTHER)
    with suppress(ExportError):
        combine_adapters([adapter], other, weights=[-1.0])
        return [other]
    return []


def export_uniform(setting: Setting) -> Path:
    """Export the adapter in the form that vLLM, SGLang, OpenVINO GenAI and PEFT read alike, and return its folder.

    Raises:
        ExportError: an adapter that vLLM's rules refuse.
    """
    folder = setting.scratch / ADAPTER
    # float32: the engine rounds to its own type, as it would round the trained weights
    exported = export_vllm(setting.adapter, folder, model=setting.base.location, dtype="fp32")
    if not exported.passed:
        errors = [f"{found.rule}: {found.found}" for found in exported.preflight.findings if found.level == "error"]
        raise ExportError(f"vLLM would refuse the adapter or serve it wrongly: {'; '.join(errors) or 'a matrix'}.")
    return folder
