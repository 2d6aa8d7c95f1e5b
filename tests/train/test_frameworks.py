"""The files of `integrations/` for other frameworks: each trains two steps there, and leaves cores that fold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from loraover_export import fold_checkpoint

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]
INTEGRATIONS = ROOT / "integrations"
STEPS = 2


def python_of(variable: str) -> str:
    """The Python that has a framework, which a variable names; the test is skipped where there is none."""
    python = os.environ.get(variable, "")
    if not Path(python).is_file():
        pytest.skip(f"{variable} names no Python that has the framework; `make frameworks` installs it")
    return python


def ran(python: str, *words: str | Path, folder: Path) -> None:
    """Run a command with this library on the path, and without a network."""
    path = os.pathsep.join(map(str, (ROOT, folder)))
    around = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    around["AXOLOTL_DO_NOT_TRACK"] = "1"  # without a network, axolotl else waits at its end until it has reported
    done = subprocess.run(
        [python, *map(str, words)], cwd=folder, env=around, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def assert_folds(output: Path) -> None:
    """The last checkpoint has cores, and they contract to the LoRA that the framework saved beside them."""
    checkpoint = output / f"checkpoint-{STEPS}"
    assert fold_checkpoint(checkpoint, output.parent / "folded").verdict == "passed"
    folded, saved = (
        load_file(folder / "adapter_model.safetensors") for folder in (output.parent / "folded", checkpoint)
    )
    torch.testing.assert_close(folded, {name: tensor.float() for name, tensor in saved.items()})
    assert any(tensor.any() for name, tensor in saved.items() if "lora_B" in name)


def rows(folder: Path, **row: str) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for _ in range(16)))
    return file


def settings(folder: Path, **content: object) -> Path:
    file = folder / "settings.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def test_trl_sft_trains_cores(bases: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="trl is not installed")
    data = tmp_path / "data"
    data.mkdir()
    rows(data, prompt="1+1?", completion="2")
    options = {
        "model_name_or_path": bases["llama"],
        "dataset_name": data,
        "output_dir": tmp_path / "out",
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lora_r": 4,
        "lora_target_modules": "q_proj v_proj",
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "dtype": "float32",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", *str(value).split())]
    ran(sys.executable, INTEGRATIONS / "trl" / "sft.py", "--use_peft", *words, folder=tmp_path)
    assert_folds(tmp_path / "out")


@pytest.mark.matrix
def test_axolotl_trains_cores(bases: dict[str, Path], tmp_path: Path) -> None:
    python = python_of("LORAOVER_AXOLOTL")
    (tmp_path / "loraover_axolotl.py").write_text((INTEGRATIONS / "axolotl" / "loraover_axolotl.py").read_text())
    file = settings(
        tmp_path,
        base_model=str(bases["llama"]),
        plugins=["loraover_axolotl.LoraOverPlugin"],
        adapter="lora",
        lora_r=4,
        lora_alpha=8,
        lora_target_modules=["q_proj", "v_proj"],
        datasets=[{"path": str(rows(tmp_path, instruction="1+1?", input="", output="2")), "type": "alpaca"}],
        dataset_prepared_path=str(tmp_path / "prepared"),
        output_dir=str(tmp_path / "out"),
        sequence_len=256,
        micro_batch_size=2,
        gradient_accumulation_steps=1,
        max_steps=STEPS,
        learning_rate=1e-2,
        optimizer="adamw_torch",
        lr_scheduler="constant",
        bf16=False,
        fp16=False,
        tf32=False,
        use_cpu=True,
        save_steps=STEPS,
        special_tokens={"pad_token": "<pad>"},
        **{f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o", "embedding")},
    )
    ran(python, "-m", "axolotl.cli.train", file, folder=tmp_path)
    assert_folds(tmp_path / "out")


@pytest.mark.matrix
def test_llamafactory_trains_cores(bases: dict[str, Path], tmp_path: Path) -> None:
    python = python_of("LORAOVER_LLAMAFACTORY")
    rows(tmp_path, instruction="1+1?", input="", output="2")
    (tmp_path / "dataset_info.json").write_text(json.dumps({"sums": {"file_name": "rows.jsonl"}}))
    file = settings(
        tmp_path,
        model_name_or_path=str(bases["llama"]),
        stage="sft",
        do_train=True,
        finetuning_type="lora",
        lora_rank=4,
        lora_target="q_proj,v_proj",
        dataset_dir=str(tmp_path),
        dataset="sums",
        template="default",
        cutoff_len=128,
        output_dir=str(tmp_path / "out"),
        max_steps=STEPS,
        save_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        use_cpu=True,
        report_to="none",
    )
    ran(python, INTEGRATIONS / "llamafactory" / "train.py", file, folder=tmp_path)
    assert_folds(tmp_path / "out")


def test_the_kept_versions_are_those_of_pip() -> None:
    kept = json.loads((INTEGRATIONS / "versions.json").read_text())
    for name, found in kept.items():
        assert found["resolves"], name
        assert found["versions"]["torch"]
        framework, _, version = name.partition("==")
        assert version in ("", found["versions"][framework])
