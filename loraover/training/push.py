"""Upload what a run has trained to the hub."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from loraover.checkpoint.adapter_config import CONFIG_FILE
from loraover.checkpoint.base_model import move, naming
from loraover.checkpoint.carried_reference import keep_reference
from loraover.checkpoint.source import CORES_FILE, META_FILE
from loraover.common.errors import ConfigError, OutputError
from loraover.common.request import as_written
from loraover.models.load import ModelSource, resolve_model
from loraover.training.recipe import Recipe


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
        ConfigError: An adapter of a stand-in would be pushed and the recipe names no model for it that can be read;
            or the recipe names one although no adapter of a stand-in is pushed.
    """
    needs_base = recipe.push_to_hub is not None and recipe.method != "full" and trained.stand_in is not None
    if recipe.push_model is None:
        if not needs_base:
            return None
        raise ConfigError(
            f"push_to_hub: the base model here is a {trained.stand_in}, and a folder of this machine means nothing to "
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


def push(repository: str, folder: Path, kept: Path) -> None:
    """Upload a folder.

    Args:
        repository: Name on the hub; it is made if it is missing.
        folder: What to upload.
        kept: Folder where the run keeps what was trained, for messages.

    Raises:
        OutputError: The hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    except Exception as error:  # the hub's client lets its HTTP library's own errors through
        raise OutputError(f"push_to_hub: {repository}: {error}. The adapter is safe in {kept}.") from error


@contextmanager
def moved_copy(adapter: Path, base: ModelSource, card: str, say: Callable[[str], None]) -> Iterator[Path]:
    """Copy an adapter, without its cores, so that it names another base model; the copy lasts for the block.

    The cores are left out since they were not trained on that model.

    Args:
        adapter: The adapter's folder.
        base: The model to name.
        card: Text of the copy's README.md.
        say: Receiver of the reason why the adapter's reference is left out, if it is.
    """
    with tempfile.TemporaryDirectory() as scratch:
        copy = shutil.copytree(
            adapter, Path(scratch) / adapter.name, ignore=shutil.ignore_patterns(META_FILE, CORES_FILE)
        )
        config = naming(json.loads((copy / CONFIG_FILE).read_bytes()), base)
        (copy / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        (copy / "README.md").write_text(card, encoding="utf-8")
        keep_reference(adapter, copy, say)
        yield copy
