"""The parity benchmark on the real vLLM: mixed load, a planted delay, its own benchmark beside ours, and its memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from loraover.common.command_line import run
from loraover_export.vllm.architectures import known_architectures
from loraover_serve.cli import cli
from loraover_serve.engines.answers import BASE
from loraover_serve.engines.sample import TokenRequest
from loraover_serve.engines.vllm import VllmEngine
from loraover_serve.parity.judge.analysis import overall, results
from loraover_serve.parity.measure.blocks import measure
from loraover_serve.parity.report.parity_report import ParityReport
from loraover_serve.parity.samples import CONTROL, FOLDED, VANILLA, Measurement
from loraover_serve.vllm.server import VllmServer

from support.delaying_proxy import delaying
from support.make_checkpoint import Made
from support.serving import Served
from support.vllm_command import vllm_command

pytestmark = pytest.mark.engine

NEW_TOKENS = 2
REQUESTS, PROMPTS = 48, 8
COPIES = {VANILLA: "vanilla", CONTROL: "vanilla", FOLDED: "folded"}


@pytest.fixture(scope="module")
def delayed(served: Served) -> Measurement:
    """A measurement in which the folded adapter takes twice its time."""
    with delaying(served.client.url, "folded", 1.0) as url:
        engine = VllmEngine(VllmServer(url, served.client.pid), COPIES, timeout_s=60)
        return measure(engine, few_requests(served), concurrency=1, blocks=8, seed=0)


def few_requests(served: Served) -> list[TokenRequest]:
    return [TokenRequest(tuple(prompt), NEW_TOKENS) for prompt in served.prompts[:5]]


def test_a_planted_delay_is_found(delayed: Measurement) -> None:
    """The machine may be busy with other tests: then the copies fail the control, and the verdict must be that."""
    found = results([delayed], margin=0.25)
    folded, control = ([result for result in found if result.arm == arm] for arm in (FOLDED, CONTROL))
    if all(result.verdict == "equivalent" for result in control):
        assert all(result.verdict != "equivalent" for result in folded), folded
        assert any(result.verdict == "different" and 1.5 < result.ratio < 2.6 for result in folded), folded
        assert overall(found)[0] == "different"
    else:
        assert overall(found)[0] == "inconclusive"


@pytest.fixture(scope="module")
def tiny_run(made: Made, tmp_path_factory: pytest.TempPathFactory) -> tuple[ParityReport, list[list[str]]]:
    """A run of the command on a tiny model, and the words of each call of vLLM."""
    folder = tmp_path_factory.mktemp("tiny run")
    vllm = recording(folder)
    words = [
        "parity",
        "--adapter",
        str(made.path.parent / "folded"),
        "--checkpoint",
        str(made.path),
        "--engine",
        "vllm",
    ]
    words += ["--vllm", str(vllm), "--num-prompts", "10", "--prompt-tokens", "5", "--new-tokens", "8", "--memory", "0"]
    assert run(cli, [*words, "--cross-check", "--output", str(folder / "out")]) in (0, 1, 3)
    report = ParityReport.model_validate_json((folder / "out" / "parity.json").read_text())
    return report, [line.split("\t") for line in (folder / "words").read_text().splitlines()]


def recording(folder: Path) -> Path:
    """The command vllm, which writes its words down first."""
    path = folder / "vllm"
    lines = ["#!/bin/bash", f"(IFS=$'\\t'; echo \"$*\") >> '{folder}/words'", f"exec '{vllm_command()}' \"$@\""]
    path.write_text("\n".join(lines))
    path.chmod(0o755)
    return path


@pytest.mark.matrix
def test_the_command_measures_on_a_server_without_a_memory(
    tiny_run: tuple[ParityReport, list[list[str]]],
) -> None:
    report, (serve, *benches) = tiny_run
    assert serve[0] == "serve"
    assert "--no-enable-prefix-caching" in serve
    assert serve[serve.index("--max-lora-rank") + 1] == "8"
    assert [bench[:2] for bench in benches] == [["bench", "serve"]] * 4
    assert report.versions["vllm"].startswith(known_architectures().version)
    (found,) = report.outputs
    assert found.unapplied == []
    assert found.agree


@pytest.mark.matrix
def test_vllms_own_benchmark_runs_beside_ours(tiny_run: tuple[ParityReport, list[list[str]]]) -> None:
    report, _ = tiny_run
    assert report.notes == []
    assert {check.arm for check in report.cross_checks} == {BASE, VANILLA, CONTROL, FOLDED}
    checks = [check for check in report.cross_checks if check.arm == FOLDED]
    for figures in ({c.measure: c.ours for c in checks}, {c.measure: c.bench_serve for c in checks}):
        assert 0 < figures["time per output token"] <= figures["end-to-end latency"]
        assert 0 < figures["time to first token"] <= figures["end-to-end latency"]
