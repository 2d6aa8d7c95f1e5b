"""Parity with several adapters: requests that go to them in turn, and batches that they share."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest

from loraover.checkpoint.peft_adapter import read_adapter_dir
from loraover.common.command_line import run
from loraover.reference import unfolded
from loraover_serve.cli import cli
from loraover_serve.engines.base import Sample, Timed, TokenRequest
from loraover_serve.engines.vllm import VllmEngine
from loraover_serve.judge.limits import BASE
from loraover_serve.parity import blocks
from loraover_serve.parity.answers import Reference, compare_outputs, compare_together
from loraover_serve.parity.arms import make_vanilla
from loraover_serve.parity.blocks import SeveralAdapters, adapter_of, answers_alone, measure
from loraover_serve.parity.report import ParityReport
from loraover_serve.parity.samples import CONTROL, FOLDED, MIXED, SWITCHING, VANILLA
from loraover_serve.parity.statistics import overall, results

from support.clockwork import ARMS, Clockwork
from support.make_checkpoint import Made
from support.serving import Served

pytestmark = pytest.mark.engine

REQUESTS = [TokenRequest((1, 2, 3), 4)]
NEW_TOKENS, AT_ONCE, WAVES = 4, 4, 4
PAIR = (FOLDED, "adapter2")


def words(made: Made, *more: str) -> list[str]:
    folded = made.path.parent / "folded"
    return ["parity", "--adapter", str(folded), "--engine", "torch", "--prompt-tokens", "5", "--new-tokens", "4", *more]


def test_adapters_in_turn_on_pytorch(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    also, out = made.path.parent / "folded", tmp_path / "out"
    more = make_vanilla(read_adapter_dir(also), tmp_path / "more", seed=5)
    run(cli, words(made, "--also-adapter", str(more), "--num-prompts", "40", "--output", str(out)))
    report = ParityReport.model_validate_json((out / "parity.json").read_text())
    assert {r.arm for r in report.results} == {"base", CONTROL, FOLDED, SWITCHING}
    assert len(report.runs[0].samples) == 5 * 2 * 4 * 5
    assert [(t.arm, t.adapter, t.prompts) for t in report.together] == [
        (SWITCHING, FOLDED, 4),
        (SWITCHING, "adapter2", 4),
    ]
    assert all(t.agree and t.alone_equal == 1 for t in report.together)
    assert report.adapters["adapter2"] == str(more)
    assert {(r.blocks, r.waves) for r in report.results} == {(5, 4)}
    assert "--also-adapter" in report.command
    assert "compared with each alone" in capsys.readouterr().out
    assert "Answers of several adapters" in (out / "parity.html").read_text()


def test_an_adapter_that_answers_for_another_in_turn_is_different(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folded, out = made.path.parent / "folded", tmp_path / "out"
    more = make_vanilla(read_adapter_dir(folded), tmp_path / "more", seed=5)

    def always_the_first(adapters: Sequence[str], concurrency: int, arm: str, request: int) -> str:
        return adapters[0] if arm == SWITCHING else arm

    monkeypatch.setattr(blocks, "adapter_of", always_the_first)
    assert run(cli, words(made, "--also-adapter", str(more), "--num-prompts", "40", "--output", str(out))) == 1
    report = ParityReport.model_validate_json((out / "parity.json").read_text())
    assert "answers of adapter2 in the arm switching" in report.reason
    assert [t.agree for t in report.together] == [True, False]


def test_a_noisy_machine_counts_the_requests_of_all_waves() -> None:
    engine = Clockwork({}, noise=0.3)
    _, reason = overall(results([measure(engine, REQUESTS, concurrency=1, blocks=20, seed=0, waves=4)], margin=0.05))
    assert "at 160 requests" in reason


def test_waves_and_batches_go_to_the_adapters_in_turn() -> None:
    asked: list[tuple[str, ...]] = []

    class Recording(Timed):
        name, arms = "recording", (*ARMS, "adapter2")

        def run(self, arm: str, block: int, first: int, requests: Sequence[TokenRequest]) -> list[Sample]:
            return self.together([arm] * len(requests), arm, block, first, requests)

        def together(
            self, models: Sequence[str], arm: str, block: int, first: int, requests: Sequence[TokenRequest]
        ) -> list[Sample]:
            asked.append(tuple(models))
            return [Sample(arm, block, first + i, 0.0, (1.0, 2.0), (0, 1)) for i in range(len(requests))]

    engine = Recording()
    shared = SeveralAdapters(engine, PAIR, 2, engine.together)
    assert shared.arms == (*ARMS, SWITCHING, MIXED)
    requests = REQUESTS * 4
    expected = {
        FOLDED: [(FOLDED, FOLDED)] * 2,
        SWITCHING: [(FOLDED, FOLDED), ("adapter2", "adapter2")],
        MIXED: [(FOLDED, "adapter2")] * 2,
    }
    for arm, waves in expected.items():
        asked.clear()
        samples = shared.run(arm, 3, 4, requests)
        assert asked == waves
        assert [(s.arm, s.block, s.request) for s in samples] == [(arm, 3, i) for i in range(4, 8)]
    assert MIXED not in SeveralAdapters(engine, PAIR, 1, engine.together).arms
    assert set(answers_alone(engine, PAIR, requests, range(4), 2)) == {(name, i) for name in PAIR for i in range(4)}


@pytest.mark.matrix
def test_batches_of_several_adapters_on_vllm_are_answered_by_each(served: Served) -> None:
    """Requests for two adapters in one batch get the right weights."""
    models = {BASE: served.source.location, VANILLA: "vanilla", CONTROL: "vanilla", FOLDED: "folded"}
    engine = VllmEngine(served.client, models | {"adapter2": "vanilla"}, 120)
    requests = [TokenRequest(tuple(prompt), NEW_TOKENS) for prompt in served.prompts]
    shared = SeveralAdapters(engine, PAIR, AT_ONCE, engine.run_each)
    run = measure(shared, requests, concurrency=AT_ONCE, blocks=1, seed=0, waves=WAVES, warm_up=0)
    alone = answers_alone(engine, PAIR, requests, range(WAVES * AT_ONCE), AT_ONCE)
    base = served.base().float()
    references: dict[str, Reference] = {
        FOLDED: partial(unfolded, base, read_adapter_dir(served.adapters["folded"])),
        "adapter2": partial(unfolded, base, read_adapter_dir(served.adapters["vanilla"])),
    }
    arms: dict[str, Reference] = {BASE: lambda: nullcontext(base), VANILLA: references["adapter2"], **references}
    floor = compare_outputs(run, requests, arms, FOLDED, WAVES * AT_ONCE)
    answered_by = partial(adapter_of, PAIR, AT_ONCE)
    compared = compare_together(run, requests, answered_by, alone, references, floor)
    for t in compared:
        print(f"\n{t.arm} {t.adapter}: {t.alone_equal:.0%} equal, {t.distance.logprob_rms} nats, agree {t.agree}")
    assert {(t.arm, t.adapter) for t in compared if t.agree} == {(arm, n) for arm in (SWITCHING, MIXED) for n in PAIR}
