"""What a result says of the hardware and the memory of its run."""

from __future__ import annotations

import subprocess
import sys

import pytest

from loraover.common.provenance import hardware, peak_bytes

from support.machine import with_devices


def test_a_gpu_is_named_and_its_memory_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    with_devices(monkeypatch, cuda=1, total=12345)
    assert hardware().endswith(" threads, some GPU")
    assert peak_bytes() == 12345


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a child's peak begins with its parent's")
def test_the_memory_of_a_parent_is_not_its_childs() -> None:
    child = "from loraover.common.provenance import peak_bytes; print(peak_bytes())"
    code = (
        f"import subprocess, sys; x = bytearray(2**30); subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2**30
