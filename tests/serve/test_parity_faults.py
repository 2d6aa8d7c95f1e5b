"""A server that fails in a parity run: the cause is named, whole blocks are kept, and nothing is left running."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from loraover.command import run
from loraover_serve import vllm_server
from loraover_serve.cli import cli
from loraover_serve.parity.report import ParityReport

from children import Child, Ended
from make_checkpoint import Made
from vllm_stand_in import assert_stopped, stand_in

STARTED = 4  # completions that show that a server and its adapters are up: one for each arm
BLOCK = 2 * 4
FAULTS = {
    "dies": "no answer from",
    "hangs": "timed out",
    "answers 500": "the server answered 500",
    "answers 404": "the server answered 404",
    "answers as another": "the answer is of 'another'",
    "breaks off": "broke off at",
    "stops early": "1 tokens of 4 came",
    "errs within": "failed in the middle of an answer",
    "comes in one piece": "--new-tokens",
}


@pytest.fixture(autouse=True)
def _haste(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_server, "POLL_S", 0.05)
    monkeypatch.setattr(vllm_server, "CLEAN_UP_S", 0.1)


def parity(made: Made, vllm: str, out: Path, *more: str) -> int:
    folded = made.path.parent / "folded"
    words = ["parity", "--folded", str(folded), "--engine", "vllm", "--vllm", vllm, "--out", str(out)]
    words += ["--requests", "24", "--memory", "0", "--timeout", "2", "--prompt-tokens", "5", "--new-tokens", "4"]
    return run(cli, [*words, *more])


def read(out: Path) -> ParityReport:
    assert (out / "parity.html").read_text().rstrip().endswith("</html>")
    return ParityReport.model_validate_json((out / "parity.json").read_text())


@pytest.mark.parametrize(("fault", "cause"), FAULTS.items())
def test_a_fault_after_enough_blocks_leaves_their_report(
    fault: str, cause: str, made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vllm = stand_in(tmp_path, fault, after=STARTED + 7 * BLOCK + 3)  # the first block warms up
    assert parity(made, vllm, tmp_path / "out") == 2
    assert_stopped(tmp_path)
    report = read(tmp_path / "out")
    assert report.verdict == "failed"
    assert cause in report.reason
    assert f"failed: {report.reason}" in capsys.readouterr().out
    (found,) = report.runs
    assert (found.blocks, len(found.samples), found.failure) == (6, 6 * BLOCK, report.reason)
    assert {result.blocks for result in report.results} == {6}
    assert "<strong>failed</strong>" in (tmp_path / "out" / "parity.html").read_text()
    assert "words:" in (tmp_path / "out" / "vllm.log").read_text()


@pytest.mark.parametrize(("fault", "cause"), FAULTS.items())
def test_a_fault_before_any_block_leaves_no_report(
    fault: str, cause: str, made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vllm = stand_in(tmp_path, fault, after=STARTED + BLOCK + 3)
    assert parity(made, vllm, tmp_path / "out") == 2
    assert_stopped(tmp_path)
    assert cause in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_blocks_too_few_for_a_test_are_kept_too(made: Made, tmp_path: Path) -> None:
    assert parity(made, stand_in(tmp_path, "dies", after=STARTED + 3 * BLOCK), tmp_path / "out") == 2
    report = read(tmp_path / "out")
    assert (report.verdict, report.results, report.outputs) == ("failed", [], [])
    assert len(report.runs[0].samples) == 2 * BLOCK


def test_a_server_for_memory_that_does_not_start_leaves_the_times(made: Made, tmp_path: Path) -> None:
    assert parity(made, stand_in(tmp_path, "starts once"), tmp_path / "out", "--memory", "1") == 2
    assert_stopped(tmp_path)
    report = read(tmp_path / "out")
    assert report.verdict == "failed"
    assert "no memory for the cache" in report.reason
    assert report.runs[0].blocks == 12


def interrupted(made: Made, folder: Path, after: int) -> Ended:
    """Ctrl-C while the server hangs, which it may do for a minute."""
    vllm = stand_in(folder, "hangs", after=after)
    child = Child(lambda: parity(made, vllm, folder / "out", "--timeout", "60"))
    deadline = time.monotonic() + 60
    while not (folder / "failing").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGINT)
    before = time.monotonic()
    ended = child.end()
    assert time.monotonic() - before < 30
    assert_stopped(folder)
    return ended


def test_ctrl_c_in_the_middle_keeps_the_whole_blocks(made: Made, tmp_path: Path) -> None:
    ended = interrupted(made, tmp_path, STARTED + 7 * BLOCK + 3)
    assert ended.code == 2, ended.output
    report = read(tmp_path / "out")
    assert (report.verdict, report.reason, report.runs[0].blocks) == ("failed", "interrupted", 6)


def test_ctrl_c_before_any_block_leaves_no_report(made: Made, tmp_path: Path) -> None:
    ended = interrupted(made, tmp_path, STARTED + 3)
    assert ended.code == 130, ended.output
    assert not (tmp_path / "out").exists()


def test_an_engine_that_ignores_adapters_fails_the_run(made: Made, tmp_path: Path) -> None:
    vllm = stand_in(tmp_path, "answers")
    assert parity(made, vllm, tmp_path / "out", "--requests", "40", "--concurrency", "1,4") == 2
    assert_stopped(tmp_path)
    report = read(tmp_path / "out")
    assert (report.verdict, report.reason) == (
        "failed",
        "vllm answers as the base model; an adapter is not applied there",
    )
    assert [(run.concurrency, run.blocks) for run in report.runs] == [(1, 20), (4, 5)]
    assert {(t.concurrency, t.arm) for t in report.throughputs} == {
        (concurrency, arm) for concurrency in (1, 4) for arm in ("base", "vanilla", "control", "folded")
    }
    page = (tmp_path / "out" / "parity.html").read_text()
    assert "Throughput: vllm" in page
    assert "requests at once" in page
