"""The sentence at the head of a verification, for every verdict."""

from __future__ import annotations

import pytest

from loraover_serve.verify.html import verdict_of
from loraover_serve.verify.report import EngineResult

from support.reports import LEFT_OUT, SCALED, engine_result, three_engines, verification

PASSED = "off by 0.0002 nats, where noise explains 0.0003. The adapter moves logprobs by 0.19 nats."
SCALING = (
    "vllm does not answer as trained. It is off by 0.14 nats, where noise explains 0.0003. The likely fault is wrong "
    "scaling: the scaling is left out (times 0.333). With it, 0.0002 nats remain."
)


@pytest.mark.parametrize(
    ("result", "tone", "expected"),
    [
        (engine_result("onnx", "as trained"), "good", f"onnx answers as trained: {PASSED}"),
        (
            engine_result("vllm", "as trained").model_copy(update={"mixed_failure": "the server answered 500"}),
            "good",
            f"vllm answers as trained: {PASSED}\nvllm: mixed batches were not compared. The server answered 500.",
        ),
        (
            engine_result("vllm", "differs", off=0.14, fault="wrong scaling", suspects=[SCALED, LEFT_OUT]),
            "bad",
            SCALING,
        ),
        (
            engine_result("vllm", "differs", "off by 0.14 nats, and no known fault explains it", suspects=[LEFT_OUT]),
            "bad",
            "vllm does not answer as trained. Off by 0.14 nats, and no known fault explains it.",
        ),
        (
            engine_result("torch", "inconclusive", "the adapter moves logprobs by 1e-05 nats"),
            "open",
            "torch cannot be judged. The adapter moves logprobs by 1e-05 nats.",
        ),
        (
            EngineResult(engine="vllm", verdict="failed", reason="the server ended with code 1.", seconds=2),
            "bad",
            "vllm failed. The server ended with code 1.",
        ),
    ],
)
def test_each_verdict_has_its_figures(result: EngineResult, tone: str, expected: str) -> None:
    verdict = verdict_of(verification(result))
    assert (verdict.tone, verdict.word, verdict.sentence) == (tone, result.verdict, expected)


def test_several_engines_begin_with_the_worst() -> None:
    found = verdict_of(three_engines())
    assert found.word == "differs"
    failed = "llamacpp failed. The server ended with code 1."
    assert found.sentence.split("\n") == [SCALING, failed, f"onnx answers as trained: {PASSED}"]
    both = verdict_of(verification(engine_result("onnx", "as trained", off=1e-4), engine_result("torch", "as trained")))
    assert both.sentence == f"onnx and torch answer as trained: {PASSED.replace('by 0.0002', 'by at most 0.0002')}"
