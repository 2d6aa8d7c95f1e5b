"""Upload of a run's plain LoRA to the hub, under the base model's name there."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from loraover.checkpoint.base_model import move, naming
from loraover.checkpoint.carried_files import keep_reference
from loraover.checkpoint.files import CONFIG_FILE, CORES_FILE, META_FILE
from loraover.common.errors import ConfigError, FoldError
from loraover.common.request import as_written
from loraover.common.steps import later_step
from loraover.models.load import ModelSource, resolve_model
from loraover.training.recipe import Recipe

CARD = "README.md"
CERTIFICATE_FILE = "fold_certificate.json"
CHECKPOINT_PLACE = "checkpoint"
"""Folder of the repository for the cores."""


def pushed_base(recipe: Recipe, trained: ModelSource, say: Callable[[str], None]) -> ModelSource | None:
    """Resolve the model that a pushed adapter names in place of the stand-in that it was trained on.

    A stand-in is a copy of a model that was made where the hub cannot be reached, see docs/recipes.md.

    Args:
        recipe: The recipe of the run.
        trained: The model that the run trains on.
        say: Receiver of a warning with the largest logit difference between the two models.

    Returns:
        None where the adapter names the model that it was trained on.

    Raises:
        ConfigError: `push_checkpoint` without a repository, without cores, or for cores of a stand-in; an adapter of
            a stand-in would be pushed and the recipe names no model for it that can be read; or the recipe names one
            although no adapter of a stand-in is pushed.
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
            f"push_model is {recipe.push_model!r}, but only an adapter that is trained on a stand-in and pushed takes "
            f"it; this run trains on {trained.origin}. Leave it out."
        )
    moved = move([trained.name], resolve_model(recipe.push_model), say)
    if moved.moved is None:
        raise ConfigError(
            f"push_model: {recipe.push_model} cannot be read here, only the stand-in that the run trains on. Train "
            "where the hub can be reached, or push the adapter later."
        )
    return moved


@contextmanager
def plain_copy(adapter: Path) -> Iterator[Path]:
    """Fold an adapter that has cores into a plain LoRA, with its certificate; the copy lasts for the block.

    The model card and the tokenizer are those of the run. The reference comes along, if there is one.

    Args:
        adapter: The adapter's folder; one without cores is its own copy.

    Raises:
        FoldError: A matrix of the plain LoRA failed its check.
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
    """Copy an adapter without cores so that it names another base model; the copy lasts for the block.

    Args:
        adapter: The adapter's folder.
        base: The model to name.
        card: Text of the copy's README.md.
        say: Receiver of the reason why the adapter's reference is left out, if it is.
    """
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
