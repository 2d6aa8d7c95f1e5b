"""What tests of studies share: a small recipe, whose trainings are forks of the test's process."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest

from support.forked_training import ForkedTraining
from support.tiny_hub import save_llama, write_recipe


@pytest.fixture(scope="module", autouse=True)
def forked() -> Iterator[None]:
    """Trainings are forks, but for those of the tests that ask for `as_users_have_it`."""
    forking = SimpleNamespace(Popen=ForkedTraining, DEVNULL=subprocess.DEVNULL)
    with patch("loraover.study.outcome.subprocess", forking):
        yield


@pytest.fixture
def as_users_have_it() -> Iterator[None]:
    with patch("loraover.study.outcome.subprocess", subprocess):
        yield


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    evaluation = {"examples": 12, "exact_match": False}
    return write_recipe(folder / "words.yaml", save_llama(folder / "llama"), evaluation=evaluation)
