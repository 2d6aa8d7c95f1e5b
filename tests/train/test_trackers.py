"""Trackers other than TensorBoard, without a network: each keeps a run's losses and its fold certificate.

They are in an environment of their own, since TRL imports those that it finds, which takes seconds in every process.
"""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

from support.trained_run import losses

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "export", ROOT / "serve"))),
    "WANDB_MODE": "offline",
    "WANDB_DIR": "{0}",
    "WANDB_DATA_DIR": "{0}/data",
    "WANDB_CACHE_DIR": "{0}/cache",
    "WANDB_CONFIG_DIR": "{0}/config",
    "WANDB_ERROR_REPORTING": "false",
    "MLFLOW_TRACKING_URI": "file://{0}/mlruns",
    "MLFLOW_ALLOW_FILE_STORE": "true",  # which MLflow 3 refuses otherwise; its databases need all of MLflow
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "TRACKIO_DIR": "{0}/trackio",
}


def test_trackers_keep_losses_and_the_certificate(recipe: Path, tmp_path: Path) -> None:
    python = os.environ.get("LORAOVER_TRACKERS", "")
    if not Path(python).is_file():
        pytest.skip("LORAOVER_TRACKERS names no Python that has wandb, mlflow and trackio; `make test` installs it")
    words = [
        "train",
        str(recipe),
        "-o",
        "out",
        "--set",
        "evaluation.examples=0",
        "--set",
        "training.report_to=[wandb, mlflow, trackio]",
    ]
    call = [python, "-c", "from loraover.cli import main; main()", *words]
    around = os.environ | {name: value.format(tmp_path) for name, value in ENVIRONMENT.items()}
    ran = subprocess.run(call, cwd=tmp_path, env=around, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    expected = losses(tmp_path / "out")

    (records,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")  # artifacts wait beside it for an upload
    assert all(name in records.read_bytes() for name in (b"train/loss", b"fold_certificate.json"))
    assert_passed(tmp_path.glob("data/artifacts/staging/*"))

    (metrics,) = tmp_path.glob("mlruns/*/*/metrics/loss")  # lines of time, value and step
    lines = [line.split() for line in metrics.read_text().splitlines()]
    assert {int(step): float(value) for _, value, step, *_ in lines} == expected
    assert (metrics.parents[1] / "tags" / "mlflow.runName").read_text() == "out"
    assert_passed((metrics.parents[1] / "artifacts" / "loraover").iterdir())

    with sqlite3.connect(tmp_path / "trackio" / "huggingface.db") as database:
        rows = database.execute("select run_name, metrics from metrics order by step").fetchall()
    logged = [json.loads(row) for name, row in rows if name == "out"]
    assert [row["train/loss"] for row in logged if "train/loss" in row] == [*expected.values()]
    assert_passed(tmp_path.glob("trackio/artifacts/huggingface/blobs/*/*/*"))


def assert_passed(paths: Iterable[Path]) -> None:
    """The only file is a certificate, whatever its name is."""
    assert [json.loads(path.read_bytes())["verdict"] for path in paths] == ["passed"]
