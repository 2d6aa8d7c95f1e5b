"""The parity benchmark on the real vLLM, with its own benchmark beside ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from loraover.common.command_line import run
from loraover_export.formats.vllm.releases import known_architectures
from loraover_serve.cli import cli
from loraover_serve.judge.limits import BASE
from loraover_serve.parity.report import ParityReport
from loraover_serve.parity.samples import CONTROL, FOLDED, VANILLA

from support.make_checkpoint import Made
from support.vllm_command import vllm_command

pytestmark = pytest.mark.matrix


def recording(folder: Path) -> Path:
    """The command vllm, which writes its words down first."""
    path = folder / "vllm"
    lines = ["#!/bin/bash", f"(IFS=$'\\t'; echo \"$*\") >> '{folder}/words'", f"exec '{vllm_command()}' \"$@\""]
    path.write_text("\n".join(lines))
    path.chmod(0o755)
    return path


def test_the_command_measures_on_a_server_without_a_memory_and_beside_vllms_own_benchmark(
    made: Made, tmp_path: Path
) -> None:
    folded, sizes = made.path.parent / "folded", ("--num-prompts", "10", "--prompt-tokens", "5", "--new-tokens", "8")
    words = ["parity", "--adapter", str(folded), "--checkpoint", str(made.path), "--engine", "vllm", *sizes]
    words += ["--vllm", str(recording(tmp_path)), "--memory", "0", "--cross-check", "--output", str(tmp_path / "out")]
    assert run(cli, words) in (0, 1, 3)
    report = ParityReport.model_validate_json((tmp_path / "out" / "parity.json").read_text())
    serve, *benches = [line.split("\t") for line in (tmp_path / "words").read_text().splitlines()]
    assert serve[0] == "serve"
    assert "--no-enable-prefix-caching" in serve
    assert serve[serve.index("--max-lora-rank") + 1] == "8"
    assert [bench[:2] for bench in benches] == [["bench", "serve"]] * 4
    assert report.versions["vllm"].startswith(known_architectures().version)
    (found,) = report.outputs
    assert (found.unapplied, found.agree, report.notes) == ([], True, [])
    assert {check.arm for check in report.cross_checks} == {BASE, VANILLA, CONTROL, FOLDED}
    checks = [check for check in report.cross_checks if check.arm == FOLDED]
    for figures in ({c.measure: c.ours for c in checks}, {c.measure: c.bench_serve for c in checks}):
        assert 0 < figures["time per output token"] <= figures["end-to-end latency"]
        assert 0 < figures["time to first token"] <= figures["end-to-end latency"]
