"""What tests of serving share: one vLLM server, which starts in most of a minute; one tiny model; a quick builder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from loraover.common.command_line import run
from loraover_export.cli import cli
from loraover_export.onnx import genai
from loraover_serve.parity.judge import bootstrap

from support.make_checkpoint import SERVABLE, Made, make_checkpoint
from support.onnx_export import ForkedBuilder
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


@pytest.fixture
def quick_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    """The builder of decoder graphs runs in a fork, which spares each graph 6 s of imports."""
    monkeypatch.setattr(genai, "BuilderProcess", ForkedBuilder)
