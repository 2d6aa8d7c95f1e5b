"""Uploads of a run: its plain LoRA to the hub, and the proofs of its adapter to the trackers."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from loraover.checkpoint.base_model import move, naming
from loraover.checkpoint.carried_files import keep_reference
from loraover.checkpoint.files import CONFIG_FILE, CORES_FILE, META_FILE, REFERENCE_FILE
from loraover.common.errors import ConfigError, FoldError
from loraover.common.later import later_step
from loraover.common.reporter import Reporter
from loraover.common.request import as_written
from loraover.models.load import ModelSource, resolve_model
from loraover.sources.hub import push
from loraover.training.recipe import Recipe

CARD = "README.md"
CERTIFICATE_FILE = "fold_certificate.json"
CHECKPOINT_PLACE = "checkpoint"
"""Folder of the repository for the cores."""


def pushed_base(recipe: Recipe, trained: ModelSource, say: Callable[[str], None]) -> ModelSource | None:
    """Resolve the model that a pushed adapter names in place of the stand-in that it was trained on.

    A stand-in is a copy of a model that was made where the hub cannot be reached, see docs/recipes.md.
    """
    if recipe.push_checkpoint and (recipe.push_to_hub is None or recipe.method != "lora-over" or recipe.push_model):
        raise ConfigError(
            f"{as_written('push_checkpoint')} uploads the cores of a run with method lora-over, needs "
            f"{as_written('push_to_hub')}, and cannot be combined with {as_written('push_model')}, on which the cores "
            "were not trained. Leave it out."
        )
    needs_base = recipe.push_to_hub is not None and recipe.method != "full" and trained.stand_in is not None
    if recipe.push_model is None:
        if not needs_base:
            return None
        raise ConfigError(
            f"push_to_hub: the base model here is a {trained.stand_in}, and a folder of this machine is unknown to "
            f"others. Name the base model of the pushed adapter with {as_written('push_model')}, or train where the "
            "hub can be reached."
        )
    if not needs_base:
        raise ConfigError(
            f"push_model is {recipe.push_model!r}, but it is only for an adapter that is trained on a stand-in and "
            f"pushed; this run trains on {trained.origin}. Leave it out."
        )
    moved = move([trained.name], resolve_model(recipe.push_model), say)
    if moved.moved is None:
        raise ConfigError(
            f"push_model: {recipe.push_model} cannot be read here; only its stand-in can, on which the run trains. "
            "Train "
            "where the hub can be reached, or push the adapter later."
        )
    return moved


def upload(recipe: Recipe, adapter: Path, report: Reporter, base: ModelSource | None, card: str) -> None:
    """Upload a run's plain LoRA, and its cores if the recipe asks for them, to the repository of its recipe.

    With a `base`, the adapter names it in place of the stand-in that it was trained on, and `card` is its README.md.
    """
    repository, is_private = str(recipe.push_to_hub), (recipe.training.model_extra or {}).get("hub_private_repo")
    with ExitStack() as copies:
        plain = copies.enter_context(plain_copy(adapter))
        if base is not None:
            plain = copies.enter_context(moved_copy(plain, base, card, report.line))
        push(repository, plain, adapter, is_private=is_private)
    if recipe.push_checkpoint:
        push(repository, adapter, adapter, CHECKPOINT_PLACE, is_private=is_private)
    report.line(f"uploaded to {repository}")


@contextmanager
def plain_copy(adapter: Path) -> Iterator[Path]:
    """Fold an adapter that has cores into a plain LoRA, with its certificate; the copy lasts for the block.

    The model card and the tokenizer are those of the run. The reference comes along, if there is one.
    """
    if not (adapter / META_FILE).is_file():
        yield adapter
        return
    with tempfile.TemporaryDirectory() as scratch:
        folded = Path(scratch) / adapter.name
        if later_step("fold")(adapter, folded).verdict == "failed":
            raise FoldError(
                f"{adapter}: a folded matrix failed its check, so nothing was uploaded. Fold it to see why."
            )
        for path in adapter.iterdir():
            if path.name == CARD or not (path.name in (META_FILE, CORES_FILE) or (folded / path.name).exists()):
                shutil.copyfile(path, folded / path.name)
        yield folded


@contextmanager
def moved_copy(adapter: Path, base: ModelSource, card: str, say: Callable[[str], None]) -> Iterator[Path]:
    """Copy an adapter without cores so that it names another base model; the copy lasts for the block."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = shutil.copytree(adapter, Path(scratch) / adapter.name)
        config = naming(json.loads((copy / CONFIG_FILE).read_bytes()), base)
        (copy / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        if (certificate := copy / CERTIFICATE_FILE).is_file():
            renamed = json.loads(certificate.read_bytes()) | {"base_model": base.name}
            certificate.write_text(json.dumps(renamed, indent=1) + "\n")
        (copy / CARD).write_text(card, encoding="utf-8")
        keep_reference(adapter, copy, say)
        yield copy


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
    """Check that the trackers that upload may do so, before anything is loaded."""
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
    """Return the files that prove an adapter: its fold certificate and its reference, where there are any."""
    return [file for name in (CERTIFICATE_FILE, REFERENCE_FILE) if (file := adapter / name).is_file()]


def attach(args: Any, adapter: Path, report: Reporter) -> None:
    """Attach the fold certificate and the reference of an adapter, where there are any, to the trackers of its run.

    An adapter that has cores is folded for its certificate.
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
