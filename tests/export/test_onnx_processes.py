"""ONNX exports beyond a limit of file sizes, interrupted or killed: nothing is left, and the builder ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.children import Child, limit_file_size
from support.onnx_export import OnnxMade, export
from support.refusals import only_error

pytestmark = pytest.mark.engine

MERGED = ("--mode", "merged")


def test_a_file_size_limit_leaves_nothing(onnx_made: OnnxMade, tmp_path: Path) -> None:
    request = (onnx_made.folder / "first", tmp_path / "out", *MERGED, "--no-check")
    ended = Child(lambda: export(*request), prepare=lambda: limit_file_size(290_000)).end()
    assert ended.code == 2, ended.output
    assert "too large" in only_error(ended.output)
    assert list(tmp_path.iterdir()) == []


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_the_builder_ends_with_the_export(number: signal.Signals, onnx_made: OnnxMade, tmp_path: Path) -> None:
    """Ctrl-C reaches the process group of a terminal, and a kill the command alone, whose end its builder sees."""
    command = [str(Path(sys.executable).with_name("loraover-export")), "onnx", str(onnx_made.folder / "first")]
    arguments = ["-o", str(tmp_path / "out"), *MERGED]
    with subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while not children.read_text() and process.poll() is None:
            time.sleep(0.02)
        (builder,) = children.read_text().split()
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        out, err = process.communicate()
    assert ended_within(int(builder), seconds=5 if number == signal.SIGINT else 60)
    left = [path.name for path in tmp_path.iterdir()]
    if number == signal.SIGKILL:
        assert process.returncode == -number
        assert all(name.startswith(".out.") and name.endswith(".tmp") for name in left)
        return
    assert process.returncode == 130, err
    assert err.splitlines()[-1].startswith("Interrupted")
    assert "Traceback" not in out + err
    assert left == []
