"""The parity benchmark without an engine: its design, its requests, and its judgement of made-up and kept samples."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from loraover.common.errors import DataError
from loraover_serve.engines.base import Sample, Timed, TokenRequest
from loraover_serve.parity.answers import Distance, agrees, is_base, is_changed
from loraover_serve.parity.blocks import block_orders, measure
from loraover_serve.parity.report import ParityReport
from loraover_serve.parity.samples import CONTROL, FOLDED, VANILLA, Measurement, make_requests
from loraover_serve.parity.servers import mean_interval
from loraover_serve.parity.statistics import latencies, log_ratios, overall, results, throughputs

from support.clockwork import ARMS, Clockwork
from support.tiny_hub import tiny_tokenizer

REQUESTS = [TokenRequest((1, 2, 3), 4)]
KEPT = Path(__file__).resolve().parents[2] / "docs" / "parity"
NEAR = Distance(
    reference="", equal=1.0, largest_gap=0.0, logprob_rms=0.01, logprob_error=0.001, logprob_largest=0.05, answers=[]
)


def judged(engine: Timed, blocks: int = 20) -> tuple[str, str]:
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


@pytest.mark.parametrize("folded", [0.0, 0.3])
def test_a_difference_between_copies_makes_every_other_inconclusive(folded: float) -> None:
    verdict, reason = judged(Clockwork({CONTROL: 0.04, FOLDED: folded}, noise=0.02))
    assert verdict == "inconclusive"
    assert "too noisy at 40 requests" in reason


@pytest.mark.parametrize("slower", [{CONTROL: 0.09, FOLDED: 0.09}, {VANILLA: 0.09}])
def test_a_large_difference_between_copies_is_named(slower: dict[str, float]) -> None:
    verdict, reason = judged(Clockwork(slower, noise=0.02))
    assert verdict == "inconclusive"
    assert reason.startswith(f"two copies of one adapter differ by {'-' if VANILLA in slower else '+'}")


def test_a_noisy_machine_says_how_many_blocks_would_do() -> None:
    verdict, reason = judged(Clockwork({}, noise=0.3))
    assert verdict == "inconclusive"
    found = re.search(r"about (\d+) requests would be enough if the two are equally fast", reason)
    assert found is not None
    assert int(found[1]) > 40


def test_a_ratio_at_the_margin_asks_for_no_fewer_requests_than_it_had() -> None:
    verdict, reason = judged(Clockwork({FOLDED: 0.047}, noise=0.02), blocks=100)
    assert verdict == "inconclusive"
    assert reason.endswith("at 200 requests; a ratio lies too near the margin to decide")


def test_what_was_measured_before_a_failure_is_kept() -> None:
    run = measure(Clockwork({}, dies_at=7), REQUESTS, concurrency=3, blocks=20, seed=0)
    assert (run.blocks, run.failure) == (6, "the server answered 500")  # one block warms up
    assert len(run.samples) == 6 * 2 * len(ARMS) * 3
    assert {(s.block, s.arm) for s in run.samples} == {(b, arm) for b in range(1, 7) for arm in ARMS}


def test_throughput_counts_the_tokens_of_a_wave() -> None:
    sample = Sample(VANILLA, 1, 0, 1.0, (2.0, 3.0), (5, 6))
    late = Sample(VANILLA, 1, 1, 1.5, (4.0, 5.0), (5, 6))
    (found,) = throughputs([Measurement("clockwork", 2, 1, (sample, late))])
    assert found.tokens_per_second == pytest.approx(4 / (5.0 - 1.0))


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, True),
        ({"logprob_rms": 0.015}, True),  # the errors of two estimates
        ({"logprob_rms": 0.03}, False),
        ({"largest_gap": 0.09}, True),  # two logits, each off by as much as any of the floor's
        ({"largest_gap": 0.11}, False),
    ],
)
def test_answers_agree_as_far_as_the_vanilla_adapters_do(changes: dict[str, float], found: bool) -> None:
    assert agrees(NEAR.model_copy(update=changes), NEAR) is found


def test_without_logprobs_the_gap_decides() -> None:
    silent = NEAR.model_copy(update={"logprob_rms": None, "logprob_error": None, "logprob_largest": None})
    assert agrees(silent, silent)
    assert not agrees(silent.model_copy(update={"largest_gap": 0.01}), silent)


def test_mixed_lengths_vary_around_those_asked_for() -> None:
    def draw(seed: int) -> list[TokenRequest]:
        return make_requests("mixed", tiny_tokenizer(), 300, prompt_tokens=16, new_tokens=8, seed=seed)

    requests = draw(0)
    prompts, answers = [len(r.prompt) for r in requests], [r.new_tokens for r in requests]
    assert requests == draw(0)
    assert requests != draw(1)
    assert min(prompts + answers) >= 2
    assert max(prompts) <= 8 * 16
    assert len(set(prompts)) > 20
    assert len(set(answers)) > 10
    assert sorted(prompts)[150] == pytest.approx(16, abs=2)
    assert sorted(answers)[150] == pytest.approx(8, abs=1)


def requests_of(file: Path) -> list[TokenRequest]:
    return make_requests("file", tiny_tokenizer(), 5, prompt_tokens=9, new_tokens=3, seed=0, file=file)


def test_the_prompts_of_a_file_are_its_lines_over_and_over(tmp_path: Path) -> None:
    """Of a file from Windows as well; other characters at which Python splits lines are a part of the prompt."""
    (tmp_path / "prompts").write_bytes("\ufeffone\r\n\n  \nform\x0cfeed\u2028separator\n".encode())
    texts = ("one", "form\x0cfeed\u2028separator")
    one, another = (TokenRequest(tuple(tiny_tokenizer()(text).input_ids), 3) for text in texts)
    assert requests_of(tmp_path / "prompts") == [one, another, one, another, one]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\n \n", "has no prompt"), (None, "No such file"), (b"caf\xe9\n", "cannot be read as UTF-8")],
)
def test_files_without_prompts_are_refused(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "file").write_bytes(content)
    with pytest.raises(DataError, match=f"{tmp_path / 'file'}.*{message}"):
        requests_of(tmp_path / "file")


@pytest.mark.parametrize(
    ("change", "noise", "found"),
    [(1e-4, 0.0, True), (1e-4, 1e-4, False), (0.0, 0.0, False), (1e-3, 1e-4, True)],
)
def test_a_weak_adapter_is_seen_by_its_logprobs(change: float, noise: float, found: bool) -> None:
    base = [Sample("base", 1, 0, 0.0, (1.0, 2.0), (5, 6), (-1.0, -2.0))]
    arm = [Sample(FOLDED, 1, 0, 0.0, (1.0, 2.0), (5, 6), (-1.0, -2.0 - change))]
    assert is_changed(base, arm, noise) is found
    assert is_changed(base, [Sample(FOLDED, 1, 0, 0.0, (1.0, 2.0), (5, 7))], noise)


@pytest.mark.parametrize(
    ("adapted", "plain", "found"),
    [
        (0.01, 0.5, False),
        (0.5, 0.01, True),
        (0.029, 0.01, False),  # the models are within three times the noise
        (0.5, 0.5, True),  # an adapter at half its strength
    ],
)
@pytest.mark.parametrize("part", ["logprob_rms", "largest_gap"])
def test_answers_that_are_nearer_to_the_base_model_are_the_base_models(
    part: str, adapted: float, plain: float, found: bool
) -> None:
    silent = NEAR.model_copy(update={"logprob_rms": None})

    def off(nats: float) -> Distance:
        return (silent if part == "largest_gap" else NEAR).model_copy(update={part: nats})

    assert is_base(off(adapted), off(plain), off(0.01)) is found


def test_the_floor_may_exceed_the_base_models_noise_by_the_sensitivity() -> None:
    floor = NEAR.model_copy(update={"logprob_rms": 0.04, "largest_gap": 0.15})
    assert not agrees(floor, NEAR)
    assert agrees(floor, NEAR, factor=4.0)


def test_fewer_than_three_servers_make_no_interval() -> None:
    assert mean_interval([1, 2]) is None
    low, high = mean_interval([1, 2, 3]) or (0, 0)
    assert low == pytest.approx(2 - 4.302653 / math.sqrt(3), rel=1e-6)  # Student's t of two degrees of freedom
    assert high == pytest.approx(4 - low)


def is_near(found: Sequence[BaseModel], kept: Sequence[BaseModel]) -> bool:
    """Equal but for the last digits of floats, which differ from one machine to another."""
    found_leaves, kept_leaves = ([leaf for one in all_ for leaf in leaves(one.model_dump())] for all_ in (found, kept))
    return len(found_leaves) == len(kept_leaves) and all(
        a == (pytest.approx(b, rel=1e-9) if isinstance(b, float) else b)
        for a, b in zip(found_leaves, kept_leaves, strict=True)
    )


def leaves(content: Any) -> Iterator[Any]:
    if isinstance(content, dict | list | tuple):
        for part in content.items() if isinstance(content, dict) else content:
            yield from leaves(part)
    else:
        yield content


def test_the_kept_report_says_what_its_samples_say() -> None:
    report = ParityReport.model_validate_json((KEPT / "smollm2-vllm.json").read_text())
    found = results(report.runs, report.margin)
    assert overall(found) == (report.verdict, report.reason) == ("equivalent", report.reason)
    assert is_near(found, report.results)
    assert is_near(latencies(report.runs), report.latencies)
    assert is_near(throughputs(report.runs), report.throughputs)
    page, table = (KEPT / "smollm2-vllm.html").read_text(), (KEPT / "README.md").read_text()
    for arm in (FOLDED, CONTROL, "base"):
        mine = [r for r in found if r.arm == arm]
        for shown in (f"{r.ratio:.3f} [{r.interval[0]:.3f}, {r.interval[1]:.3f}]" for r in mine):
            assert shown in page
            assert shown in table
