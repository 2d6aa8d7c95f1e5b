"""Faults that noise used to hide, each planted in what PyTorch runs and in a server, with its verdict."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from transformers import DynamicCache

from loraover.checkpoint.source import read_source
from loraover.models.load import resolve_model
from loraover_serve import verify_adapter
from loraover_serve.engines.torch import TorchEngine
from loraover_serve.judge.limits import ADAPTER, BASE
from loraover_serve.judge.names import ANOTHER, STALE
from loraover_serve.verify.by_pytorch import make_subject, verify_engine
from loraover_serve.verify.report import EngineResult

from support.openai_server import openai_server
from support.planted_faults import FAULTS, Ask, AskedModel, Fault, reply, right_models
from support.verified import Case, Served, judged, make_case, save_adapter, save_base


@pytest.fixture(scope="module")
def serve(sharp: Case, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Fault], Ask]:
    return right_models(sharp, tmp_path_factory.mktemp("models"))


def in_torch(server: Ask, fault: Fault, case: Case, scratch: Path) -> EngineResult:
    arms = {BASE: AskedModel("base", server), ADAPTER: AskedModel("shop", server)}
    engine = TorchEngine({arm: partial(nullcontext, model) for arm, model in arms.items()})
    return judged(engine.answers(case.models), case.models)


def in_a_server(server: Ask, fault: Fault, case: Case, scratch: Path) -> EngineResult:
    with openai_server(reply(server), fault.listed) as running:
        setting = case.setting(scratch, endpoint=running.url, served_name="shop")
        return verify_engine("endpoint", setting, case.models)


WAYS = {"torch": in_torch, "server": in_a_server}
CASES = [(way, name) for name, fault in FAULTS.items() for way in WAYS if way == "server" or not fault.by_server]


@pytest.mark.parametrize(("way", "name"), CASES)
def test_each_planted_fault_has_its_verdict(
    way: str, name: str, sharp: Case, serve: Callable[[Fault], Ask], tmp_path: Path
) -> None:
    fault = FAULTS[name]
    found = WAYS[way](fault.wrong(serve(fault)), fault, sharp, tmp_path)
    assert (found.verdict, found.fault) == (fault.verdict, fault.name), found.reason
    assert (found.cache_share > 0) == (fault.cache is not DynamicCache)


def test_an_adapter_that_is_exchanged_is_named(base: Path, tmp_path: Path) -> None:
    """Crossed names, and an earlier step of the same run, both of the same form as the right one."""
    right = save_adapter(tmp_path / "adapter", base)
    wrong = {
        STALE: save_adapter(tmp_path / "trainer" / "checkpoint-20", base, seed=5),
        ANOTHER: save_adapter(tmp_path / "crossed", base, seed=6, target_modules=["q_proj", "o_proj"]),
    }
    case, source = make_case(base, right), resolve_model(str(base))
    subject = make_subject(read_source(right), source, [read_source(wrong[ANOTHER])])
    for name, folder in wrong.items():
        found = verify_engine("torch", case.setting(tmp_path, adapter=folder), replace(case.models, subject=subject))
        assert (found.verdict, found.fault) == ("differs", name), found.reason
        assert str(folder) in found.reason


def test_an_adapter_that_lies_beside_is_named_unasked(base: Path, tmp_path: Path) -> None:
    """One of another base model, and one that cannot be read, lie beside it as well."""
    right = save_adapter(tmp_path / "shop", base)
    other = save_adapter(tmp_path / "blog", base, seed=6)
    save_adapter(tmp_path / "far", save_base(tmp_path / "another base", hidden_size=128))
    shutil.copytree(right, tmp_path / "broken")
    (tmp_path / "broken" / "adapter_config.json").write_text("{}")
    with openai_server(Served(base, {"base": None, "shop": other}), ("base", "shop")) as server:
        (found,) = verify_adapter(right, model=base, endpoint=server.url, served_name="shop").engines
    assert (found.verdict, found.fault) == ("differs", ANOTHER), found.reason
    assert f"the answers are those of {other}" in found.reason
