"""Trackers other than TensorBoard, without a network: each keeps a run's losses, certificate and reference.

They are in an environment of their own, with torchao, since TRL and transformers import what they find, which takes
seconds in every process.
"""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loraover.checkpoint.files import REFERENCE_FILE
from loraover.training.push import CERTIFICATE_FILE, attach

from support.plain_adapter import make_adapter
from support.trained_run import losses

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "export", ROOT / "serve", ROOT / "lab"))),
    "WANDB_MODE": "offline",
    "WANDB_DIR": "{0}",
    "WANDB_DATA_DIR": "{0}/data",
    "WANDB_CACHE_DIR": "{0}/cache",
    "WANDB_CONFIG_DIR": "{0}/config",
    "WANDB_ERROR_REPORTING": "false",
    "MLFLOW_TRACKING_URI": "sqlite:///{0}/runs.db",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "TRACKIO_DIR": "{0}/trackio",
}


TWO_RUNS = """
import sys, loraover
from loraover.cli import main
plain = {"method": "lora", "training.max_steps": 2, "evaluation.examples": 0, "training.report_to": "wandb"}
loraover.train(sys.argv[2], "first", overrides=plain | {"model_init.quantization": "torchao-int8"})
main()
"""
"""A run that leaves nothing to attach, on a base that torchao has quantised, and the command in the same process."""


def around(folder: Path) -> tuple[str, dict[str, str]]:
    """Return the Python that has trackers, and the variables for it."""
    python = os.environ.get("LORAOVER_TRACKERS", "")
    if not Path(python).is_file():
        pytest.skip("LORAOVER_TRACKERS names no Python that has wandb, mlflow and trackio; `make test` installs it")
    return python, os.environ | {name: value.format(folder) for name, value in ENVIRONMENT.items()}


@pytest.mark.parametrize(("mode", "code"), [("offline", 0), ("online", 1)])
def test_wandb_is_asked_for_a_login_where_it_uploads(mode: str, code: int, tmp_path: Path) -> None:
    python, variables = around(tmp_path)
    call = [python, "-c", "from loraover.training.push import check_login; check_login(['wandb'])"]
    environment = variables | {"WANDB_MODE": mode, "NETRC": str(tmp_path / "none"), "HOME": str(tmp_path)}
    ran = subprocess.run(call, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == code, ran.stderr
    assert ("wandb has no key of yours. Log in with wandb's own command" in ran.stderr) is (code == 1)


def test_trackers_keep_losses_the_certificate_and_the_reference(recipe: Path, tmp_path: Path) -> None:
    python, variables = around(tmp_path)
    changes = ("evaluation.examples=0", "training.report_to=[wandb, mlflow, trackio]")
    words = ["train", str(recipe), "-o", "out", "--record", *(word for one in changes for word in ("--set", one))]
    call = [python, "-c", TWO_RUNS, *words]
    ran = subprocess.run(call, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    for name in ("wandb", "mlflow", "trackio"):
        assert f"attached to the run in {name}: {CERTIFICATE_FILE}, {REFERENCE_FILE}\n" in ran.stdout
    assert len(losses(tmp_path / "first")) == 2
    expected = losses(tmp_path / "out")
    reference = (tmp_path / "out" / "adapter" / REFERENCE_FILE).read_bytes()

    runs = {file: file.read_bytes() for file in tmp_path.glob("wandb/offline-run-*/run-*.wandb")}
    assert len(runs) == 2
    (records,) = (
        file for file, content in runs.items() if CERTIFICATE_FILE.encode() in content
    )  # copies wait beside it
    named = (b"train/loss", REFERENCE_FILE.encode(), f"loraover-{records.stem.removeprefix('run-')}".encode())
    assert [name for name in named if name not in runs[records]] == []
    assert_attached(tmp_path.glob("data/artifacts/staging/*"), reference)

    with closing(sqlite3.connect(tmp_path / "runs.db")) as database:
        ((run, name, place),) = database.execute("select run_uuid, name, artifact_uri from runs").fetchall()
        rows = database.execute("select step, value from metrics where run_uuid = ? and key = 'loss'", (run,))
        assert dict(rows.fetchall()) == expected
    assert name == "out"
    assert_attached((Path(place) / "loraover").iterdir(), reference)

    with closing(sqlite3.connect(tmp_path / "trackio" / "huggingface.db")) as database:
        logged = database.execute("select run_id, metrics from metrics where run_name = 'out' order by step").fetchall()
        assert database.execute("select name from artifacts").fetchall() == [("loraover-out",)]
        assert database.execute("select run_id from run_artifact_links").fetchall() == [(logged[0][0],)]
    steps = [json.loads(row) for _, row in logged]
    assert [row["train/loss"] for row in steps if "train/loss" in row] == [*expected.values()]
    assert_attached(tmp_path.glob("trackio/artifacts/huggingface/blobs/*/*/*"), reference)


def assert_attached(paths: Iterable[Path], reference: bytes) -> None:
    """The files are a certificate and this reference, whatever their names are."""
    found = {path.read_bytes() for path in paths}
    assert reference in found
    assert [json.loads(one)["verdict"] for one in found - {reference}] == ["passed"]


@pytest.mark.parametrize("tracker", ["wandb", "mlflow"])
def test_a_tracker_without_a_run_is_left_out(tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a resumed run has taken no step."""
    monkeypatch.setitem(sys.modules, tracker, SimpleNamespace(run=None, last_active_run=lambda: None))
    (adapter := make_adapter(tmp_path, "Llama")).joinpath(CERTIFICATE_FILE).write_text("{}")
    said: list[str] = []
    reporter: Any = SimpleNamespace(line=said.append)
    attach(SimpleNamespace(report_to=[tracker]), adapter, reporter)
    assert said == [f"nothing was attached in {tracker}: no step was taken, so this process has no run there"]


def test_nothing_is_attached_where_nothing_is_proved(tmp_path: Path) -> None:
    """An adapter without cores and reference starts no run, which the tracker, not installed here, would need."""
    said: Any = SimpleNamespace(line=pytest.fail)
    attach(SimpleNamespace(report_to=["trackio", "tensorboard"]), make_adapter(tmp_path, "Llama"), said)
