"""Rows are recorded on request only, and the table shows what was recorded last."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.churn import Found
from support import motion
from support.compatibility import VARIABLE, Cell, page, read_entries, record, record_cell

pytestmark = pytest.mark.process


def test_nothing_is_recorded_unless_a_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    record("Llama", "ONNX Runtime", "merged", "fp32", "passed", 1e-7, 2e-7)
    monkeypatch.setenv(VARIABLE, "")
    record("Llama", "ONNX Runtime", "merged", "fp32", "passed", 1e-7, 2e-7)
    assert list(tmp_path.iterdir()) == []


def test_rows_become_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tmp_path / "rows.json"
    monkeypatch.setenv(VARIABLE, str(rows))
    record("T5", "ONNX Runtime", "merged", "fp32", "failed", None, None)
    record("Llama", "vLLM 0.32.0", "LoRA", "bf16", "passed", 0.0123, 0.05)
    record("T5", "ONNX Runtime", "merged", "fp32", "passed", 1.25e-7, 2e-7)
    assert len(json.loads(rows.read_text())) == 3
    assert [row.verdict for row in read_entries(rows)] == ["failed", "passed", "passed"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-m", "support.compatibility", str(rows)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == page(read_entries(rows)) + "\n"
    assert "onnxruntime " in done.stdout
    rows_shown, _, read = done.stdout.partition("\n## Read, not run\n")
    assert rows_shown.splitlines()[-2:] == [
        "| Llama | `LlamaForCausalLM` | vLLM 0.32.0 | LoRA | bf16 | 1.2e-02 | 5.0e-02 | passed |",
        "| T5 | `T5ForConditionalGeneration` | ONNX Runtime | merged | fp32 | 1.2e-07 | 2.0e-07 | passed |",
    ]
    assert all(
        engine in read for engine in ("SGLang", "TensorRT-LLM", "LMDeploy", "Text Generation Inference", "LoRAX")
    )


def test_cells_become_a_matrix_with_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tmp_path / "rows.json"
    monkeypatch.setenv(VARIABLE, str(rows))
    record_cell(Cell("mlx", None, "PEFT's", "plain", "refused", "/folder/of/x.npz: found\n a | b"))
    record_cell(Cell("mlx", "1.2", "ours", "rsLoRA", "as trained", "off by nothing"))
    record_cell(Cell("mlx", None, "PEFT's", "rsLoRA", "refused", "/another/x.npz: found\n a | b; 2 nats"))
    lines = page(read_entries(rows)).splitlines()
    assert "| `mlx`, mlx-lm 1.2 | PEFT's | refused | refused | - | - | - | - | - |" in lines
    assert "| `mlx`, mlx-lm 1.2 | ours | - | as trained | - | - | - | - | - |" in lines
    assert [line for line in lines if line.startswith("- `mlx`, ")] == [
        "- `mlx`, PEFT's, plain, rsLoRA: *refused*. x.npz: found a \\| b"
    ]


def test_servers_in_motion_become_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tmp_path / "motion.json"
    monkeypatch.setenv(motion.VARIABLE, str(rows))
    motion.record(motion.REWRITTEN, motion.VERIFY, "*inconclusive*")
    motion.record(motion.REWRITTEN, motion.VERIFY, "*differs*")
    motion.record(motion.REWRITTEN, motion.PLUGIN, "*as trained*")
    motion.record_version("0.32.0+cpu")
    found = Found("plug-in", seconds=60.0, reloads=59, memory=[(10.0 * k, {"server": 5.0 * k}) for k in range(7)])
    found.answers.update({"its name": 7, "none": 1})
    motion.record_churn("plug-in", vars(found))
    shown = motion.page(json.loads(rows.read_text()))
    assert "vLLM 0.32.0+cpu with" in shown
    assert f"| vLLM | {motion.ACTIONS[motion.REWRITTEN][1]} | *differs* | *as trained* |" in shown
    assert f"| llama-server | {motion.ACTIONS[motion.HOST_CACHE][1]} | - | - |" in shown
    assert "| plug-in | 60 s | 59 | - | 8 | 7 | 0 | 1 | 0 of 0 | no | 10, 20, 30 MiB |" in shown
