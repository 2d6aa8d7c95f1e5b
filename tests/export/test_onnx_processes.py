"""ONNX exports beyond a limit of file sizes, interrupted or killed: complete or absent, and the builder ends."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support.children import Child, Ended, limit_file_size
from support.make_checkpoint import tree
from support.onnx_export import OnnxMade, export, read_report
from support.versions import TOKENIZER_FILES

pytestmark = pytest.mark.engine

WHOLE = {
    "model.onnx",
    "model.onnx.data",
    "genai_config.json",
    *TOKENIZER_FILES,
    "onnx_report.json",
    "README.md",
}
MERGED = ("--mode", "merged")


def in_child(
    source: Path, output: Path, *options: str, mode: str = "merged", prepare: Callable[[], object] = lambda: None
) -> Child:
    return Child(lambda: export(source, output, "--mode", mode, *options), prepare=prepare)


def only_error(ended: Ended) -> str:
    """The one message of a refusal."""
    assert ended.code == 2, ended.output
    assert "Traceback" not in ended.output
    (message,) = (line for line in ended.output.splitlines() if line.startswith("error: "))
    return message


def assert_whole(output: Path) -> None:
    assert {path.name for path in output.iterdir()} == WHOLE
    assert read_report(output).verdict in ("passed", "not checked")


@pytest.fixture(scope="module")
def warm(made: OnnxMade, tmp_path_factory: pytest.TempPathFactory) -> float:
    """Everything is imported; seconds that an export takes then, in a child."""
    folder = tmp_path_factory.mktemp("warm")
    assert export(made.folder / "first", folder / "imported", *MERGED) == 0
    before = time.monotonic()
    assert in_child(made.folder / "first", folder / "out").end().code == 0
    return time.monotonic() - before


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize("size", [0, 290_000], ids=["the model's copy", "the graph"])
def test_a_file_size_limit_leaves_nothing(size: int, made: OnnxMade, tmp_path: Path) -> None:
    child = in_child(made.folder / "first", tmp_path / "out", "--no-check", prepare=lambda: limit_file_size(size))
    assert "too large" in only_error(child.end())
    assert list(tmp_path.iterdir()) == []


def test_a_killed_export_leaves_nothing_or_all(made: OnnxMade, warm: float, tmp_path: Path) -> None:
    """Files that a kill leaves beside the destination are hidden, and do not hinder the next export."""
    draw, before, killed = random.Random(2), tree(made.folder), 0
    for _ in range(3):
        child = in_child(made.folder / "first", tmp_path / "out")
        time.sleep(draw.uniform(0.05, 1.1) * warm)
        os.kill(child.pid, signal.SIGKILL)
        ended = child.end()
        assert ended.code in (0, -signal.SIGKILL), ended.output
        killed += ended.code != 0
        if (tmp_path / "out").exists():
            assert_whole(tmp_path / "out")
            shutil.rmtree(tmp_path / "out")
        assert tree(made.folder) == before
        assert all(path.name.startswith(".out.") and path.name.endswith(".tmp") for path in tmp_path.iterdir())
    assert killed > 0
    assert all(map(released, tmp_path.iterdir()))
    assert export(made.folder / "first", tmp_path / "out", *MERGED) == 0
    assert_whole(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "drafts of killed exports are removed"


def released(draft: Path) -> bool:
    """Wait until no process holds a draft: a builder dies a moment after the export that started it."""
    descriptor = os.open(draft, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    finally:
        os.close(descriptor)
    return True


def ended_within(pid: int, seconds: float) -> bool:
    """Whether a process is gone by then, or a zombie that nobody has asked about."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if "State:\tZ" in Path(f"/proc/{pid}/status").read_text():
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_ctrl_c_stops_the_builder_too(made: OnnxMade, tmp_path: Path) -> None:
    """The installed command and its builder in a new process group, as in a terminal."""
    command = [str(Path(sys.executable).with_name("loraover-export")), "onnx", str(made.folder / "first")]
    arguments = ["-o", str(tmp_path / "out"), *MERGED]
    with subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while not children.read_text() and process.poll() is None:
            time.sleep(0.02)
        (builder,) = children.read_text().split()
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 130, err
    assert err.splitlines()[-1].startswith("Interrupted")
    assert "Traceback" not in out + err
    assert ended_within(int(builder), seconds=5)
    assert list(tmp_path.iterdir()) == []
