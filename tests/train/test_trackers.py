"""Numbers of each logged step, and trackers other than TensorBoard, without a network.

The trackers are in an environment of their own, with torchao, since TRL and transformers import what they find, which
takes seconds in every process.
"""

from __future__ import annotations

import json
import math
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
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.integrations import integration_utils

from loraover import DiagnosticsCallback, LoraOverCallback, LoraOverConfig, OverParameterization
from loraover.callbacks.diagnostics import PREFIX, core_numbers
from loraover.callbacks.step_norm import factors, step_norm
from loraover.checkpoint.files import REFERENCE_FILE
from loraover.training.push import CERTIFICATE_FILE, attach

from support.hf_trainer import DATA, arguments, llama
from support.plain_adapter import make_adapter
from support.tiny_models import tiny_net
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
        pytest.skip("LORAOVER_TRACKERS names no Python that has wandb, mlflow and trackio; `make engines` installs it")
    return python, os.environ | {name: value.format(folder) for name, value in ENVIRONMENT.items()}


@pytest.mark.matrix
@pytest.mark.parametrize(("mode", "code"), [("offline", 0), ("online", 1)])
def test_wandb_is_asked_for_a_login_where_it_uploads(mode: str, code: int, tmp_path: Path) -> None:
    python, variables = around(tmp_path)
    call = [python, "-c", "from loraover.training.push import check_login; check_login(['wandb'])"]
    environment = variables | {"WANDB_MODE": mode, "NETRC": str(tmp_path / "none"), "HOME": str(tmp_path)}
    ran = subprocess.run(call, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == code, ran.stderr
    assert ("wandb has no key of yours. Log in with wandb's own command" in ran.stderr) is (code == 1)


@pytest.mark.matrix
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


STEPS = 5


def trained(folder: Path, over: LoraOverCallback | None, adapter: str = "default", **changes: Any) -> Trainer:
    args = arguments(folder, **({"max_steps": STEPS, "logging_steps": 2} | changes))
    model = llama(adapter=adapter)
    trainer = Trainer(model, args, train_dataset=DATA, eval_dataset=DATA[:4], callbacks=[] if over is None else [over])
    DiagnosticsCallback(over).add_to(trainer)
    trainer.train()
    return trainer


def logged(trainer: Trainer, name: str) -> dict[int, float]:
    return {row["step"]: row[PREFIX + name] for row in trainer.state.log_history if PREFIX + name in row}


def dense(model: Any) -> Tensor:
    parts = [found.scaling * (found.b @ found.a) for found in factors(model).values()]
    return torch.cat([part.flatten() for part in parts])


def test_the_step_norm_is_the_dense_one() -> None:
    model = tiny_net()
    before, dense_before = factors(model), dense(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    expected = float((dense(model) - dense_before).norm())
    assert step_norm(before, factors(model)) == pytest.approx(expected, rel=1e-9)
    assert step_norm(before, before) == 0


@pytest.mark.parametrize("adapter", ["default", "math"])
def test_every_logged_step_has_its_numbers(adapter: str, tmp_path: Path) -> None:
    trainer = trained(tmp_path, LoraOverCallback(), adapter)
    norms = logged(trainer, "step_norm")
    assert list(norms) == [2, 4]
    assert all(norm > 0 for norm in norms.values())
    assert logged(trainer, "injected_sites") == dict.fromkeys([2, 4], 28)
    assert logged(trainer, "added_parameters")[2] > 0
    assert 0 < logged(trainer, "added_share")[2] < 1
    conditions = logged(trainer, "gauge_condition")
    assert 1 < conditions[2] < conditions[4]


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"logging_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2}, [6, 12]),
        ({"logging_strategy": "no"}, []),
        ({"logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 3}, [1, 2, 3]),
    ],
    ids=["epoch", "no", "evaluated"],
)
def test_numbers_are_of_the_step_that_is_logged(tmp_path: Path, changes: dict[str, Any], steps: list[int]) -> None:
    each = trained(tmp_path / "each", None, **(changes | {"logging_strategy": "steps", "logging_steps": 1}))
    trainer = trained(tmp_path / "some", None, **changes)
    expected = logged(each, "step_norm")
    assert logged(trainer, "step_norm") == {step: expected[step] for step in steps}
    assert len(set(expected.values())) == len(expected) >= 3
    assert logged(trainer, "centre_norm") == {}


def test_they_reach_every_tracker_and_the_trainers_own_record(tmp_path: Path) -> None:
    told: list[dict[str, float]] = []

    class Tracker(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            told.append(dict(logs or {}))

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "mlflow", Tracker)
        trainer = trained(tmp_path, LoraOverCallback(), report_to=["tensorboard", "mlflow"])
    assert [row[PREFIX + "step_norm"] for row in told if "loss" in row] == list(logged(trainer, "step_norm").values())
    (folder,) = (tmp_path / "runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    found = {event.step: event.value for event in events.Scalars(f"train/{PREFIX}step_norm")}
    assert found == pytest.approx(logged(trainer, "step_norm"), rel=1e-6)
    trainer.save_state()
    record = json.loads((tmp_path / "trainer_state.json").read_text())
    assert PREFIX + "gauge_condition" in record["log_history"][0]


@pytest.mark.parametrize("decomposition", ["mpo", "svd", "chain"])
def test_the_gauge_is_isometric_at_injection(decomposition: str) -> None:
    over = OverParameterization(tiny_net(), LoraOverConfig(decomposition=decomposition))
    numbers = core_numbers(over)
    assert numbers["gauge_condition"] == pytest.approx(1.0, abs=1e-5)
    matrices = [site.parameter.detach().double() for site in over.sites.values()]
    assert numbers["centre_norm"] == pytest.approx(math.sqrt(sum(float(m.square().sum()) for m in matrices)), rel=1e-5)
    cores, plain = over.num_parameters()
    assert numbers["added_share"] == pytest.approx((cores - plain) / plain)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_cores_that_have_diverged_have_numbers_that_say_so(value: float) -> None:
    over = OverParameterization(tiny_net(), LoraOverConfig())
    with torch.no_grad():
        over.groups[0].stacks[0][0].fill_(value)
    assert math.isnan(core_numbers(over)["gauge_condition"])
