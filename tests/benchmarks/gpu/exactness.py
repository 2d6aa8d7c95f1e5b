"""The suite's tests of exactness, on the device that $LORAOVER_DEVICE names, against oracles on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as Xml
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.table import Table

from benchmarks.clock import find_device
from benchmarks.shown import Numbers, table_of

TESTS = Path(__file__).parents[2]
FILES = {
    "train/test_decompositions.py": "contraction and application of every decomposition equal NumPy's oracles",
    "train/test_exactness.py": "training beside the optimizer equals autograd through the cores",
    "train/test_eigen.py": "decomposition eigen trains as NumPy's oracle and as SOAP",
    "export/test_check_devices.py": "a fold passes in every data type, and a wrong fold fails",
}
"""Files of tests that run on any device, and what they show."""


def measure(files: Sequence[str], chosen: str = "") -> Iterator[Table | Numbers]:
    """Run the tests, and count what passed."""
    device = find_device()
    table = table_of(f"Tests on {device.type}", "tests", "passed", "skipped", "seconds")
    numbers, is_wrong = {}, False
    for file in files:
        found = run_tests(file, chosen, device.type)
        passed = found["tests"] - found["failures"] - found["errors"] - found["skipped"]
        is_wrong |= passed == 0 or found["failures"] + found["errors"] > 0
        table.add_row(f"`{file}`: {FILES[file]}", f"{passed:.0f}", f"{found['skipped']:.0f}", f"{found['time']:.0f}")
        numbers[file] = found
    yield table
    yield {"tests": numbers}
    if is_wrong:
        raise RuntimeError("tests failed, or all were skipped; their messages stand above")


def run_tests(file: str, chosen: str, device: str) -> dict[str, float]:
    """Run one file of tests in a process, which prints what fails, and return its counts and seconds."""
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch) / "results.xml"
        words = ["-m", "pytest", "-q", "--durations=0", "-m", "not matrix", "-k", chosen, f"--junitxml={results}"]
        environment = os.environ | {"LORAOVER_DEVICE": device}
        done = subprocess.run([sys.executable, *words, file], cwd=TESTS, env=environment)
        if not results.is_file():
            raise RuntimeError(f"pytest ended with exit code {done.returncode} before it ran {file}")
        suite = next(Xml.parse(results).iter("testsuite"))
    return {name: float(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped", "time")}
