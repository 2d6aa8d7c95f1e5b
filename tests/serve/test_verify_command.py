"""`loraover verify` and `verify_adapter`: output, exit codes, and requests that cannot be carried out."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import click
import pytest

from loraover.checkpoint.source import read_source
from loraover.common.command_line import run
from loraover.common.errors import CheckpointError, ConfigError, EngineError, ExportError, OutputError
from loraover.models.load import resolve_model
from loraover_serve import VerifyReport, verify_adapter
from loraover_serve.cli import cli
from loraover_serve.comparison.adapters import check_task
from loraover_serve.engines import ENGINES, engine_class
from loraover_serve.engines.mlx import MlxEngine

from support.openai_server import openai_server
from support.refusals import only_error
from support.verified import FAULTS, Served, plant, save_adapter, save_base

BRIEF: dict[str, Any] = {"new_tokens": 3}


def verify(*words: str | Path) -> int:
    return run(cli, ["verify", *map(str, words), "--new-tokens", "3"])


def test_a_verification_is_shown_and_written(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(adapter, "--engine", "torch", "-o", tmp_path / "out") == 0
    shown = capsys.readouterr()
    assert re.search(r"\ntorch: as trained\. 100 % of the adapter is applied \(.*\), and nothing else", shown.out)
    table = shown.out.partition("torch: ")[0].splitlines()
    assert all(len(line) <= 80 for line in table if not line.startswith("loading the base model from folder "))
    assert shown.out.rstrip().endswith(f"wrote {tmp_path / 'out'}")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["figures", "verify.html", "verify.json"]
    report = VerifyReport.model_validate_json((tmp_path / "out" / "verify.json").read_text())
    assert (report.verdict, report.reference, report.prompts, report.exit_code) == ("as trained", "PEFT", 8, 0)
    assert report.passed
    assert "as trained" in (tmp_path / "out" / "verify.html").read_text()
    words = shlex.split(report.command)
    command = cli.get_command(click.Context(cli), "verify")
    assert command is not None
    assert command.make_context("verify", words[3:]).params["output"] == tmp_path / "out"


def test_the_worst_of_several_engines_counts(base: Path, adapter: Path, tmp_path: Path, capsys: Any) -> None:
    wrong = plant(FAULTS["not loaded"], adapter, tmp_path / "wrong")
    served = Served(base, {str(base): None, "shop": wrong})
    with openai_server(served) as server:
        words = ("--engine", "torch", "--endpoint", server.url, "--served-name", "shop")
        assert verify(adapter, *words, "-o", tmp_path / "out") == 1
    shown = capsys.readouterr().out
    assert "torch: as trained" in shown
    assert re.search(
        r"\nendpoint: differs\. Served as base: .* % of the adapter is applied \(.*\), where .* is right\.", shown
    )
    report = VerifyReport.model_validate_json((tmp_path / "out" / "verify.json").read_text())
    assert [(r.verdict, r.fault) for r in report.engines] == [("as trained", None), ("differs", "served as base")]
    assert "Suspected faults: endpoint" in (tmp_path / "out" / "verify.html").read_text()


def test_known_faults_of_a_servers_release_are_named(
    base: Path, adapter: Path, recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = {"data": [{"id": name, "owned_by": "vllm"} for name in (str(base), "shop")]}
    pages = {"/v1/models": lambda: json.dumps(listed), "/version": lambda: '{"version": "0.32.0+cpu"}'}
    with openai_server(Served(base, {str(base): None, "shop": adapter}), pages=pages) as server:
        words = ("--endpoint", server.url, "--served-name", "shop")
        assert verify(adapter, *words) == run(cli, ["verify", "--reference", str(recorded), *words]) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if "known faults of vLLM 0.32.0+cpu: " in line]
    assert len(notes) == 2, "by PyTorch and by the reference"
    assert all("stale prefix cache under one path; " in note and "prefix cache by name" not in note for note in notes)


def test_prompts_that_are_cut_are_counted(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The train leaves at nine.\n" + "the train leaves " * 60 + "\n")
    assert verify(adapter, "--engine", "torch", "--prompts", prompts, "-o", tmp_path / "out") == 0
    assert "prompts that were cut to their first 125 tokens: 1" in capsys.readouterr().out
    report = VerifyReport.model_validate_json((tmp_path / "out" / "verify.json").read_text())
    assert report.prompt_source == "2 of the prompts of prompts.txt, 1 of them cut to their first 125 tokens"


def test_a_failure_is_kept_beside_the_others(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraover.client.endpoint.PAUSES_S", ())
    with openai_server(lambda body: 500) as server:
        address: dict[str, Any] = {"endpoint": server.url, "served_name": "shop"}
        report = verify_adapter(adapter, engines=["torch"], **address, **BRIEF)
        assert [result.verdict for result in report.engines] == ["as trained", "failed"]
        assert report.exit_code == 2
        with pytest.raises(EngineError, match="the server answered 500"):
            verify_adapter(adapter, **address, **BRIEF)


@pytest.mark.process
def test_the_log_of_an_engine_that_failed_is_beside_the_report(
    here: type[MlxEngine], adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert verify(adapter, "--engine", "mlx", "-o", out) == 2
    assert f"mlx: ModuleNotFoundError: No module named 'mlx' (log: {out / 'mlx.log'})" in capsys.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == ["mlx.log", "verify.html", "verify.json"]
    report = VerifyReport.model_validate_json((out / "verify.json").read_text())
    assert (report.verdict, report.engines[0].verdict) == ("failed", "failed")
    assert "ModuleNotFoundError" in (out / "verify.html").read_text()


@pytest.mark.process
def test_the_log_is_kept_without_an_output(
    here: type[MlxEngine], adapter: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    report = verify_adapter(adapter, engines=["torch", "mlx"], **BRIEF)
    (kept,) = tmp_path.glob("loraover-verify-kept-*/mlx.log")
    assert [result.verdict for result in report.engines] == ["as trained", "failed"]
    assert report.engines[1].reason.endswith(f"(log: {kept})")
    assert list(tmp_path.iterdir()) == [kept.parent]


def test_a_failure_without_a_log_leaves_nothing(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", base, modules_to_save=["norm"])
    with pytest.raises(ExportError, match="trained in full"):
        verify_adapter(adapter, engines=["llamacpp"], output=tmp_path / "out", **BRIEF)
    assert not (tmp_path / "out").exists()


def test_an_adapter_without_effect_is_inconclusive(base: Path, adapter: Path, tmp_path: Path) -> None:
    idle = plant(FAULTS["not loaded"], adapter, tmp_path / "idle")
    assert verify(idle, "--engine", "torch") == 3


@pytest.mark.parametrize(
    ("lora", "kind"),
    [
        ({"modules_to_save": ["norm"]}, "fully trained parameters"),
        ({"target_modules": ["embed_tokens", "lm_head", "q_proj"]}, "embeddings"),
        ({"target_modules": ["q_proj"], "use_rslora": False}, "one kind of module"),
    ],
)
def test_every_kind_of_lora_is_verified_and_nothing_printed(
    lora: dict[str, Any], kind: str, base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    adapter = save_adapter(tmp_path / "adapter", base, **lora)
    assert verify_adapter(adapter, engines=["torch"], **BRIEF).verdict == "as trained", kind
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_that_is_not_installed_says_how_to_install_it(
    name: str, adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine_class(name), "lacking", classmethod(lambda cls, request: "pip install it"))
    assert verify(adapter, "--engine", name) == 2
    assert f"--engine {name} is not installed here; install it: pip install it." in only_error(capsys.readouterr().err)


def test_a_missing_vllm_is_found(adapter: Path) -> None:
    with pytest.raises(EngineError, match=r"pip install vllm.*found no /nowhere/vllm"):
        verify_adapter(adapter, engines=["vllm"], vllm="/nowhere/vllm")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"engines": ["tgi"]}, "engines is 'tgi', expected one of vllm, onnx, llamacpp"),
        ({"endpoint": "http://localhost:1"}, "endpoint needs served_name, which is missing"),
        ({"served_name": "shop"}, "served_name needs endpoint, which is missing"),
        ({"endpoint": "http://localhost:1", "served_name": ["a", "b"]}, "served_name: 2, expected one for the adapter"),
        ({"engines": ["torch"], "options": ["--dtype"]}, "options: for vLLM only; add engines='vllm'"),
        ({"engines": ["onnx"], "base_gguf": "base.gguf"}, "base_gguf: for llama.cpp only; add engines='llamacpp'"),
        ({"engines": ["vllm"], "options": ["--port=1"]}, "--port cannot be given to vLLM here: verify sets it"),
        ({"device": "gpu"}, "device is 'gpu', expected one of auto, cpu"),
    ],
)
def test_arguments_are_checked_first(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        verify_adapter("no such folder", **arguments)


def test_a_report_that_cannot_be_written_is_shown_and_kept(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill_the_disk(report: VerifyReport) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("loraover_serve.verify.show.to_page", fill_the_disk)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert verify(adapter, "--engine", "torch", "--json", "-o", tmp_path / "out") == 2
    shown = capsys.readouterr()
    assert "No space left" in shown.err
    (kept,) = tmp_path.glob("loraover-verify-kept-*")
    assert f"The report is kept in {kept}." in " ".join(shown.err.split())
    assert json.loads(shown.out) == json.loads((kept / "verify.json").read_text())
    assert list(tmp_path.iterdir()) == [kept]


def test_other_tasks_are_refused_with_what_to_use(adapter: Path, base: Path, tmp_path: Path) -> None:
    classifier = shutil.copytree(adapter, tmp_path / "classifier")
    config = json.loads((classifier / "adapter_config.json").read_text()) | {"task_type": "SEQ_CLS"}
    (classifier / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"'SEQ_CLS' is not a causal .*`loraover export onnx --mode merged`"):
        check_task(read_source(classifier), resolve_model(str(base)), "parity")
    (classifier / "adapter_config.json").write_text(json.dumps(config | {"task_type": "QUESTION_ANS"}))
    with pytest.raises(ConfigError, match=r"'QUESTION_ANS' is not a causal .* No export of ours takes such a model"):
        verify_adapter(classifier, engines=["torch"])


def test_adapters_that_fit_no_module_are_refused(adapter: Path, base: Path, tmp_path: Path) -> None:
    other = save_base(tmp_path / "other")
    (other / "config.json").write_text((base / "config.json").read_text().replace('"head_dim": 32', '"head_dim": 16'))
    with pytest.raises(CheckpointError, match="Name that model with model"):
        verify_adapter(adapter, engines=["torch"], model=other)


def test_a_bias_of_a_lora_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", base, lora_bias=True)
    with pytest.raises(ExportError, match="train with lora_bias=False"):
        verify_adapter(adapter, engines=["torch"])


def test_the_prompts_and_answers_must_fit_the_model(adapter: Path) -> None:
    with pytest.raises(ConfigError, match=r"new_tokens is 128, and .* takes 128 tokens"):
        verify_adapter(adapter, engines=["torch"], new_tokens=128)


def test_an_output_that_exists_is_refused_before_anything_runs(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        verify_adapter(adapter, engines=["torch"], output=tmp_path)
    asked: dict[str, Any] = {"references": [tmp_path / "absent"], "endpoint": "http://localhost:9"}
    for name, path in (("output", tmp_path), ("junit", tmp_path / "absent" / "checked.xml")):
        with pytest.raises(OutputError):
            verify_adapter(**(asked | {name: path}))
