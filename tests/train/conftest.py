"""Tiny base models, and runs that several files look at."""

from __future__ import annotations

import gzip
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.no_network import no_network as no_network
from support.no_network import reached as reached
from support.no_network import without_network
from support.processes import TESTS, TORCHRUN, launched
from support.resumed_run import KINDS, STEPS, killed, stopped
from support.rows import Write, lines
from support.tiny_hub import save_llama, save_t5, write_recipe
from support.train_command import METHODS, train
from support.trained_run import MODELS, Trained, watched


@pytest.fixture(scope="session")
def zero_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left of their runs in DeepSpeed's engine, and of the messages that they counted."""
    folder = tmp_path_factory.mktemp("zero")
    launched(TORCHRUN, TESTS / "support" / "parallel_zero.py", folder)
    return folder


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of base models, which tests only read."""
    folder = tmp_path_factory.mktemp("bases")
    return {
        "llama": save_llama(folder / "llama"),
        "chat": save_llama(folder / "chat", chat=True),
        "t5": save_t5(folder / "t5"),
    }


@pytest.fixture(scope="session")
def base(bases: dict[str, Path]) -> Path:
    return bases["llama"]


@pytest.fixture
def recipe(base: Path, tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "recipe.yaml", base)


@pytest.fixture(scope="session")
def trained(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Trained]:
    """Both kinds of model, by both methods, from one recipe."""
    runs = {}
    for kind in MODELS:
        folder = tmp_path_factory.mktemp(kind)
        recipe = write_recipe(folder / "recipe.yaml", bases[kind])
        for method in METHODS:
            with without_network() as addresses, watched() as seen:
                assert train(recipe, folder / method, "--method", method) == 0
            assert addresses == []
            trainer, start = seen[0]
            runs[kind, method] = Trained(kind, method, bases[kind], folder / method, trainer, start)
    return runs


@pytest.fixture(scope="session")
def recipes(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A recipe of each kind; dropout, decay and a schedule make a step depend on all that a checkpoint must hold."""
    folder = tmp_path_factory.mktemp("recipes")
    return {
        kind: write_recipe(
            folder / f"{kind}.yaml",
            bases[kind],
            lora={"lora_dropout": 0.2},
            training={"max_steps": STEPS, "weight_decay": 0.1, "warmup_steps": 1, "lr_scheduler_type": "linear"},
            evaluation={"exact_match": False},
        )
        for kind in KINDS
    }


@pytest.fixture(scope="session")
def whole(recipes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a run of each of these recipes, never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    for kind, recipe in recipes.items():
        assert train(recipe, folder / kind) == 0
    return {kind: folder / kind for kind in recipes}


@pytest.fixture(scope="session")
def halted(recipes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a run of each of these recipes, stopped or killed in step `STOP`; copy one before you change it."""
    folder = tmp_path_factory.mktemp("halted")
    stops = {"llama": stopped, "t5": killed}
    return {kind: stops[kind](recipe, folder / kind) for kind, recipe in recipes.items()}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes rows, or raw bytes, to a file; gzipped where its name says so."""

    def written(name: str, *rows: Any, raw: bytes | None = None) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        content = lines(*rows) if raw is None else raw
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return path

    return written


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user can enter."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)
