"""Checks by a reference against the real servers of other engines, each in an environment of its own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from loraover_serve import EngineResult, verify_adapter
from loraover_serve.judge.names import NOT_APPLIED

from support.real_servers import llama_server, mlx_server
from support.verified import save_adapter

pytestmark = pytest.mark.engine

Start = Callable[[Path, Path | None, Path], AbstractContextManager[str]]
SERVERS: dict[str, tuple[Start, Callable[[Path], dict[str, Any]]]] = {
    "llama-server": (llama_server, lambda folder: {"served_name": "0", "protocol": "llama-server"}),
    "llama-server, by OpenAI's route": (llama_server, lambda folder: {"served_name": str(folder / "base.gguf")}),
    "mlx_lm.server": (mlx_server, lambda folder: {"served_name": "default_model", "base_name": str(folder / "base")}),
}
"""Each server, and the names of its models."""


def verified(name: str, base: Path, adapter: Path | None, recorded: Path, folder: Path) -> EngineResult:
    start, names = SERVERS[name]
    with start(base, adapter, folder) as url:
        (found,) = verify_adapter(references=[recorded], endpoint=url, **names(folder)).engines
    return found


@pytest.mark.parametrize("name", SERVERS)
def test_a_real_server_answers_as_trained(name: str, base: Path, adapter: Path, recorded: Path, tmp_path: Path) -> None:
    found = verified(name, base, adapter, recorded, tmp_path)
    assert found.verdict == "as trained", found.reason
    assert found.adapter is not None
    assert found.adapter.rms < 0.01 * (found.effect or 0.0)


@pytest.mark.parametrize("name", SERVERS)
def test_a_real_server_without_the_adapter_is_named(name: str, base: Path, recorded: Path, tmp_path: Path) -> None:
    found = verified(name, base, None, recorded, tmp_path)
    assert (found.verdict, found.fault) == ("differs", NOT_APPLIED), found.reason


def test_llama_server_with_several_adapters_needs_its_own_protocol(
    base: Path, adapter: Path, recorded: Path, tmp_path: Path
) -> None:
    """By OpenAI's route it answers with all of them at once, under the only name that it has."""
    with llama_server(base, adapter, tmp_path, save_adapter(tmp_path / "other", base, seed=5)) as url:
        own, openai = (
            verify_adapter(references=[recorded], endpoint=url, **SERVERS[name][1](tmp_path)).engines[0]
            for name in ("llama-server", "llama-server, by OpenAI's route")
        )
    assert own.verdict == "as trained", own.reason
    assert (openai.verdict, openai.fault) == ("differs", None), openai.reason
    assert openai.reason.endswith("llama-server answers for each alone with protocol llama-server")
