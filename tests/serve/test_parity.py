"""The parity benchmark: its design, its judgement of made-up samples, and a run on PyTorch."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from safetensors.torch import load_file, save_file

from loraover import LoraOverConfig
from loraover.checkpoint.peft_adapter import TENSORS_FILE, read_adapter_dir
from loraover.common.command_line import run
from loraover_serve.cli import cli
from loraover_serve.engines.base import Engine
from loraover_serve.engines.sample import Request, Sample
from loraover_serve.parity.judge import outputs
from loraover_serve.parity.judge.analysis import latencies, log_ratios, overall, results, throughputs
from loraover_serve.parity.judge.outputs import Distance, agrees, is_applied
from loraover_serve.parity.measure.arms import make_vanilla
from loraover_serve.parity.measure.blocks import measure
from loraover_serve.parity.measure.design import block_orders
from loraover_serve.parity.measure.memory import mean_interval, peak_of
from loraover_serve.parity.measure.workload import make_requests
from loraover_serve.parity.report.parity_report import ParityReport
from loraover_serve.parity.samples import CONTROL, FOLDED, VANILLA, Measurement

from support.clockwork import ARMS, Clockwork
from support.make_checkpoint import SERVABLE, Made, make_checkpoint
from support.tiny_hub import tiny_tokenizer

pytestmark = pytest.mark.engine

REQUESTS = [Request((1, 2, 3), 4)]
KEPT = Path(__file__).resolve().parents[2] / "docs" / "parity"
MIB = 2**20
ALLOCATES = "block = b'x' * (100 << 20); print(len(block), flush=True); input()"
PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {ALLOCATES!r}], start_new_session=True)"
NEAR = Distance(
    reference="", equal=1.0, largest_gap=0.0, logprob_rms=0.01, logprob_error=0.001, logprob_largest=0.05, answers=[]
)


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
    found = re.search(r"about (\d+) requests would be enough", reason)
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


def test_every_latency_of_every_arm_of_a_thousand_requests_is_described() -> None:
    run = measure(Clockwork({}, noise=0.02), [Request((1,), 32)], concurrency=1, blocks=500, seed=0)
    assert len(latencies([run])) == len(ARMS) * 4


def test_throughput_counts_the_tokens_of_a_wave() -> None:
    sample = Sample(VANILLA, 1, 0, 1.0, (2.0, 3.0), (5, 6))
    late = Sample(VANILLA, 1, 1, 1.5, (4.0, 5.0), (5, 6))
    (found,) = throughputs([Measurement("clockwork", 2, 1, (sample, late))])
    assert found.tokens_per_second == pytest.approx(4 / (5.0 - 1.0))


def test_memory_of_a_child_in_a_session_of_its_own_counts() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdout is not None
        with peak_of(process.pid) as peak:
            assert int(process.stdout.readline()) == 100 * MIB
        process.communicate(b"\n")
    assert 100 * MIB < peak.bytes < 200 * MIB


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
    def draw(seed: int) -> list[Request]:
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


def test_the_prompts_of_a_file_come_over_and_over(tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("one\n\n  \nanother\n", encoding="utf-8")
    tokenizer = tiny_tokenizer()
    requests = make_requests("file", tokenizer, 5, prompt_tokens=9, new_tokens=3, seed=0, file=tmp_path / "prompts")
    one, another = (Request(tuple(tokenizer(text).input_ids), 3) for text in ("one", "another"))
    assert requests == [one, another, one, another, one]


def words(made: Made, *more: str, engine: str = "torch") -> list[str]:
    folded = made.path.parent / "folded"
    return ["parity", "--adapter", str(folded), "--engine", engine, "--prompt-tokens", "5", "--new-tokens", "4", *more]


def test_a_run_on_pytorch(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    code = run(cli, words(made, "--checkpoint", str(made.path), "--num-prompts", "10", "--output", str(out)))
    report = ParityReport.model_validate_json((out / "parity.json").read_text())
    assert code == report.exit_code
    assert report.verdict in ("equivalent", "different", "inconclusive")
    assert {r.arm for r in report.results} == {"base", CONTROL, FOLDED, "unfolded"}
    (torch_run,) = report.runs
    assert len(torch_run.samples) == 5 * 2 * 5
    (found,) = report.outputs
    assert (found.folded.equal, found.controls_equal, found.repeats_equal) == (1.0, 1.0, 1.0)
    assert found.folded.logprob_rms is not None
    assert found.folded.logprob_rms < 1e-5
    assert found.agree
    assert (found.unapplied, found.noise_rms) == ([], 0.0)
    assert [answer.gap for answer in found.folded.answers] == [None] * found.prompts
    assert {"numpy", "scipy", "torch"} <= report.versions.keys()
    assert "GiB of memory" in report.hardware
    assert report.verdict in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--also-adapter", "nowhere", "--num-prompts", "40"], "no such folder"),
        (["--also-adapter", "nowhere", "--num-prompts", "39"], "--num-prompts 40 or more"),
        (["--num-prompts", "9"], "--num-prompts 10 or more"),
        (["--num-prompts", "100", "--max-concurrency", "1,16", "--engine", "vllm"], "--num-prompts 160 or more"),
        (["--max-concurrency", "0"], "expected positive numbers"),
        (["--workload", "file"], "go together"),
        (["--baseline", "nowhere"], "no such folder"),
        (["--checkpoint", "nowhere"], "no such folder"),
        (["--max-concurrency", "4"], "one request at a time"),
        (["--max-concurrency", "4,1,4", "--engine", "vllm"], "--max-concurrency names one twice: 4, 1, 4"),
        (["--engine", "torch"], "--engine names one twice: torch, torch"),
        (["--", "--max-num-seqs", "4"], "add --engine vllm"),
        (["--engine", "vllm", "--", "--enable_prefix_caching"], "the prefix cache is always off"),
        (["--engine", "vllm", "--", "--lora-modules=a=b"], "--lora-modules cannot be given to vLLM here"),
        (["--engine", "vllm", "--", "--model", "x"], "name it with --model before the --"),
    ],
)
def test_requests_that_cannot_be_used(
    more: list[str], message: str, made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(cli, words(made, *more)) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\n \n", "has no prompt"), (None, "No such file"), (b"caf\xe9\n", "cannot be read as UTF-8")],
)
def test_files_without_prompts_are_refused(
    content: bytes | None, message: str, made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts"
    if content is not None:
        file.write_bytes(content)
    assert run(cli, words(made, "--workload", "file", "--prompts", str(file))) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert message in error
    assert str(file) in error


def test_answers_unlike_the_unfolded_models_are_different(made: Made, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", config=LoraOverConfig(seed=6), steps=9, base_options=SERVABLE)
    out = tmp_path / "out"
    assert run(cli, words(made, "--checkpoint", str(other.path), "--num-prompts", "10", "--output", str(out))) == 1
    report = ParityReport.model_validate_json((out / "parity.json").read_text())
    assert report.verdict == "different"
    assert "further from PyTorch" in report.reason
    assert [o.agree for o in report.outputs] == [False]


@pytest.mark.parametrize("lora", [{"r": 2}, {"target_modules": ["q_proj", "k_proj"]}])
def test_adapters_of_other_ranks_or_targets_are_refused(
    lora: dict[str, Any], made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_checkpoint(tmp_path, base_options=SERVABLE, **lora)
    assert run(cli, words(made, "--baseline", str(other.path))) == 2
    assert "--allow-unequal" in capsys.readouterr().err
    more = ["--baseline", str(other.path), "--num-prompts", "10", "--allow-unequal"]
    assert run(cli, words(made, *more)) in (0, 1, 3)


def test_a_checkpoint_of_other_modules_is_refused_before_anything_starts(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_checkpoint(tmp_path, target_modules=["q_proj", "k_proj"])
    assert run(cli, words(made, "--checkpoint", str(other.path))) == 2
    shown = capsys.readouterr()
    assert "adapts other modules" in shown.err
    assert "loading PyTorch" not in shown.err


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), RuntimeError("out of memory")])
def test_what_was_measured_outlives_the_comparison_of_outputs(
    failure: BaseException, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise failure

    monkeypatch.setattr(outputs, "distance_of", fail)
    assert run(cli, words(made, "--num-prompts", "10", "--output", str(tmp_path / "out"))) == 2
    report = ParityReport.model_validate_json((tmp_path / "out" / "parity.json").read_text())
    reason = "interrupted" if isinstance(failure, KeyboardInterrupt) else "PyTorch: RuntimeError: out of memory"
    assert (report.verdict, report.reason, report.runs[0].blocks) == ("failed", reason, 5)


def test_what_was_measured_is_shown_and_kept_where_the_page_cannot_be_written(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill_the_disk(report: ParityReport) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("loraover_serve.parity.run.to_page", fill_the_disk)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert run(cli, words(made, "--num-prompts", "10", "--json", "--output", str(tmp_path / "out"))) == 2
    shown = capsys.readouterr()
    assert "No space left" in shown.err
    (kept,) = re.findall(r"kept in (\S+): parity\.json", shown.err)
    report = ParityReport.model_validate_json((Path(kept) / "parity.json").read_text())
    assert json.loads(shown.out) == json.loads(report.model_dump_json(exclude={"runs"}))
    assert len(report.runs[0].samples) == 5 * 2 * 4


def test_an_output_that_cannot_be_written_is_refused_before_anything_starts(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert run(cli, words(made, "--output", str(tmp_path / "file" / "out"))) == 2
    shown = capsys.readouterr()
    assert f"cannot write {tmp_path / 'file' / 'out'}" in shown.err
    assert "loading PyTorch" not in shown.err


def test_an_adapter_that_peft_refuses_is_an_engine_error(
    made: Made, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise ValueError("Target modules not found")

    monkeypatch.setattr("peft.PeftModel.from_pretrained", refuse)
    assert run(cli, words(made)) == 2
    assert "torch: ValueError: Target modules not found" in capsys.readouterr().err


def test_a_vanilla_adapter_holds_what_the_folded_one_holds_besides_a_and_b(tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path, lora_bias=True, modules_to_save=["lm_head"])
    like = read_adapter_dir(made.path)
    vanilla = read_adapter_dir(make_vanilla(like, tmp_path / "vanilla", seed=0))
    assert vanilla.shapes == like.shapes
    assert len(vanilla.shapes) > len(vanilla.sites)


@pytest.mark.parametrize(
    ("change", "noise", "found"),
    [(1e-4, 0.0, True), (1e-4, 1e-4, False), (0.0, 0.0, False), (1e-3, 1e-4, True)],
)
def test_a_weak_adapter_is_seen_by_its_logprobs(change: float, noise: float, found: bool) -> None:
    base = [Sample("base", 1, 0, 0.0, (1.0, 2.0), (5, 6), (-1.0, -2.0))]
    arm = [Sample(FOLDED, 1, 0, 0.0, (1.0, 2.0), (5, 6), (-1.0, -2.0 - change))]
    assert is_applied(base, arm, noise) is found
    assert is_applied(base, [Sample(FOLDED, 1, 0, 0.0, (1.0, 2.0), (5, 7))], noise)


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
    found = results(report.runs, report.margin, report.alpha)
    assert overall(found) == (report.verdict, report.reason) == ("equivalent", report.reason)
    assert is_near(found, report.results)
    assert is_near(latencies(report.runs), report.latencies)
    assert is_near(throughputs(report.runs), report.throughputs)
    page, table = (KEPT / "smollm2-vllm.html").read_text(), (KEPT / "README.md").read_text()
    for arm in (FOLDED, CONTROL, "base"):
        mine = [r for r in found if r.arm == arm]
        assert all(f"{r.interval[0]:.4f} to {r.interval[1]:.4f}" in page for r in mine)
        assert all(f"{r.ratio:.3f} [{r.interval[0]:.3f}, {r.interval[1]:.3f}]" in table for r in mine)


def weakened(adapter: Path, copy: Path) -> Path:
    """Copy an adapter and weaken it, so that it changes the model's logprobs but no token of its answers."""
    shutil.copytree(adapter, copy)
    tensors = load_file(copy / TENSORS_FILE)
    weak = {name: 1e-2 * tensor if "lora_B" in name else tensor for name, tensor in tensors.items()}
    save_file(weak, copy / TENSORS_FILE)
    return copy


@pytest.mark.usefixtures("quick_builder")
def test_a_run_on_onnx(made: Made, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out, folded = tmp_path / "out", weakened(made.path.parent / "folded", tmp_path / "weak")
    more = ["--adapter", str(folded), "--num-prompts", "10", "--json", "--output", str(out)]
    assert run(cli, words(made, *more, engine="onnx")) in (0, 1, 3)
    report = ParityReport.model_validate_json((out / "parity.json").read_text())
    assert json.loads(capfd.readouterr().out)["verdict"] == report.verdict
    assert [run.engine for run in report.runs] == ["onnx merged", "onnx swappable"]
    for found in report.runs:
        assert {sample.arm for sample in found.samples} == {"base", VANILLA, CONTROL, FOLDED}
        assert all(len(sample.token_ids) == len(sample.token_s) == 4 for sample in found.samples)
        assert all(0 < sample.first_token_s < sample.end_to_end_s for sample in found.samples)
    merged, swappable = ({(s.arm, s.request): s.token_ids for s in found.samples} for found in report.runs)
    assert merged == swappable
    assert all(ids == merged["base", request] for (_, request), ids in merged.items())
    for compared in report.outputs:
        assert (compared.folded.equal, compared.vanilla.equal, compared.controls_equal) == (1.0, 1.0, 1.0)
        assert (compared.unapplied, compared.noise_rms) == ([], 0.0)
        for distance in (compared.folded, compared.vanilla):
            assert distance.logprob_rms is not None
            assert distance.logprob_rms < 1e-5
    assert {"onnxruntime", "onnxruntime-genai"} <= report.versions.keys()
