"""A vLLM server of vectors or classes, which has no completions to wait for."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from support.real_servers import free_port
from support.vllm_command import vllm_command
from support.vllm_loading import AMX, FEW_BLOCKS

START_S, STOP_S = 300.0, 30.0


@contextmanager
def vllm_pooling(base: Path, adapters: Mapping[str, Path], log: Path, options: Sequence[str]) -> Iterator[str]:
    """Serve a model with adapters as vectors or classes during a block; yields the address.

    Args:
        adapters: Folder of each adapter, by its name.
        options: Further options, such as --convert.
    """
    port = free_port()
    words = [str(vllm_command()), "serve", str(base), "--host", "127.0.0.1", "--port", str(port), "--runner", "pooling"]
    words += ["--enable-lora", "--max-loras", "2", "--max-lora-rank", "16", "--max-model-len", "256", *FEW_BLOCKS]
    words += ["--lora-modules", *(f"{name}={path}" for name, path in adapters.items()), *options]
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if platform.machine() == "x86_64":
        own["PYTHONPATH"] = str(AMX)
    with log.open("wb") as output:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=os.environ | own, start_new_session=True
        )
        try:
            _await(f"http://127.0.0.1:{port}/health", process, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            _stop(process)


def _await(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_S
    while True:
        assert process.poll() is None, log.read_text(errors="replace")[-3000:]
        assert time.monotonic() < end, log.read_text(errors="replace")[-3000:]
        with suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(url, timeout=5).close()
            return
        time.sleep(0.5)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server with its workers."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
