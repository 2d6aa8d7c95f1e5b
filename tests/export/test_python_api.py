"""The library functions under the commands: silent, with the command's files, and nothing left where a check fails."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from loraover.common.command_line import quiet_libraries, run
from loraover.reporting.reporter import ConsoleReporter
from loraover_export import (
    FoldCertificate,
    OnnxReport,
    VllmReport,
    export_onnx,
    export_vllm,
    fold_checkpoint,
)
from loraover_export.cli import cli
from loraover_export.numerics import rounded_adapter
from loraover_export.numerics.rounding import round_tensor
from loraover_export.onnx import genai, swappable

from support.lines import Lines
from support.make_checkpoint import Made, edit_json, tree
from support.onnx_export import ForkedBuilder, llama_checkpoint

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A checkpoint that all three functions take; tests read it only."""
    return llama_checkpoint(tmp_path_factory.mktemp("made"))


@pytest.fixture(autouse=True)
def quick_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    """The builder of decoder graphs runs in a fork, which spares it its imports."""
    monkeypatch.setattr(genai, "BuilderProcess", ForkedBuilder)


CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any], tuple[str, ...], type]] = {
    "fold": (fold_checkpoint, {"dtype": "bfloat16"}, ("--dtype", "bf16"), FoldCertificate),
    "vllm": (export_vllm, {"dtype": "bfloat16", "name": "mine"}, ("--name", "mine"), VllmReport),
    "onnx": (
        export_onnx,
        {"mode": "swappable", "precision": "float16", "check": False},
        ("--mode", "swappable", "--precision", "fp16", "--no-check"),
        OnnxReport,
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_function_writes_what_its_command_writes(
    name: str, made: Made, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Byte for byte, model card included; str paths and PyTorch's names of data types are taken."""
    quiet_libraries()
    function, arguments, options, report = CALLS[name]
    out = tmp_path / "out"
    found = function(str(made.path), str(out), **arguments)
    assert capfd.readouterr() == ("", "")
    assert type(found) is report
    written = tree(out)
    assert run(cli, [name, str(made.path), "-o", str(out), *options, "--force"]) == 0
    replaced = tree(out)
    if name == "vllm":  # whose report and card tell that an adapter was replaced
        for file in ("preflight.json", "README.md"):
            del written[file], replaced[file]
    assert written == replaced


def test_a_report_is_what_the_output_holds(made: Made, tmp_path: Path) -> None:
    folded = fold_checkpoint(made.path, tmp_path / "fold")
    assert folded == FoldCertificate.model_validate_json((tmp_path / "fold" / "fold_certificate.json").read_bytes())
    assert folded.passed
    served = export_vllm(tmp_path / "fold", tmp_path / "vllm")
    assert served.passed
    assert served.certificate is not None
    assert served.certificate.model_dump_json(indent=1) + "\n" == (tmp_path / "vllm/vllm_certificate.json").read_text()
    assert served.preflight.model_dump_json(indent=1) + "\n" == (tmp_path / "vllm" / "preflight.json").read_text()
    assert str(tmp_path / "vllm") in str(served.serve)
    assert str(tmp_path / "vllm") in str(served.load)
    exported = export_onnx([str(tmp_path / "fold")], tmp_path / "onnx", mode="swappable", names=["mine"], check=False)
    assert exported == OnnxReport.model_validate_json((tmp_path / "onnx" / "onnx_report.json").read_bytes())
    assert (exported.verdict, exported.passed) == ("not checked", False)
    assert (tmp_path / "onnx" / "mine.onnx_adapter").is_file()


def test_an_export_that_fails_is_a_verdict_and_leaves_nothing(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (rounded_adapter, swappable):
        monkeypatch.setattr(module, "round_tensor", lambda *arguments: 2 * round_tensor(*arguments))
    assert fold_checkpoint(made.path, tmp_path / "out").verdict == "failed"
    found = export_vllm(made.path, tmp_path / "out")
    assert (found.passed, found.preflight.passed, found.serve, found.load) == (False, True, None, None)
    assert found.certificate is not None
    assert found.certificate.verdict == "failed"
    assert export_onnx(made.path, tmp_path / "out", mode="swappable", check=False).verdict == "failed"
    assert list(tmp_path.iterdir()) == []


def test_a_pre_flight_that_fails_is_a_report_without_a_certificate(made: Made, tmp_path: Path) -> None:
    fold_checkpoint(made.path, tmp_path / "folded")
    edit_json(tmp_path / "folded" / "adapter_config.json", lambda config: config.update(bias="all"))
    found = export_vllm(tmp_path / "folded", tmp_path / "out")
    assert (found.passed, found.certificate, found.serve, found.load) == (False, None, None, None)
    assert found.preflight.rules["bias"] == "error"
    assert not (tmp_path / "out").exists()


def test_a_reporter_hears_what_is_done(made: Made, tmp_path: Path) -> None:
    heard = Lines()
    fold_checkpoint(made.path, tmp_path / "fold", check_error=True, device="cpu", report=heard)
    assert heard.lines[0].startswith("the check of the outputs needs about ")
    assert heard.lines[1] == f"loading the base model from folder {made.base} to cpu, fp32"
    export_onnx(made.path, tmp_path / "onnx", mode="swappable", check=False, report=heard)
    assert any(line.startswith("building the fp32 graph of LlamaForCausalLM") for line in heard.lines)


def test_names_in_files_cannot_control_the_terminal() -> None:
    shown = io.StringIO()
    ConsoleReporter(Console(file=shown)).line("loading [red]a\x1b[31m\rb\nnext")
    assert shown.getvalue() == "loading [red]a\\x1b[31m\\rb\nnext\n"


def test_functions_are_silent_in_a_process_of_their_own(made: Made, tmp_path: Path) -> None:
    """Progress bars and warnings of other libraries are the caller's to silence, as each command does."""
    code = (
        "import sys\n"
        "from loraover.common.command_line import quiet_libraries\n"
        "from loraover_export import export_vllm, fold_checkpoint\n"
        "source, out = sys.argv[1:]\n"
        "quiet_libraries()\n"
        "assert fold_checkpoint(source, out + '/fold', check_error=True).passed\n"
        "assert export_vllm(source, out + '/vllm').passed\n"
    )
    command = [sys.executable, "-c", code, str(made.path), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
