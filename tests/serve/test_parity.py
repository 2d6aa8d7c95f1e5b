"""The parity benchmark: its design, its judgement of made-up samples, its page, and a run on PyTorch."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraover.command import run
from loraover.errors import EngineError
from loraover_export.cli import cli as export_cli
from loraover_serve.cli import cli
from loraover_serve.parity.analysis import CONTROL, FOLDED, VANILLA, log_ratios, overall, results, throughputs
from loraover_serve.parity.design import block_orders
from loraover_serve.parity.engines.base import Engine
from loraover_serve.parity.html import render
from loraover_serve.parity.measure import Run, measure
from loraover_serve.parity.report import ParityReport
from loraover_serve.parity.sample import Sample
from loraover_serve.parity.workload import Request

from make_checkpoint import Made, make_checkpoint

ARMS = ("base", VANILLA, CONTROL, FOLDED)
REQUESTS = [Request((1, 2, 3), 4)]


class Clockwork(Engine):
    """Answers on a made-up clock that drifts; each arm takes its own share longer."""

    name = "clockwork"

    def __init__(self, slower: dict[str, float], *, noise: float = 0.0, drift: float = 0.0, dies_at: int = -1) -> None:
        self.arms = ARMS
        self._slower, self._noise, self._drift, self._dies_at = slower, noise, drift, dies_at
        self._draw, self._calls = random.Random(0), 0

    def run(self, arm: str, block: int, first: int, requests: Sequence[Request]) -> list[Sample]:
        if block == self._dies_at:
            raise EngineError("the server answered 500")
        self._calls += 1
        samples = []
        for i, request in enumerate(requests):
            log = self._slower.get(arm, 0.0) + self._drift * self._calls + self._draw.gauss(0, self._noise)
            times = tuple(math.exp(log) * (k + 1) for k in range(request.new_tokens))
            samples.append(Sample(arm, block, first + i, 0.0, times, tuple(range(request.new_tokens))))
        return samples


def judged(engine: Engine, blocks: int = 20) -> tuple[str, str]:
    return overall(results([measure(engine, REQUESTS, concurrency=1, blocks=blocks, seed=0)], margin=0.05))


@given(st.integers(1, 6), st.integers(1, 20), st.integers(0, 99))
def test_every_block_runs_every_arm_forth_and_back(arms: int, blocks: int, seed: int) -> None:
    names = [f"arm {i}" for i in range(arms)]
    orders = block_orders(names, blocks, seed)
    assert len(orders) == blocks
    for order in orders:
        assert sorted(order) == sorted(names * 2)
        assert order == order[::-1]
    assert orders == block_orders(names, blocks, seed)


def test_a_steady_drift_is_no_difference() -> None:
    run = measure(Clockwork({}, drift=0.01), REQUESTS, concurrency=1, blocks=9, seed=0)
    assert log_ratios(run, FOLDED, lambda sample: sample.end_to_end_s) == pytest.approx([0.0] * 9, abs=1e-12)


def test_equal_arms_are_equivalent() -> None:
    assert judged(Clockwork({}, noise=0.02))[0] == "equivalent"


def test_a_slower_arm_is_different_and_its_size_is_covered() -> None:
    engine = Clockwork({FOLDED: math.log(1.12)}, noise=0.02)
    verdict, reason = judged(engine)
    assert verdict == "different"
    assert reason.startswith("by +1")
    found = results([measure(engine, REQUESTS, concurrency=1, blocks=20, seed=1)], margin=0.05)
    assert all(r.interval[0] < 1.12 < r.interval[1] for r in found if r.arm == FOLDED)


def test_a_difference_between_copies_makes_equality_inconclusive() -> None:
    verdict, reason = judged(Clockwork({CONTROL: 0.04}, noise=0.02))
    assert verdict == "inconclusive"
    assert "too noisy at 40 requests" in reason


def test_a_noisy_machine_says_how_many_blocks_would_do() -> None:
    verdict, reason = judged(Clockwork({}, noise=0.3))
    assert verdict == "inconclusive"
    assert int(reason.split(";")[1].split()[0]) > 40


def test_what_was_measured_before_a_failure_is_kept() -> None:
    run = measure(Clockwork({}, dies_at=7), REQUESTS, concurrency=3, blocks=20, seed=0)
    assert (run.blocks, run.failure) == (6, "the server answered 500")  # one block warms up
    assert len(run.samples) == 6 * 2 * len(ARMS) * 3
    assert {(s.block, s.arm) for s in run.samples} == {(b, arm) for b in range(1, 7) for arm in ARMS}


def test_throughput_counts_the_tokens_of_a_wave() -> None:
    sample = Sample(VANILLA, 1, 0, 1.0, (2.0, 3.0), (5, 6))
    late = Sample(VANILLA, 1, 1, 1.5, (4.0, 5.0), (5, 6))
    (found,) = throughputs([Run("clockwork", 2, 1, (sample, late))])
    assert found.tokens_per_second == pytest.approx(4 / (5.0 - 1.0))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A tiny Llama with a tokenizer, a checkpoint and its fold."""
    folder = tmp_path_factory.mktemp("parity")
    made = make_checkpoint(folder, tokenizer=True)
    assert run(export_cli, ["fold", str(made.path), "-o", str(folder / "folded")]) == 0
    return made


def words(made: Made, *more: str) -> list[str]:
    folded = made.path.parent / "folded"
    return ["parity", "--folded", str(folded), "--engine", "torch", "--prompt-tokens", "5", "--new-tokens", "4", *more]


def test_a_run_on_pytorch(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    code = run(cli, words(made, "--checkpoint", str(made.path), "--requests", "10", "--out", str(out)))
    report = ParityReport.model_validate_json((out / "parity.json").read_text())
    assert code == report.exit_code
    assert report.verdict in ("equivalent", "different", "inconclusive")
    assert {r.arm for r in report.results} == {"base", CONTROL, FOLDED, "unfolded"}
    (torch_run,) = report.runs
    assert len(torch_run.samples) == 5 * 2 * 5
    (outputs,) = report.outputs
    assert (outputs.folded.equal, outputs.controls_equal, outputs.repeats_equal) == (1.0, 1.0, 1.0)
    assert outputs.folded.logprob_rms is not None
    assert outputs.folded.logprob_rms < 1e-5
    assert outputs.agree
    assert report.verdict in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--requests", "9"], "--requests 10 or more"),
        (["--requests", "100", "--concurrency", "1,16"], "--requests 160 or more"),
        (["--concurrency", "0"], "no list of positive numbers"),
        (["--workload", "file"], "go together"),
        (["--vanilla", "nowhere"], "no such folder"),
    ],
)
def test_requests_that_cannot_be_used(
    more: list[str], message: str, made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(cli, words(made, *more)) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_adapters_of_other_ranks_are_refused(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = make_checkpoint(tmp_path, r=2)
    assert run(cli, words(made, "--vanilla", str(other.path))) == 2
    assert "--allow-unequal" in capsys.readouterr().err


def test_text_from_elsewhere_is_escaped_on_the_page(made: Made, tmp_path: Path) -> None:
    run(cli, words(made, "--requests", "10", "--out", str(tmp_path / "out")))
    content = json.loads((tmp_path / "out" / "parity.json").read_text())
    hostile = "<script>alert(1)</script>"
    content |= {"base_model": hostile, "command": hostile, "reason": hostile}
    content["results"][0]["engine"] = content["runs"][0]["engine"] = hostile
    page = render(ParityReport.model_validate_json(json.dumps(content)))
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )  # names of XML vocabularies, which no browser fetches
