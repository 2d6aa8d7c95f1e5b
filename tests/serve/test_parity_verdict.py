"""The sentence at the head of a parity report, for every verdict."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from loraover_serve.judge.limits import BASE
from loraover_serve.parity.answers import Together
from loraover_serve.parity.page import to_page
from loraover_serve.parity.report import ParityReport, verdict_of
from loraover_serve.parity.samples import CONTROL, FOLDED
from loraover_serve.parity.statistics import Result

from support.clockwork import whole_report

KEPT = Path(__file__).parents[2] / "docs" / "parity" / "smollm2-vllm.json"
BLOCKS = 10


def result(arm: str, ratio: float, verdict: Any = "equivalent", *, concurrency: int = 1, needed: int = 40) -> Result:
    ends = (ratio - 0.01, ratio + 0.02)
    place = {"engine": "vllm", "concurrency": concurrency, "arm": arm, "measure": "time per output token"}
    sizes = {"ratio": ratio, "interval": ends, "adjusted_interval": ends, "blocks": BLOCKS, "needed_blocks": needed}
    return Result.model_validate(place | sizes | {"equivalence_p": 0.01, "difference_p": 1.0, "verdict": verdict})


@pytest.fixture(scope="module")
def whole() -> ParityReport:
    return whole_report()


def sentence(whole: ParityReport, verdict: Any, *found: Result, **more: Any) -> str:
    changed = {"verdict": verdict, "results": list(found), "reason": "the server answered 500", "outputs": []} | more
    return verdict_of(whole.model_copy(update=changed)).sentence


BASE_MODEL, SAME = result(BASE, 0.5, "different"), result(CONTROL, 1.0)


def test_the_kept_report_says_it_in_a_line() -> None:
    verdict = verdict_of(ParityReport.model_validate_json(KEPT.read_text()))
    assert (verdict.tone, verdict.word) == ("good", "equivalent")
    assert verdict.sentence == (
        "Same speed as plain LoRA within 5 %: +0.5 % per token. The 95 % interval is -0.1 to +1.4. 7 of 8 answers "
        "match PyTorch exactly. Any adapter costs 1.9 x the base model here (95 % interval)."
    )


@pytest.mark.parametrize(
    ("verdict", "found", "expected"),
    [
        (
            "equivalent",
            [SAME, result(FOLDED, 1.001), result(FOLDED, 1.004, concurrency=4)],
            "Same speed as plain LoRA within 5 %: at most +0.4 % per token. The 95 % interval is -0.6 to +2.4 (vllm, 4 "
            "requests at once).",
        ),
        (
            "different",
            [SAME, result(FOLDED, 1.12, "different")],
            "Slower than plain LoRA by more than 5 %: +12.0 % per token. The 95 % interval is +11.0 to +14.0.",
        ),
        (
            "different",
            [SAME, result(FOLDED, 0.8, "different")],
            "Faster than plain LoRA by more than 5 %: -20.0 % per token. The 95 % interval is -21.0 to -18.0.",
        ),
        (
            "inconclusive",
            [SAME, result(FOLDED, 1.04, "inconclusive")],
            "Too short to tell whether it is as fast as plain LoRA within 5 %. Measured: +4.0 % per token. The 95 % "
            "interval is +3.0 to +6.0. About 80 requests would be enough if the two are equally fast.",
        ),
        (
            "inconclusive",
            [result(CONTROL, 1.2, "different"), result(FOLDED, 1.0)],
            "This machine is too noisy to compare. Two copies of one adapter differ by +20.0 % per token, beyond 5 %. "
            "The 95 % interval is +19.0 to +22.0.",
        ),
        (
            "inconclusive",
            [result(CONTROL, 1.04, "inconclusive", needed=30), result(FOLDED, 1.0)],
            "Too short to tell, or this machine is too noisy. Two copies of one adapter differ by +4.0 % per token, "
            "not surely within 5 %. The 95 % interval is +3.0 to +6.0. About 60 requests would be enough if the two "
            "are equally fast.",
        ),
        (
            "failed",
            [SAME, result(FOLDED, 1.001), BASE_MODEL],
            "The measurement failed: the server answered 500. Before that: Same speed as plain LoRA within 5 %: +0.1 % "
            "per token. The 95 % interval is -0.9 to +2.1. Any adapter costs 1.9 to 2.0 x the base model here (95 % "
            "interval).",
        ),
        ("failed", [], "The measurement failed: the server answered 500."),
    ],
)
def test_each_verdict_has_its_figures(whole: ParityReport, verdict: str, found: list[Result], expected: str) -> None:
    assert sentence(whole, verdict, *found) == expected


def test_an_interval_without_a_limit_is_not_written_in_digits(whole: ParityReport) -> None:
    """Of few blocks, some resamples have no spread."""
    wide = result(FOLDED, 1.0, "inconclusive").model_copy(update={"interval": (0.9, 1e304)})
    report = whole.model_copy(update={"verdict": "inconclusive", "results": [SAME, wide]})
    assert "The 95 % interval is -10.0 to infinity. " in verdict_of(report).sentence
    assert max(map(len, re.findall(r"\d+", to_page(report).html))) < 20


def test_what_adapters_cost_is_a_range_of_several_engines(whole: ParityReport) -> None:
    found = (SAME, result(FOLDED, 1.0), BASE_MODEL, result(BASE, 0.8, "different", concurrency=4))
    assert sentence(whole, "equivalent", *found).endswith("costs 1.2 to 2.0 x the base model here (95 % interval).")


@pytest.mark.parametrize("control", ["equivalent", "inconclusive"])
@pytest.mark.parametrize("base", [1.1, 1.0, 0.9])
def test_noise_is_not_called_a_cost(whole: ParityReport, control: str, base: float) -> None:
    """At a ratio above 1, the base model was slower than an adapter on it."""
    found = (result(CONTROL, 1.0, control), result(FOLDED, 1.4, "inconclusive"), result(BASE, base))
    assert ("Any adapter costs" in sentence(whole, "inconclusive", *found)) == ((control, base) == ("equivalent", 0.9))


def test_wrong_answers_come_before_the_speed(whole: ParityReport) -> None:
    outputs = whole.outputs[0]
    far = outputs.folded.model_copy(update={"logprob_rms": 0.5})
    wrong = outputs.model_copy(update={"folded": far, "agree": False})
    said = sentence(whole, "different", SAME, result(FOLDED, 1.0), outputs=[wrong])
    assert said.startswith(
        "7 of 8 answers match PyTorch exactly. With the folded adapter, vllm is off by 0.5 nats, with plain LoRA by "
        "0.002. Same speed as plain LoRA"
    )
    place: dict[str, Any] = {"engine": "vllm", "concurrency": 4, "arm": "mixed", "adapter": "adapter2"}
    parted = Together(**place, prompts=8, alone_equal=0.5, distance=outputs.folded, agree=False)
    said = sentence(whole, "different", SAME, result(FOLDED, 1.0), outputs=[outputs], together=[parted])
    assert said.startswith(
        "7 of 8 answers match PyTorch exactly. Beside other adapters (mixed), vllm answers wrongly for adapter2. Same"
    )


def test_an_adapter_that_is_not_applied_leaves_nothing_to_say(whole: ParityReport) -> None:
    ignored = whole.outputs[0].model_copy(update={"unapplied": [FOLDED]})
    said = sentence(whole, "failed", SAME, result(FOLDED, 1.0), outputs=[ignored])
    assert said == "The measurement failed: the server answered 500."
