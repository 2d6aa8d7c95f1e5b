"""What tests of serving share: one vLLM server, which starts in most of a minute; tiny models; a quick builder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from loraover.common.command_line import run
from loraover_export.cli import cli
from loraover_serve.engines.mlx import MlxEngine
from loraover_serve.judge.reference import Reference, read_reference
from loraover_serve.parity import equivalence

from support.engine_forms import Running
from support.long_questions import LongCase, make_long_case
from support.make_checkpoint import SERVABLE, Made, make_checkpoint
from support.onnx_export import quick_builder as quick_builder
from support.planted_faults import save_sharp_base
from support.recorded import asked_alike, record
from support.serving import Served, serving
from support.verified import Case, make_case, save_adapter, save_base


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


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of a tiny Llama, written for vLLM to the folder `shop`."""
    folder = tmp_path_factory.mktemp("for vLLM")
    assert run(cli, ["vllm", str(make_checkpoint(folder).path), "-o", str(folder / "shop")]) == 0
    return folder / "shop"


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, which tests leave as it is."""
    return save_base(tmp_path_factory.mktemp("bases") / "base")


@pytest.fixture(scope="session")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of this model, which tests leave as it is."""
    return save_adapter(tmp_path_factory.mktemp("adapters") / "adapter", base)


@pytest.fixture(scope="session")
def case(base: Path, adapter: Path) -> Case:
    """These two, with the judge of engines that serve them."""
    return make_case(base, adapter)


@pytest.fixture(scope="module")
def sharp(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """An adapter of a base model whose attention tells positions apart, so that faults of the base show."""
    folder = tmp_path_factory.mktemp("sharp")
    base = save_sharp_base(folder / "base")
    return make_case(base, save_adapter(folder / "adapter", base))


@pytest.fixture(scope="session")
def recorded(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference of this adapter."""
    return record(base, adapter, tmp_path_factory.mktemp("recorded"))


@pytest.fixture(scope="session")
def long_case(tmp_path_factory: pytest.TempPathFactory) -> LongCase:
    """An adapter whose reference has long questions."""
    return make_long_case(tmp_path_factory.mktemp("long"))


@pytest.fixture(scope="session")
def reference(recorded: Path) -> Reference:
    """What it holds, which tests leave as it is."""
    return read_reference(recorded)


@pytest.fixture(scope="session")
def asked(base: Path, adapter: Path, recorded: Path) -> Case:
    """The adapter with verify's judge, on the questions of the reference."""
    return asked_alike(base, adapter, recorded)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Servers and graphs, made when a test first needs them."""
    with ExitStack() as until:
        yield Running(tmp_path_factory.mktemp("servers"), until)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> type[MlxEngine]:
    """mlx-lm's runner in this environment, which holds no mlx-lm."""
    monkeypatch.delenv("LORAOVER_HERE", raising=False)
    monkeypatch.setattr(MlxEngine, "variable", "LORAOVER_HERE")
    monkeypatch.setattr(MlxEngine, "distributions", ("pytest",))
    return MlxEngine


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer resamples, which are enough for rates over thousands of bootstraps."""
    monkeypatch.setattr(equivalence, "RESAMPLES", 999)
