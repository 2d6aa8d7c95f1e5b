"""One vLLM server for all tests that need one: starting it takes most of a minute; and one tiny model with its fold."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from loraover.common.command_line import run
from loraover_export.cli import cli
from loraover_serve.parity.judge import bootstrap

from support.make_checkpoint import SERVABLE, Made, make_checkpoint
from support.serving import Served, serving


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("served adapters")) as running:
        yield running


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A tiny Llama that every engine takes, with a tokenizer, a checkpoint, and its fold in the folder `folded`."""
    folder = tmp_path_factory.mktemp("parity")
    made = make_checkpoint(folder, tokenizer=True, base_options=SERVABLE)
    assert run(cli, ["fold", str(made.path), "-o", str(folder / "folded")]) == 0
    return made


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer resamples, which are enough for rates over thousands of bootstraps."""
    monkeypatch.setattr(bootstrap, "RESAMPLES", 999)
