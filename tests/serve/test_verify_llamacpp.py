"""Verification of llama.cpp on GGUF files of users."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

from loraover.common.errors import EngineError, ExportError
from loraover.models.load import load_model, resolve_model
from loraover_export.formats.gguf.base import write_base
from loraover_serve import EngineResult, verify_adapter
from loraover_serve.verify.by_pytorch import verify_engine

from support.gguf_export import rewrite
from support.plain_adapter import tiny_decoder
from support.verified import Case

pytestmark = pytest.mark.engine


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
