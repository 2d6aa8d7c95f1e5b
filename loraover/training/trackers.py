"""The certificate and the reference of a trained adapter as artifacts of the run that a tracker keeps."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from loraover.checkpoint.files import REFERENCE_FILE
from loraover.common.errors import ConfigError
from loraover.common.reporter import Reporter
from loraover.training.push import CERTIFICATE_FILE, plain_copy

ARTIFACT = "loraover"
"""Name and kind of the artifact, or the folder of its files."""


def _to_wandb(args: Any, files: Sequence[Path]) -> bool:
    import wandb

    if wandb.run is None:
        return False
    if files:
        artifact = wandb.Artifact(f"{ARTIFACT}-{wandb.run.id}", type=ARTIFACT)
        for file in files:
            artifact.add_file(str(file))
        wandb.run.log_artifact(artifact)
    wandb.finish()  # else the next run of this process would be logged into the same one
    return True


def _to_mlflow(args: Any, files: Sequence[Path]) -> bool:
    import mlflow

    ended = mlflow.last_active_run()  # with the training
    if ended is None:
        return False
    for file in files:
        mlflow.MlflowClient().log_artifact(ended.info.run_id, str(file), ARTIFACT)
    return True


def _to_trackio(args: Any, files: Sequence[Path]) -> bool:
    if not files:
        return True
    import trackio

    run = trackio.init(project=args.project, name=args.run_name, space_id=args.trackio_space_id, resume="must")
    artifact = trackio.Artifact(f"{ARTIFACT}-{run.name}", type=ARTIFACT)
    for file in files:
        artifact.add_file(str(file))
    trackio.log_artifact(artifact)
    trackio.finish()
    return True


TRACKERS: dict[str, Callable[[Any, Sequence[Path]], bool]] = {
    "wandb": _to_wandb,
    "mlflow": _to_mlflow,
    "trackio": _to_trackio,
}
"""Functions that attach files, if any, to the run that has just ended, by transformers' names for the trackers.

They return whether there is such a run; a resumed run that took no step has none.
"""


def check_login(trackers: Sequence[str]) -> None:
    """Check that the trackers that upload may do so, before anything is loaded.

    Raises:
        ConfigError: wandb is to upload and has no key, or its server refuses it.
    """
    if "wandb" not in trackers or os.environ.get("WANDB_MODE", "online") != "online":
        return
    import wandb

    asks = "prompt" not in inspect.signature(wandb.login).parameters  # wandb before 0.31
    if asks or wandb.run is not None or wandb.setup().settings.mode != "online":
        return
    try:
        may_upload = wandb.login(prompt=False)
    except wandb.Error as error:
        raise ConfigError(f"training.report_to: wandb: {error}") from error
    if not may_upload:
        raise ConfigError(
            "training.report_to: wandb has no key of yours. Log in with wandb's own command, set WANDB_API_KEY, or set "
            "WANDB_MODE=offline, which keeps the run on this machine."
        )


def proofs(adapter: Path) -> list[Path]:
    """Return the files that show what an adapter is: its fold certificate and its reference, where there are any."""
    return [file for name in (CERTIFICATE_FILE, REFERENCE_FILE) if (file := adapter / name).is_file()]


def attach(args: Any, adapter: Path, report: Reporter) -> None:
    """Attach the fold certificate and the reference of an adapter, where there are any, to the trackers of its run.

    Args:
        args: Settings of the run's trainer.
        adapter: The adapter's folder. One that has cores is folded for its certificate.
        report: Receiver of what was attached.

    Raises:
        FoldError: A matrix of the plain LoRA failed its check.
    """
    trackers = [name for name in args.report_to if name in TRACKERS]
    if not trackers:
        return
    with plain_copy(adapter) as plain:
        files = proofs(plain)
        for name in trackers:
            if not TRACKERS[name](args, files):
                report.line(f"nothing was attached in {name}: no step was taken, so this process has no run there")
            elif files:
                report.line(f"attached to the run in {name}: {', '.join(file.name for file in files)}")
