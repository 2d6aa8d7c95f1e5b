"""A vLLM server with little memory for its cache, which loads adapters while it runs."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from loraover_serve.vllm.client import VllmServer
from loraover_serve.vllm.server import VllmServerConfig, serve_vllm

from support.vllm_command import vllm_command

AMX = Path(__file__).with_name("amx")
"""Folder of what each Python process of a server does as it starts."""

ENABLE_LORA = ("--enable-lora", "--max-loras", "1", "--max-lora-rank", "8")
"""Options of a server that is started without an adapter."""

FEW_BLOCKS = ("--num-gpu-blocks-override", "128")
"""Room for the keys and values of 16,000 tokens on a CPU; else each server fills a gibibyte or more."""


@contextmanager
def serving_loader(config: VllmServerConfig, log: Path) -> Iterator[VllmServer]:
    """Serve a model during a block."""
    with ExitStack() as until:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
            patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
            if platform.machine() == "x86_64":
                patch.setenv("PYTHONPATH", str(AMX), prepend=os.pathsep)
            server = until.enter_context(serve_vllm(config, log, executable=str(vllm_command())))
        yield server


load_adapter, unload_adapter = VllmServer.load_adapter, VllmServer.unload_adapter
