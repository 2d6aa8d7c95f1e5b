"""Where and in which type `fold --check-error` computes, and what it says where that cannot be."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from loraover import LoraOverConfig
from loraover.common.command_line import run
from loraover_export import fold_checkpoint
from loraover_export.cli import cli
from loraover_export.fold import run as run_fold
from loraover_export.fold.report import FoldCertificate, OutputCertificate

from support.devices import ALL_DEVICES
from support.faults import Failure, Fold
from support.fold_cases import certificate
from support.make_checkpoint import EMBEDDING, LINEAR, Made, edit_tensors, make_checkpoint
from support.no_memory import NO_MEMORY
from support.refusals import Refused

COMPUTE = ("fp32", "bf16", "fp16", "fp64")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_checkpoint(tmp_path_factory.mktemp("made"), tokenizer=True, target_modules=LINEAR)


def checked(certificate: FoldCertificate) -> OutputCertificate:
    assert certificate.outputs is not None
    return certificate.outputs


@pytest.mark.parametrize("device", ALL_DEVICES)
def test_a_fold_passes_on_every_device_in_every_type(device: str, made: Made, tmp_path: Path) -> None:
    """A coarser type sees less."""
    noise = {}
    for dtype in COMPUTE[: 3 if device == "mps" else 4]:  # Apple GPUs have no float64
        out = tmp_path / dtype
        options: dict[str, Any] = {"device": device, "compute_dtype": dtype}
        found = fold_checkpoint(made.path, out, check_error=True, **options)
        outputs = checked(found)
        assert found.passed
        assert (outputs.device, outputs.compute_dtype) == (device, dtype)
        assert outputs.compared_tokens == outputs.tokens
        assert FoldCertificate.model_validate_json((out / "fold_certificate.json").read_text()) == found
        asked = f"--device {device}" + (f" --compute-dtype {dtype}" if dtype != "fp32" else "")
        assert asked in (out / "README.md").read_text()
        noise[dtype] = outputs.noise.max_logit
    assert noise["bf16"] > 2 * noise["fp16"] > 100 * noise["fp32"] > 0
    assert noise["fp32"] > noise.get("fp64", 0) >= 0  # float32 stores the adapter in either


@pytest.mark.parametrize("lora", [{"modules_to_save": ["lm_head", "norm"]}, {"target_modules": EMBEDDING}], ids=str)
def test_a_fold_is_checked_alike_on_a_model_that_is_read_from_its_files(
    lora: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_checkpoint(tmp_path, tokenizer=True, **lora)
    limits: list[object] = []
    monkeypatch.setattr(run_fold, "record_beside", lambda *_, **options: limits.append(options["max_memory_gib"]))
    words = ["fold", str(made.path), "--check-error", "--record", "--device", "cpu"]
    for name, limit in {"whole": (), "streamed": ("--max-memory-gib", "1e-9")}.items():
        assert run(cli, [*words, "-o", str(tmp_path / name), *limit]) == 0
        assert ("they stay in their files" in " ".join(capsys.readouterr().out.split())) == bool(limit)
    assert limits == [None, 1e-9]
    assert certificate(tmp_path / "streamed").outputs == certificate(tmp_path / "whole").outputs


def test_a_wrong_fold_is_rejected_in_a_coarse_type(made: Made, tmp_path: Path, wrong_fold: Fold) -> None:
    wrong_fold(halve_b)
    found = fold_checkpoint(made.path, tmp_path / "out", check_error=True, device="cpu", compute_dtype="bf16")
    assert found.verdict == "failed"
    assert not (tmp_path / "out").exists()


def halve_b(folder: Path) -> None:
    def halve(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({key: tensor / 2 for key, tensor in tensors.items() if "lora_B" in key})

    edit_tensors(folder / "adapter_model.safetensors", halve)


# Sampled tokens


@pytest.mark.parametrize("is_wrong", [False, True])
def test_large_cores_are_applied_at_some_tokens_of_every_layer(
    is_wrong: bool, tmp_path: Path, wrong_fold: Fold, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a wrong fold, the other tokens see nothing, and the last one of each prompt enough."""
    config = LoraOverConfig(decomposition="chain", options={"depth": 8}, seed=0)
    made = make_checkpoint(tmp_path / "made", config=config, tokenizer=True, target_modules=LINEAR, r=32)
    if is_wrong:
        wrong_fold(halve_b)
    out = tmp_path / "out"
    assert run(cli, ["fold", str(made.path), "-o", str(out), "--check-error", "--device", "cpu"]) == int(is_wrong)
    shown = " ".join(capsys.readouterr().out.split())
    if not is_wrong:
        outputs = checked(FoldCertificate.model_validate_json((out / "fold_certificate.json").read_text()))
        assert outputs.prompts <= outputs.compared_tokens < outputs.tokens / 2
        assert f"at {outputs.compared_tokens} of {outputs.tokens} tokens, the same in every layer" in shown


# What cannot be


def test_a_device_that_is_not_there_is_refused_before_any_work(made: Made, tmp_path: Path, refused: Refused) -> None:
    """The cores are damaged, which a fold would find."""
    source = shutil.copytree(made.path, tmp_path / "damaged")
    edit_tensors(source / "loraover.safetensors", lambda found: next(iter(found.values())).mul_(2))
    refused("fold", source, "--check-error", "--device", "cuda:9", named=("there is no cuda:9 here",))


MEMORY = (
    "the check of the outputs ran out of memory on cpu",
    "GiB in fp32",
    "tokens at once, which shorter or fewer prompts reduce. cpu has",
    "What would fit: --device cpu --compute-dtype bf16",
)


@pytest.mark.parametrize(
    ("name", "when"), [*((name, "run") for name in NO_MEMORY), ("the CPU", "loaded"), ("a GPU", "adapted")]
)
def test_out_of_memory_says_what_was_needed_and_what_would_fit(
    name: str, when: Any, made: Made, refused: Refused, failing_model: Failure
) -> None:
    failing_model(NO_MEMORY[name], when)
    refused("fold", made.path, "--check-error", "--device", "cpu", named=MEMORY)


def test_another_error_stays_what_it_is(made: Made, tmp_path: Path, failing_model: Failure) -> None:
    failing_model(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "run")
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        fold_checkpoint(made.path, tmp_path / "out", check_error=True, device="cpu")
