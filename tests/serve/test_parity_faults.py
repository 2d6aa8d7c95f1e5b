"""A server that fails in a parity run: the cause is named, complete blocks are kept, and nothing is left running."""

from __future__ import annotations

import json
import os
import re
import signal
import tempfile
import time
from pathlib import Path

import pytest

from loraover.common.command_line import run
from loraover_serve.cli import cli
from loraover_serve.parity.report import ParityReport
from loraover_serve.vllm import server as vllm_server

from support.children import Child, Ended
from support.make_checkpoint import Made
from support.vllm_stand_in import assert_stopped, stand_in

pytestmark = pytest.mark.process

STARTED = 4  # completions that show that a server and its adapters are up: one for each arm
BLOCK = 2 * 4
FAULTS = {
    "dies": "no answer:",
    "hangs": "timed out",
    "answers 500": "the server answered 500",
    "answers as another": "was asked, and 'another' answered",
    "stops early": "1 of 4 tokens arrived",
    "leaves out": "the server's answer cannot be read",
    "hides logprobs": "3 logprobs arrived with 4 tokens",
    "comes in one piece": "ask for longer answers",
}


@pytest.fixture(autouse=True)
def _haste(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(vllm_server, "POLL_S", 0.05)
    monkeypatch.setattr(vllm_server, "CLEAN_UP_S", 0.1)


def parity(made: Made, vllm: str, out: Path, *more: str) -> int:
    folded = made.path.parent / "folded"
    words = ["parity", "--adapter", str(folded), "--engine", "vllm", "--vllm", vllm, "--output", str(out)]
    words += ["--num-prompts", "24", "--memory", "0", "--timeout", "60", "--prompt-tokens", "5", "--new-tokens", "4"]
    return run(cli, [*words, *more])


def haste(fault: str) -> list[str]:
    """A short limit of silence for a hang; other faults do not wait for it."""
    return ["--timeout", "2"] if fault == "hangs" else []


def read(out: Path) -> ParityReport:
    assert (out / "parity.html").read_text().rstrip().endswith("</html>")
    return ParityReport.model_validate_json((out / "parity.json").read_text())


@pytest.mark.parametrize(("fault", "cause"), FAULTS.items())
def test_a_fault_after_enough_blocks_leaves_their_report(
    fault: str, cause: str, made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vllm = stand_in(tmp_path, fault, after=STARTED + 7 * BLOCK + 3)  # the first block warms up
    assert parity(made, vllm, tmp_path / "out", *haste(fault)) == 2
    assert_stopped(tmp_path)
    report = read(tmp_path / "out")
    assert report.verdict == "failed"
    assert cause in report.reason
    assert f"failed: {report.reason}" in capsys.readouterr().out
    (found,) = report.runs
    assert (found.blocks, len(found.samples), found.failure) == (6, 6 * BLOCK, report.reason)
    assert {result.blocks for result in report.results} == {6}
    assert '<p class="word">failed</p>' in (tmp_path / "out" / "parity.html").read_text()
    assert "words:" in (tmp_path / "out" / "vllm.log").read_text()


@pytest.mark.parametrize("fault", ["dies", "answers 500"])
def test_a_fault_before_any_block_leaves_no_report(
    fault: str, made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vllm = stand_in(tmp_path, fault, after=STARTED + BLOCK + 3)
    assert parity(made, vllm, tmp_path / "out") == 2
    assert_stopped(tmp_path)
    shown = capsys.readouterr()
    assert FAULTS[fault] in shown.err
    assert not (tmp_path / "out").exists()
    (kept,) = re.findall(r"kept in (\S+): vllm\.log", shown.out)
    assert "words:" in (Path(kept) / "vllm.log").read_text()


def test_blocks_too_few_for_a_test_are_kept_too(made: Made, tmp_path: Path) -> None:
    assert parity(made, stand_in(tmp_path, "dies", after=STARTED + 3 * BLOCK), tmp_path / "out") == 2
    report = read(tmp_path / "out")
    assert (report.verdict, report.results, report.outputs) == ("failed", [], [])
    assert len(report.runs[0].samples) == 2 * BLOCK


def test_what_decides_nothing_may_fail(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vllm = stand_in(tmp_path, "starts once")
    assert parity(made, vllm, tmp_path / "out", "--memory", "1", "--cross-check") in (0, 1, 3)
    assert_stopped(tmp_path)
    report = read(tmp_path / "out")
    assert report.runs[0].blocks == 12
    assert ["no such dataset" in report.notes[0], "no memory for the cache" in report.notes[1]] == [True, True]
    assert (report.outputs[0].unapplied, report.versions["vllm"]) == ([], "0.0 of a stand-in")
    assert "note: no cross-check: vllm bench serve" in capsys.readouterr().out
    logs = [(tmp_path / "out" / name).read_text() for name in ("vllm.log", "vllm-memory.log")]
    assert ["no memory" in log for log in logs] == [False, True]


def test_options_for_vllm_reach_every_server_and_the_recorded_command(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "a-key")
    more = ("--memory", "1", "--", "--max-num-seqs", "4", "--tensor-parallel-size=1")
    assert parity(made, stand_in(tmp_path, "answers"), tmp_path / "out", *more) in (0, 1, 3)
    for name in ("vllm.log", "vllm-memory.log"):
        line = next(line for line in (tmp_path / "out" / name).read_text().splitlines() if line.startswith("words: "))
        assert json.loads(line.removeprefix("words: "))[-3:] == ["--max-num-seqs", "4", "--tensor-parallel-size=1"]
    report = read(tmp_path / "out")
    assert report.command.endswith(" -- --max-num-seqs 4 --tensor-parallel-size=1")
    assert not report.notes


def interrupted(made: Made, folder: Path, after: int) -> Ended:
    """Press Ctrl-C while the server hangs, long before the limit of silence."""
    vllm = stand_in(folder, "hangs", after=after)
    child = Child(lambda: parity(made, vllm, folder / "out"))
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
    vllm = stand_in(tmp_path, "ignores adapters")
    assert parity(made, vllm, tmp_path / "out", "--num-prompts", "40", "--max-concurrency", "1,4") == 2
    assert_stopped(tmp_path)
    report = read(tmp_path / "out")
    reason = "vllm does not apply vanilla, control, folded: its answers are nearer to the base model's"
    assert (report.verdict, report.reason) == ("failed", reason)
    assert [(run.concurrency, run.blocks) for run in report.runs] == [(1, 20), (4, 5)]
    assert [outputs.concurrency for outputs in report.outputs] == [1, 4]
    assert {(t.concurrency, t.arm) for t in report.throughputs} == {
        (concurrency, arm) for concurrency in (1, 4) for arm in ("base", "vanilla", "control", "folded")
    }
    page = (tmp_path / "out" / "parity.html").read_text()
    assert "Throughput: vllm" in page
    assert "requests at once" in page
