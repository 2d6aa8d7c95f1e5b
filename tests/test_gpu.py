"""`make gpu` at tiny sizes on the CPU: the measurements, what is kept of them, and their page."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import fold_check, rates
from benchmarks.gpu.__main__ import run_plan
from benchmarks.gpu.page import write_page
from benchmarks.gpu.parts import PARTS, Options
from benchmarks.gpu.run import Outcome, run_part
from benchmarks.shown import to_markdown
from benchmarks.training import LIMIT, held_bytes, load, step_table, time_steps

ROOT = Path(__file__).parents[1]


def tiny(name: str) -> Options:
    """Arguments of a measurement on the CPU."""
    found = PARTS[name].tiny
    assert found is not None
    return found


def test_what_a_card_measures_is_tried_at_tiny_sizes() -> None:
    tried = {part.module: part.tiny for part in PARTS.values() if part.tiny is not None}
    for part in PARTS.values():
        assert part.card.keys() <= tried[part.module].keys()


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAOVER_DEVICE", "cpu")


@pytest.mark.usefixtures("on_the_cpu")
def test_steps_of_a_random_model_are_beside_their_limits() -> None:
    setting = tiny("step-1b")["setting"]
    base, ids = load(setting)
    assert (base.dtype, ids.shape) == (torch.bfloat16, (1, 16))
    seconds = time_steps(base, ids, setting)
    weights = sum(parameter.nbytes for parameter in base.parameters())
    matrices = sum(4 * sum(shape) for shape in 2 * [*(m.weight.shape for m in linears(base))])
    memory = dict.fromkeys(setting.turns, 10**6) | {LIMIT: held_bytes(base, 4)}
    assert memory[LIMIT] == weights + 8 * matrices
    lines = to_markdown(step_table(seconds, memory, setting)).splitlines()
    assert [line.split(" | ")[0] for line in lines[4:8]] == ["| LoRA", "| mpo", "| eigen", f"| {LIMIT}"]
    assert all(len(found) == 2 for found in seconds.values())
    assert all(taken > 0 for found in seconds.values() for taken in found.values())


def linears(base: torch.nn.Module) -> list[torch.nn.Linear]:
    """Layers that get a LoRA: all but the output layer."""
    found = {name: module for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    return [module for name, module in found.items() if name != "lm_head"]


@pytest.mark.usefixtures("on_the_cpu")
def test_rates_and_folds_are_measured_in_this_process() -> None:
    _, numbers = rates.measure(**tiny("rates"))
    assert isinstance(numbers, dict)
    assert all(rate > 0 for rate in numbers["rates"].values())
    _, numbers = fold_check.measure(**tiny("fold-8b"))
    assert isinstance(numbers, dict)
    assert [found["verdict"] for found in numbers["fold_check"].values()] == ["passed", "passed"]


def test_a_failure_keeps_the_tables_that_came_before_it(tmp_path: Path) -> None:
    page = tmp_path / "gpu.md"
    outcome = Outcome(3.4, {"parts": ["| passed |"]}, "Its process ended with exit code 1.\n\nlast line")
    write_page(page, "somewhere", {"exactness": outcome})
    quoted = "    Its process ended with exit code 1.\n\n    last line\n"
    assert page.read_text().endswith(f"## Exactness\n\n| passed |\n\n**Failed** after 3 s.\n\n{quoted}")
    assert json.loads(page.with_suffix(".json").read_text())["origin"] == "somewhere"


@pytest.mark.process
def test_a_failure_is_told_and_what_was_measured_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAOVER_DEVICE", "cpu")
    monkeypatch.setenv("LORAOVER_VLLM", str(tmp_path / "nowhere"))
    page, records = tmp_path / "gpu.md", tmp_path / "records"
    assert run_plan("tiny", ("rates", "vllm"), page, records, time.time() + 300) == ["vllm"]
    text = page.read_text()
    assert "| copy from the host's memory | " in text
    assert "**Failed** after" in text
    assert "nowhere: no such command" in text
    assert sorted(path.name for path in records.iterdir()) == ["rates.json", "rates.log", "vllm.log"]
    content = json.loads(page.with_suffix(".json").read_text())["measurements"]
    assert all(rate > 0 for rate in content["rates"]["found"]["numbers"]["rates"].values())

    written = (records / "rates.json").stat().st_mtime_ns
    assert run_plan("tiny", ("rates",), page, records, time.time()) == []  # no time is left, and none is needed
    assert (records / "rates.json").stat().st_mtime_ns == written
    assert run_plan("tiny", ("vllm",), page, records, time.time()) == ["vllm"]
    assert "It was not begun" in page.read_text()
    assert "| copy from the host's memory | " in page.read_text()


@pytest.mark.process
def test_a_measurement_that_takes_too_long_is_ended_and_one_of_another_commit_is_taken_again(tmp_path: Path) -> None:
    (tmp_path / "rates.json").write_text(json.dumps({"seconds": 1.0, "place": {"commit": "old"}}))
    began = time.monotonic()
    part = replace(PARTS["rates"], limit_s=0.05)
    seconds, found, reason = run_part("rates", "tiny", part, tmp_path, {"commit": "new"}, math.inf)
    assert 0.05 <= seconds < time.monotonic() - began + 0.1 < 10
    assert not found
    assert "Its process was ended after 0 s" in reason


@pytest.mark.process
def test_make_gpu_begins_its_time_before_it_installs() -> None:
    done = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", "gpu", "GPU=--part rates"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    last = done.stdout.splitlines()[-1]
    assert last.endswith("--part rates")
    assert abs(float(last.split("--since ")[1].split()[0]) - time.time()) < 60
    done = subprocess.run(["make", "--dry-run", "-B", "vllm-gpu"], cwd=ROOT, capture_output=True, text=True)
    assert "pip install --quiet --progress-bar off --no-compile vllm==" in done.stdout


@pytest.mark.timeout(1500)
@pytest.mark.matrix
def test_every_measurement_of_a_card_ends_well_on_the_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--plan", "tiny", "--page", str(tmp_path / "gpu.md")]
    done = subprocess.run(
        [*command, "--records", str(tmp_path / "records"), "--minutes", "24"],
        cwd=ROOT / "tests",
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Failed" not in (tmp_path / "gpu.md").read_text()
