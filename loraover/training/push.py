"""Upload what a run has trained to the hub."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from loraover.checkpoint.base_model import move, naming
from loraover.checkpoint.checkpoint import CORES_FILE, META_FILE
from loraover.checkpoint.peft_adapter import CONFIG_FILE
from loraover.common.errors import ConfigError, OutputError
from loraover.models.load import ModelSource, resolve_model
from loraover.training.recipe import Recipe


def pushed_base(recipe: Recipe, trained: ModelSource, say: Callable[[str], None]) -> ModelSource | None:
    """The model that a pushed adapter is to name in place of the stand-in that it is trained on, if it is.

    Args:
        trained: what the run trains on.
        say: told a warning with the largest logit difference between the two.

    Raises:
        ConfigError: an adapter of a stand-in would be pushed, and the recipe names no model for it that can be had; or
            the recipe names one for an adapter of another kind.
    """
    needs_base = recipe.push_to_hub is not None and recipe.method != "full" and trained.stand_in is not None
    if recipe.push_base is None:
        if not needs_base:
            return None
        raise ConfigError(
            f"push_to_hub: the base model here is a {trained.stand_in}, and a folder of this machine means nothing to "
            "others. Name the model that the pushed adapter is to name with --base, or train where the hub is in reach."
        )
    if not needs_base:
        raise ConfigError(
            f"push_base is {recipe.push_base!r}, which only an adapter that is pushed and trained on a stand-in takes; "
            f"this run trains on {trained.origin}. Leave it out."
        )
    moved = move([trained.name], resolve_model(recipe.push_base), say)
    if moved.moved is None:
        raise ConfigError(
            f"push_base: {recipe.push_base} cannot be read here, only the stand-in for it that is trained on. Train "
            "where the hub is in reach, or push the adapter later."
        )
    return moved


def push(repository: str, folder: Path, kept: Path) -> None:
    """Upload a folder.

    Args:
        kept: where the run keeps what was trained, for messages.

    Raises:
        OutputError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    except Exception as error:  # the hub's client lets its HTTP library's own errors through
        raise OutputError(f"push_to_hub: {repository}: {error}. The adapter is safe in {kept}.") from error


@contextmanager
def moved_copy(adapter: Path, base: ModelSource, card: str) -> Iterator[Path]:
    """A copy of an adapter that names another base model: a plain LoRA, since its cores were not trained on that model.

    Args:
        card: the copy's README.md.
    """
    with tempfile.TemporaryDirectory() as scratch:
        copy = shutil.copytree(
            adapter, Path(scratch) / adapter.name, ignore=shutil.ignore_patterns(META_FILE, CORES_FILE)
        )
        config = naming(json.loads((copy / CONFIG_FILE).read_bytes()), base)
        (copy / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        (copy / "README.md").write_text(card, encoding="utf-8")
        yield copy
