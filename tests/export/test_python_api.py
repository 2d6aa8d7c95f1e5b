"""The library functions under the commands: silent, with the command's files, and nothing left where a check fails."""

from __future__ import annotations

import io
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
from loraover_export.onnx import genai

from support.lines import Lines
from support.make_checkpoint import Made, tree
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
