"""Real servers of engines, started with tiny models in environments of their own."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import pytest

from loraover.models.load import load_model, resolve_model
from loraover_export import export_gguf, export_mlx
from loraover_export.formats.gguf.base import write_base

from support.gguf_export import rewrite
from support.tiny_hub import CHARACTERS, SPECIAL
from support.verified import BASE_OPTIONS

START_S = 120.0


def python_of(variable: str, target: str) -> Path:
    """The python of another environment; skips the test if there is none."""
    path = Path(os.environ.get(variable) or Path(__file__).parents[2] / f".venv-{target}" / "bin" / "python")
    if not path.is_file():
        pytest.skip(f"{path}: no such python; `make {target}` installs it, or name one in {variable}")
    return path


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@contextmanager
def running(words: Sequence[str], port: int, path: str, log: Path, more: Mapping[str, str]) -> Iterator[str]:
    """A server during a block; yields its address once it answers requests for this path."""
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + START_S
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*words], stdin=subprocess.PIPE, stdout=output, stderr=output, env=os.environ | dict(more)
        )
        try:
            while True:
                assert process.poll() is None, log.read_text(errors="replace")[-2000:]
                assert time.monotonic() < end, log.read_text(errors="replace")[-2000:]
                try:
                    urllib.request.urlopen(url + path, timeout=5).close()
                    break
                except (urllib.error.URLError, OSError):
                    time.sleep(0.2)
            yield url
        finally:
            process.kill()
            process.wait()


@contextmanager
def llama_server(base: Path, adapter: Path | None, folder: Path, *others: Path) -> Iterator[str]:
    """llama.cpp's server with a tiny model, folder/base.gguf, and with an adapter and others if they are given."""
    python, port = python_of("LORAOVER_LLAMA_SERVER", "llama-server"), free_port()
    model = llama_base(base, folder)
    words = [str(python), str(Path(__file__).with_name("llama_server.py")), str(model), str(port)]
    for index, each in enumerate(filter(None, (adapter, *others))):
        export_gguf(each, folder / f"{index}.gguf", model=str(base))
        words.append(str(folder / f"{index}.gguf"))
    with running(words, port, "/health", folder / "log", {}) as url:
        yield url


def llama_base(base: Path, folder: Path) -> Path:
    """A tiny model as llama.cpp's server takes it, folder/base.gguf."""
    exact = write_base(load_model(resolve_model(str(base))), folder / "exact.gguf")
    return rewrite(exact, folder / "base.gguf", _with_vocabulary)


def _with_vocabulary(fields: dict[str, Any], _: object) -> None:
    """Add the texts of tokens, without which the server ends at its first answer."""
    texts = [*SPECIAL, *CHARACTERS]
    texts += [f"<{index}>" for index in range(len(texts), BASE_OPTIONS["vocab_size"])]
    for name in [name for name in fields if name.startswith("tokenizer.")]:
        del fields[name]
    numbers = {"scores": [0.0] * len(texts), "token_type": [int(gguf.TokenType.NORMAL)] * len(texts)}
    vocabulary: dict[str, Any] = {"model": "llama", "tokens": texts, **numbers}
    fields |= {f"tokenizer.ggml.{name}": value for name, value in vocabulary.items()}


@contextmanager
def mlx_server(base: Path, adapter: Path | None, folder: Path) -> Iterator[str]:
    """mlx_lm.server; it names the model with the adapter default_model, and the base model by its folder."""
    python, port, model = python_of("LORAOVER_MLX", "mlx"), free_port(), folder / "base"
    shutil.copytree(base, model)
    words = ["-m", "mlx_lm", "server", "--model", str(model), "--port", str(port), "--prompt-cache-size", "0"]
    if adapter is not None:
        lost = export_mlx(adapter, folder / "mlx", model=str(base)).lost_settings
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | dict(lost)))
        words += ["--adapter-path", str(folder / "mlx")]
    (folder / "hub").mkdir()
    with running([str(python), *words], port, "/health", folder / "log", {"HF_HUB_CACHE": str(folder / "hub")}) as url:
        yield url
