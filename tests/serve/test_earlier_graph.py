"""Verify and parity on the graph of an earlier swappable export: that graph runs, and none is built."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any, NoReturn

import click
import pytest

from loraover.common.command_line import run
from loraover.common.errors import CheckpointError, ConfigError, ExportError
from loraover_export.formats.onnx.kinds import decoder
from loraover_serve import VerifyReport, measure_parity, verify_adapter
from loraover_serve.cli import cli
from loraover_serve.judge.names import OTHER_BASE
from loraover_serve.parity.report import ParityReport
from loraover_serve.parity.samples import CONTROL, FOLDED, VANILLA

from support.onnx_export import export
from support.verified import save_adapter, save_base

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def graph(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph that was exported with another adapter, of other ranks."""
    folder = tmp_path_factory.mktemp("exports")
    return exported(save_adapter(folder / "adapter", base, r=2, rank_pattern={}), folder / "graph")


def exported(adapter: Path, output: Path) -> Path:
    assert export(adapter, output, "--mode", "swappable", "--no-check") == 0
    return output


@pytest.fixture
def no_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise AssertionError("a graph is built")

    monkeypatch.setattr(decoder, "build_decoder", refuse)


def rewritten(graph: Path, copy: Path, **changes: Any) -> Path:
    """A copy of an export whose report says something else; returns `copy`."""
    shutil.copytree(graph, copy)
    report = copy / "onnx_report.json"
    report.write_text(json.dumps(json.loads(report.read_text()) | changes))
    return copy


def test_verify_runs_the_earlier_graph(no_builder: None, adapter: Path, graph: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["verify", str(adapter), "--graph", str(graph), "--new-tokens", "3", "-o", str(out)]
    assert run(cli, words) == 0
    report = VerifyReport.model_validate_json((out / "verify.json").read_text())
    assert [(found.engine, found.verdict) for found in report.engines] == [("onnx", "as trained")]
    command = cli.get_command(click.Context(cli), "verify")
    assert command is not None
    assert command.make_context("verify", shlex.split(report.command)[3:]).params["graph"] == graph


def test_weights_of_another_base_model_are_found_in_the_graph(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = save_base(tmp_path / "other", seed=7)
    foreign = exported(save_adapter(tmp_path / "foreign", other), tmp_path / "graph")
    posing = rewritten(foreign, tmp_path / "posing", base_model=str(base))
    (found,) = verify_adapter(adapter, graph=posing, new_tokens=3).engines
    assert (found.verdict, found.fault) == ("differs", OTHER_BASE), found.reason


def test_parity_is_measured_on_the_earlier_graph(no_builder: None, adapter: Path, graph: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["parity", "--adapter", str(adapter), "--graph", str(graph), "--num-prompts", "10"]
    code = run(cli, [*words, "--prompt-tokens", "5", "--new-tokens", "4", "-o", str(out)])
    report = ParityReport.model_validate_json((out / "parity.json").read_text())
    assert code == report.exit_code
    assert code in (0, 1, 3)
    assert [found.engine for found in report.runs] == ["onnx swappable"]
    assert {sample.arm for sample in report.runs[0].samples} == {"base", VANILLA, CONTROL, FOLDED}
    (compared,) = report.outputs
    assert (compared.unapplied, compared.folded.equal, compared.vanilla.equal) == ([], 1.0, 1.0)
    assert f"--graph {graph}" in report.command


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "merged"}, "is a merged export"),
        ({"web": True}, "was exported with --web, and onnxruntime-genai cannot run such a graph"),
        ({"cache": False}, "was exported with --no-cache"),
        ({"base_model": "owner/other"}, r"is a graph of owner/other, but the adapters belong to"),
    ],
)
def test_a_graph_that_cannot_be_run_is_refused_first(
    changes: dict[str, Any], message: str, adapter: Path, graph: Path, tmp_path: Path
) -> None:
    """Before a model is loaded, and before the graph is, of which nothing but the report is there."""
    unfit = rewritten(graph, tmp_path / "unfit", **changes)
    for path in unfit.rglob("*.onnx*"):
        path.unlink()
    for serve in (verify_adapter, measure_parity):
        with pytest.raises(ExportError, match=message):
            serve(adapter, graph=unfit, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("serve", [verify_adapter, measure_parity])
def test_a_graph_needs_its_engine_and_its_report(serve: Any, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="graph: for ONNX Runtime GenAI only; add engines='onnx'"):
        serve(adapter, engines=["torch"], graph=tmp_path)
    with pytest.raises(CheckpointError, match=r"onnx_report\.json: no such file"):
        serve(adapter, graph=tmp_path)
