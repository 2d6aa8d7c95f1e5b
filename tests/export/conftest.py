"""Fixtures for tests of refused and failing ONNX exports; other modules define fixtures of the same names."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from support.make_checkpoint import tree
from support.onnx_export import OTHER, OnnxMade, export, tiny_base, tiny_lora


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> OnnxMade:
    """Tests copy it before they damage it."""
    folder = tmp_path_factory.mktemp("made")
    tiny_base(folder / "base", "Llama")
    tiny_lora(folder / "base", folder / "first")
    tiny_lora(folder / "base", folder / "second", **OTHER)
    assert export(folder / "second", folder / "graph", "--mode", "swappable", "--no-check") == 0
    return OnnxMade(folder)


@pytest.fixture
def source(made: OnnxMade, tmp_path: Path) -> Path:
    return shutil.copytree(made.folder / "first", tmp_path / "first")


@pytest.fixture
def graph(made: OnnxMade, tmp_path: Path) -> Path:
    return shutil.copytree(made.graph, tmp_path / "graph")


@pytest.fixture
def refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Exports, and checks all that a refusal promises; `named` must be in the message."""

    def check(
        sources: Path | Sequence[Path], *options: str, named: Sequence[str] = (), output: Path | None = None
    ) -> str:
        before = tree(tmp_path)
        capfd.readouterr()
        code = export(sources, tmp_path / "out" if output is None else output, *options)
        out, err = capfd.readouterr()
        assert code == 2, out + err
        assert tree(tmp_path) == before
        assert "Traceback" not in out + err
        messages = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(messages) == 1, err
        assert len(messages[0]) < 2000
        for text in named:
            assert text in messages[0]
        return messages[0]

    return check
