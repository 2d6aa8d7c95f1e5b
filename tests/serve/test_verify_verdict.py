"""The sentence at the head of a verification, for every verdict."""

from __future__ import annotations

import pytest

from loraover_serve.judge.estimates import Interval
from loraover_serve.verify.html import to_page, verdict_of
from loraover_serve.verify.report import EngineResult

from support.reports import LEFT_OUT, SCALED, engine_result, three_engines, verification

ALL = "100 % of the adapter is applied (99.9 to 100.1 %)"
THIRD = Interval(value=0.333, low=0.331, high=0.335)
LOST = engine_result("vllm", "differs", "a; b", off=0.14, fault="wrong scaling", suspects=[SCALED], strength=THIRD)


@pytest.mark.parametrize(
    ("result", "tone", "expected"),
    [
        (engine_result("onnx", "as trained"), "good", f"onnx: as trained. {ALL}."),
        (
            engine_result("onnx", "as trained", strength=None),
            "good",
            "onnx: as trained. Answers are off by 0.0002 nats, where noise explains 0.0003.",
        ),
        (
            engine_result("vllm", "as trained", mixed_failure="the server answered 500"),
            "good",
            f"vllm: as trained. {ALL}. Mixed batches were not compared.",
        ),
        (
            LOST,
            "bad",
            "vllm: differs. 33.3 % of the adapter is applied (33.1 to 33.5 %). Likely fault: wrong scaling.",
        ),
        (
            engine_result("vllm", "differs", off=0.14, suspects=[LEFT_OUT]),
            "bad",
            f"vllm: differs. {ALL}, and answers are off by 0.14 nats, where noise explains 0.0003. No known fault "
            "explains it.",
        ),
        (
            engine_result("torch", "inconclusive", "the adapter moves logprobs by 1e-05 nats (a; b); c"),
            "open",
            "torch: inconclusive. The adapter moves logprobs by 1e-05 nats (a; b).",
        ),
        (
            EngineResult(engine="vllm", verdict="failed", reason="the server ended with code 1.", seconds=2),
            "bad",
            "vllm: failed. The server ended with code 1.",
        ),
    ],
)
def test_each_engine_has_a_plain_line(result: EngineResult, tone: str, expected: str) -> None:
    verdict = verdict_of(verification(result))
    assert (verdict.tone, verdict.word, verdict.sentence) == (tone, result.verdict, expected)


def test_several_engines_begin_with_the_worst() -> None:
    found = verdict_of(three_engines())
    assert found.word == "differs"
    assert [line.partition(".")[0] for line in found.sentence.split("\n")] == [
        "vllm: differs",
        "llamacpp: failed",
        "onnx: as trained",
    ]


def test_the_reason_stands_below_whatever_the_number_of_engines() -> None:
    assert "<strong>vllm: differs.</strong> A. B." in to_page(verification(LOST)).html
