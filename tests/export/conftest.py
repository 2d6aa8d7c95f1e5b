"""Fixtures of several modules: a checkpoint, adapters with an ONNX graph, and what every refusal promises."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from loraover.common.command_line import run
from loraover_export.cli import cli
from loraover_export.formats.onnx.kinds import decoder

from support.builder_forks import ForkedBuilder
from support.make_checkpoint import Made, make_checkpoint, tree
from support.onnx_export import OTHER, OnnxMade, export, tiny_base, tiny_lora
from support.onnx_export import quick_builder as quick_builder
from support.refusals import Refused, only_error


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """An MPO checkpoint in fp32 on q_proj and v_proj; tests copy it before they damage it."""
    return make_checkpoint(tmp_path_factory.mktemp("made"), tokenizer=True)


@pytest.fixture(scope="session")
def onnx_made(tmp_path_factory: pytest.TempPathFactory) -> OnnxMade:
    """Tests copy it before they damage it."""
    folder = tmp_path_factory.mktemp("onnx_made")
    tiny_base(folder / "base", "Llama")
    tiny_lora(folder / "base", folder / "first")
    tiny_lora(folder / "base", folder / "second", **OTHER)
    assert export(folder / "second", folder / "graph", "--mode", "swappable", "--no-check") == 0
    return OnnxMade(folder)


@pytest.fixture
def source(onnx_made: OnnxMade, tmp_path: Path) -> Path:
    return shutil.copytree(onnx_made.folder / "first", tmp_path / "first")


@pytest.fixture
def graph(onnx_made: OnnxMade, tmp_path: Path) -> Path:
    return shutil.copytree(onnx_made.graph, tmp_path / "graph")


@pytest.fixture
def refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Refused:
    """Runs an export, and checks all that a refusal promises; `named` must be in the message."""

    def check(*words: object, named: Sequence[str] = (), output: Path | None = None) -> str:
        before = tree(tmp_path)
        capfd.readouterr()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decoder, "BuilderProcess", ForkedBuilder)
            code = run(cli, [*map(str, words), "-o", str(output or tmp_path / "out")])
        out, err = capfd.readouterr()
        assert code == 2, out + err
        assert tree(tmp_path) == before
        message = only_error(err)
        assert len(message) < 2000
        for text in named:
            assert text in message
        return message

    return check
