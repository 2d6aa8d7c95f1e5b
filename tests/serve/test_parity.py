"""The parity benchmark: runs on PyTorch and ONNX Runtime, and requests that cannot be carried out."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from loraover import LoraOverConfig
from loraover.checkpoint.files import CONFIG_FILE, TENSORS_FILE
from loraover.checkpoint.peft_adapter import read_adapter_dir
from loraover.common.command_line import run
from loraover.common.errors import ConfigError, OutputError
from loraover_serve import UnwrittenReportError, measure_parity
from loraover_serve.cli import cli
from loraover_serve.engines import torch as torch_engines
from loraover_serve.engines.base import Timed
from loraover_serve.engines.torch import torch_engine
from loraover_serve.parity import answers
from loraover_serve.parity import run as parity_run
from loraover_serve.parity.arms import make_vanilla
from loraover_serve.parity.report import ParityReport
from loraover_serve.parity.samples import CONTROL, FOLDED, VANILLA
from loraover_serve.parity.servers import peak_of

from support.devices import ALL_DEVICES
from support.faults import Failure
from support.make_checkpoint import SERVABLE, Made, make_checkpoint
from support.no_memory import NO_MEMORY

pytestmark = pytest.mark.engine

MIB = 2**20
ALLOCATES = "block = b'x' * (100 << 20); print(len(block), flush=True); input()"
BRIEF: dict[str, Any] = {"prompt_tokens": 5, "new_tokens": 4}
PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {ALLOCATES!r}], start_new_session=True)"


def test_memory_of_a_child_in_a_session_of_its_own_counts() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdout is not None
        with peak_of(process.pid) as peak:
            assert int(process.stdout.readline()) == 100 * MIB
        process.communicate(b"\n")
    assert 100 * MIB < peak.bytes < 200 * MIB


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
        (["--also-adapter", "nowhere", "--num-prompts", "39"], "--num-prompts 40 or more"),
        (["--num-prompts", "100", "--max-concurrency", "1,16", "--engine", "vllm"], "--num-prompts 160 or more"),
        (["--", "--max-num-seqs", "4"], "add --engine vllm"),
        (["--engine", "vllm", "--", "--enable_prefix_caching"], "the prefix cache is always off"),
        (["--engine", "vllm", "--", "--model", "x"], "name it with --model, not in the words after"),
    ],
)
def test_requests_that_cannot_be_used(
    more: list[str], message: str, made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(cli, words(made, *more)) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_answers_unlike_the_unfolded_models_are_different(made: Made, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", config=LoraOverConfig(seed=6), steps=9, base_options=SERVABLE)
    out = tmp_path / "out"
    assert run(cli, words(made, "--checkpoint", str(other.path), "--num-prompts", "10", "--output", str(out))) == 1
    report = ParityReport.model_validate_json((out / "parity.json").read_text())
    assert report.verdict == "different"
    assert "further from PyTorch" in report.reason
    assert [o.agree for o in report.outputs] == [False]


def scaled(adapter: Path, copy: Path, factor: float) -> Path:
    """Copy an adapter, and multiply its B."""
    shutil.copytree(adapter, copy)
    tensors = load_file(copy / TENSORS_FILE)
    save_file({n: factor * t if "lora_B" in n else t for n, t in tensors.items()}, copy / TENSORS_FILE)
    return copy


@pytest.mark.parametrize(
    ("factor", "reason"),
    [
        (0.02, "torch does not apply vanilla, control, folded"),
        (0.6, "torch applies adapters wrongly"),
        (1.0, ""),
        (4.0, "torch applies adapters wrongly"),
    ],
)
def test_an_engine_that_scales_all_adapters_fails_the_run(
    factor: float, reason: str, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scaling(load: Any, adapters: Mapping[str, Path], checkpoint: Path | None) -> Timed:
        wrong = {arm: scaled(path, tmp_path / f"scaled-{arm}", factor) for arm, path in adapters.items()}
        return torch_engine(load, wrong, checkpoint)

    monkeypatch.setattr(torch_engines, "torch_engine", scaling)
    report = measure_parity(made.path.parent / "folded", engines=["torch"], num_prompts=10, **BRIEF)
    (found,) = report.outputs
    assert found.misapplied == (factor != 1)
    assert found.agree == (factor == 1)
    assert found.unapplied == ([VANILLA, CONTROL, FOLDED] if factor < 0.1 else [])
    assert (report.verdict == "failed") == (factor != 1)
    assert reason in report.reason


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


@pytest.mark.parametrize("option", ["--adapter", "--baseline", "--also-adapter"])
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("init_lora_weights", "pissa", "changes the base weights"),
        ("task_type", "SEQ_2_SEQ_LM", "is not a causal language model, and parity compares next tokens"),
    ],
)
def test_an_adapter_that_no_engine_can_be_compared_on_is_refused_before_anything_starts(
    option: str, field: str, value: str, message: str, made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(made.path.parent / "folded", tmp_path / "other")
    config = json.loads((other / CONFIG_FILE).read_text()) | {field: value}
    (other / CONFIG_FILE).write_text(json.dumps(config))
    assert run(cli, words(made, option, str(other))) == 2
    shown = capsys.readouterr()
    assert message in " ".join(shown.err.split())
    assert "loading PyTorch" not in shown.err


FAILURES: dict[str, tuple[BaseException, str]] = {
    "Ctrl-C": (KeyboardInterrupt(), "^interrupted$"),
    "an error": (RuntimeError("shapes do not fit"), "^PyTorch: RuntimeError: shapes do not fit$"),
    "no memory": (
        NO_MEMORY["the CPU"],
        "^the comparison with PyTorch ran out of memory on cpu .*What would fit: --device cpu --compute-dtype bf16",
    ),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_what_was_measured_outlives_the_comparison_of_outputs(
    failure: str, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error, reason = FAILURES[failure]

    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(answers, "distance_of", fail)
    out = tmp_path / "out"
    assert run(cli, words(made, "--device", "cpu", "--num-prompts", "10", "--output", str(out))) == 2
    report = ParityReport.model_validate_json((out / "parity.json").read_text())
    assert (report.verdict, report.runs[0].blocks) == ("failed", 5)
    assert re.search(reason, report.reason)


def test_what_was_measured_is_shown_and_kept_where_the_page_cannot_be_written(
    made: Made, tmp_path: Path, full_disk_of_pages: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(cli, words(made, "--num-prompts", "10", "--json", "--output", str(tmp_path / "out"))) == 2
    shown = capsys.readouterr()
    assert "No space left" in shown.err
    (kept,) = re.findall(r"kept in (\S+): parity\.json", shown.err)
    report = ParityReport.model_validate_json((Path(kept) / "parity.json").read_text())
    assert json.loads(shown.out) == json.loads(report.model_dump_json(exclude={"runs"}))
    assert len(report.runs[0].samples) == 5 * 2 * 4
    shutil.rmtree(kept)


def test_a_full_temporary_folder_does_not_lose_the_report(
    made: Made, tmp_path: Path, full_disk_of_pages: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_the_disk(path: Path, text: str) -> None:
        raise OutputError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr(parity_run, "publish_text", fill_the_disk)
    out = tmp_path / "out"
    with pytest.raises(UnwrittenReportError, match="No space left") as caught:
        measure_parity(made.path.with_name("folded"), output=out, engines=["torch"], num_prompts=10, **BRIEF)
    assert (caught.value.report.runs[0].blocks, caught.value.report.kept) == (5, None)
    assert not out.exists()


def test_an_output_that_cannot_be_written_is_refused_before_anything_starts(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert run(cli, words(made, "--output", str(tmp_path / "file" / "out"))) == 2
    shown = capsys.readouterr()
    assert f"cannot write {tmp_path / 'file' / 'out'}" in shown.err
    assert "loading PyTorch" not in shown.err


def test_a_vanilla_adapter_holds_what_the_folded_one_holds_besides_a_and_b(tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path, lora_bias=True, modules_to_save=["lm_head"])
    like = read_adapter_dir(made.path)
    vanilla = read_adapter_dir(make_vanilla(like, tmp_path / "vanilla", seed=0))
    assert vanilla.shapes == like.shapes
    assert len(vanilla.shapes) > len(vanilla.matrices)


@pytest.mark.usefixtures("quick_builder")
def test_a_run_on_onnx(made: Made, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out, folded = tmp_path / "out", scaled(made.path.parent / "folded", tmp_path / "weak", 1e-2)
    more = ["--adapter", str(folded), "--num-prompts", "10", "--json", "--output", str(out)]
    assert run(cli, words(made, *more, engine="onnx")) in (0, 1, 3)
    report = ParityReport.model_validate_json((out / "parity.json").read_text())
    assert json.loads(capfd.readouterr().out)["verdict"] == report.verdict
    assert [run.engine for run in report.runs] == ["onnx merged", "onnx swappable"]
    for found in report.runs:
        assert {sample.arm for sample in found.samples} == {"base", VANILLA, CONTROL, FOLDED}
        assert all(len(sample.token_ids) == len(sample.token_s) == 4 for sample in found.samples)
        assert all(0 < sample.first_token_s < sample.end_to_end_s for sample in found.samples)
    # so weak an adapter changes logprobs, but no token
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


@pytest.mark.parametrize("compute_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("device", ALL_DEVICES)
def test_answers_on_a_device_are_those_of_its_unfolded_model(device: str, compute_dtype: str, made: Made) -> None:
    options: dict[str, Any] = {"checkpoint": made.path, "device": device, "compute_dtype": compute_dtype}
    report = measure_parity(made.path.with_name("folded"), **options, engines=["torch"], num_prompts=10, **BRIEF)
    assert (report.device, report.compute_dtype) == (device, compute_dtype)
    assert f"--device {device}" in report.command
    assert (f"--compute-dtype {compute_dtype}" in report.command) == (compute_dtype != "fp32")  # its default
    assert [found.agree for found in report.outputs] == [True]


def test_an_engine_without_memory_says_what_would_fit(made: Made, failing_model: Failure) -> None:
    failing_model(NO_MEMORY["the CPU"], "loaded")
    with pytest.raises(ConfigError, match=r"PyTorch ran out of memory on cpu .*What would fit: .*compute_dtype='bf16'"):
        measure_parity(made.path.with_name("folded"), device="cpu", engines=["torch"], num_prompts=10, **BRIEF)
