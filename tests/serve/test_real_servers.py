"""Checks by a reference against the real servers of other engines, and llama.cpp on a user's file."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import gguf
import pytest

from loraover.common.errors import EngineError, ExportError
from loraover.models.load import load_model, resolve_model
from loraover_export.formats.gguf.base import write_base
from loraover_serve import EngineResult, verify_adapter
from loraover_serve.judge.names import NOT_APPLIED
from loraover_serve.verify.by_pytorch import verify_engine

from support.gguf_export import rewrite
from support.plain_adapter import tiny_decoder
from support.real_servers import llama_server, mlx_server
from support.verified import Case, save_adapter

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
    assert openai.reason.endswith("(llama-server answers for each alone with protocol llama-server)")


def gguf_of(model: Path, output: Path) -> Path:
    return write_base(load_model(resolve_model(str(model))), output)


def verify(case: Case, folder: Path) -> EngineResult:
    return verify_engine("llamacpp", case.setting(folder), case.models)


def test_a_users_file_is_run(case: Case, tmp_path: Path) -> None:
    file = gguf_of(case.base, tmp_path / "mine.gguf")
    report = verify_adapter(case.adapter, engines=["llamacpp"], base_gguf=file, new_tokens=3)
    assert (report.verdict, report.engines[0].number_format) == ("as trained", "fp32")
    assert f"--base-gguf {file}" in report.command


def test_a_users_quantised_file_is_noise_that_has_a_name(case: Case, tmp_path: Path) -> None:
    plain, kind = gguf_of(case.base, tmp_path / "plain.gguf"), gguf.GGMLQuantizationType.Q8_0
    file = rewrite(plain, tmp_path / "q8.gguf", lambda *_: None, matrices_as=kind)
    (found,) = verify_adapter(case.adapter, engines=["llamacpp"], base_gguf=file, new_tokens=3).engines
    assert (found.verdict, found.number_format) == ("as trained", "int8"), found.reason


def test_a_file_that_is_no_model_is_refused_before_anything_runs(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("loraover_serve.verify.by_pytorch.make_models")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(EngineError, match=r"broken.gguf: not a GGUF file, or not a complete one"):
        verify_adapter(case.adapter, engines=["llamacpp"], base_gguf=tmp_path / "broken.gguf")


def test_a_base_model_that_is_not_written_asks_for_a_file(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(ExportError, match=r"of the type 'linear', which are not written here.*with base_gguf"):
        write_base(tiny_decoder("Llama", rope_parameters=rope), tmp_path / "base.gguf")
    assert not list(tmp_path.iterdir())
