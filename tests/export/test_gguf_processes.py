"""Exports to GGUF in separate processes: a limit of file sizes and signals leave a complete file or none."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support.children import Child, limit_file_size
from support.gguf_export import GgufMade, export, make_gguf
from support.make_checkpoint import tree
from support.refusals import only_error

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> GgufMade:
    made = make_gguf(tmp_path_factory.mktemp("llama"), "Llama")
    assert export(made.adapter, made.folder / "expected" / "..") == 2  # imports everything that the forks need
    (made.folder / "expected").mkdir()
    assert export(made.adapter, made.folder / "expected" / "out.gguf") == 0
    return made


def in_child(made: GgufMade, output: Path, prepare: Callable[[], object] = lambda: None) -> Child:
    return Child(lambda: export(made.adapter, output), prepare=prepare)


def expected(made: GgufMade) -> bytes:
    return (made.folder / "expected" / "out.gguf").read_bytes()


def test_a_file_size_limit_leaves_nothing(made: GgufMade, tmp_path: Path) -> None:
    for size in (0, len(expected(made)) - 1):
        ended = in_child(made, tmp_path / "out.gguf", lambda size=size: limit_file_size(size)).end()  # type: ignore[misc]
        assert f"cannot write {tmp_path / 'out.gguf'}: File too large" in only_error(ended.output)
        assert tree(tmp_path) == {}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_signal_leaves_all_or_nothing(number: signal.Signals, made: GgufMade, tmp_path: Path) -> None:
    before = time.monotonic()
    assert in_child(made, tmp_path / "out.gguf").end().code == 0
    longest = time.monotonic() - before
    (tmp_path / "out.gguf").unlink()
    draw = random.Random(1)
    codes = set()
    for _ in range(5):
        child = in_child(made, tmp_path / "out.gguf")
        time.sleep(draw.uniform(0.1, 1.1) * longest)
        os.kill(child.pid, number)
        ended = child.end()
        codes.add(ended.code)
        assert ended.code in (0, 130, -signal.SIGKILL), ended.output
        assert "Traceback" not in ended.output
        if (tmp_path / "out.gguf").exists():
            assert (tmp_path / "out.gguf").read_bytes() == expected(made)
            (tmp_path / "out.gguf").unlink()
        left = [path.name for path in tmp_path.iterdir()]
        assert all(name.startswith(".out.gguf.") for name in left)
        assert len(left) <= (number == signal.SIGKILL), "an interrupt removes its draft, the next run a killed one's"
    assert codes - {0}
    assert in_child(made, tmp_path / "out.gguf").end().code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]
