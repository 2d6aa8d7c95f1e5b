"""Faults that noise used to hide and adapters under each other's names, each planted and named."""

from __future__ import annotations

import gzip
import json
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
import yaml
from transformers import DynamicCache

from loraover.checkpoint.source import read_source
from loraover.common.errors import CheckpointError, ConfigError
from loraover.models.load import resolve_model
from loraover_serve import verify_adapter
from loraover_serve.engines.torch import TorchEngine
from loraover_serve.judge.asker import SCREENED
from loraover_serve.judge.limits import ADAPTER, BASE
from loraover_serve.judge.names import ANOTHER, STALE
from loraover_serve.judge.reference import Reference, read_reference
from loraover_serve.verify.by_pytorch import make_subject, verify_engine
from loraover_serve.verify.by_reference import NEAREST
from loraover_serve.verify.report import EngineResult
from loraover_serve.watch.canary import Canary, ask
from loraover_serve.watch.config import QUICK, Watched, read_config
from loraover_serve.watch.history import Check, History

from support.openai_server import Recorded, openai_server
from support.planted_faults import FAULTS, Ask, AskedModel, Fault, reply, right_models
from support.reference_server import RIGHT, FromReference
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


NOW = 1_700_000_000.0
NUMBER = 20
ADAPTERS = tuple(f"a{index}" for index in range(NUMBER))
CROSSED = {"a3": "a7", "a7": "a12", "a12": "a3"}


def another(content: Mapping[str, Any], name: str, seed: int) -> dict[str, Any]:
    """The reference of another adapter, which changes as much at each position, and has the same likeliest tokens."""
    draw = random.Random(seed)
    made: dict[str, Any] = json.loads(json.dumps(dict(content)))
    tokens = [token for question in made["questions"] for token in question["answer"]]
    for place, token in zip(made["positions"], tokens, strict=True):
        changes = [one - other for one, other in zip(place["adapter"], place["base"], strict=True)]
        draw.shuffle(changes)
        found = [max(0, one + change) for one, change in zip(place["base"], changes, strict=True)]
        mine, best = place["ids"].index(token), found.index(min(found))
        found[mine], found[best] = found[best], found[mine]
        place["adapter"] = found
    kept = [each for each in made["variants"] if each["factor"] == 2]
    return made | {"adapter": name, "variants": kept}


@pytest.fixture(scope="module")
def files(recorded: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """References of many adapters, below one folder."""
    folder, content = tmp_path_factory.mktemp("many"), json.loads(gzip.decompress(recorded.read_bytes()))
    found = {}
    for seed, name in enumerate(ADAPTERS):
        (folder / name).mkdir()
        found[name] = folder / name / "adapter_reference.json.gz"
        found[name].write_bytes(gzip.compress(json.dumps(another(content, name, seed)).encode()))
    return found


@pytest.fixture
def server(files: dict[str, Path]) -> Iterator[Recorded]:
    """A server of all of them, of which three have one another's names."""
    by_name = {name: read_reference(files[CROSSED.get(name, name)]) for name in ADAPTERS}
    answer: dict[str, Callable[[dict[str, Any]], int | bytes]] = {
        name: FromReference(reference, lambda _: RIGHT) for name, reference in by_name.items()
    }
    answer["base"] = answer["a0"]
    with openai_server(
        lambda body: answer[body["model"]](body), {"base": None} | dict.fromkeys(ADAPTERS, "base")
    ) as it:
        yield it


@pytest.fixture
def held(server: Recorded, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of references in memory, beside those of the server, whenever one was read."""
    alive, counts, make = WeakSet[Reference](), [], Reference.__init__

    def counted(self: Reference, content: Mapping[str, Any]) -> None:
        make(self, content)
        alive.add(self)
        counts.append(len(alive))

    monkeypatch.setattr(Reference, "__init__", counted)
    return counts


def test_crossed_names_are_found_among_many_adapters(server: Recorded, files: dict[str, Path], held: list[int]) -> None:
    folder = files["a0"].parents[1]
    report = verify_adapter(references=[folder], endpoint=server.url, served_name=sorted(ADAPTERS))
    assert len(held) >= 2 * NUMBER
    assert max(held) <= 3, "the one before, and one that a thread has not let go"
    found = {result.engine: result for result in report.engines}
    for name, result in found.items():
        if name in CROSSED:
            assert (result.verdict, result.fault) == ("differs", ANOTHER), result.reason
            assert result.reason == f"{ANOTHER}: the server answers as {CROSSED[name]} was trained"
        else:
            assert result.verdict == "as trained", result.reason
    least = min(result.requests for name, result in found.items() if name not in CROSSED)
    assert max(result.requests for result in found.values()) <= 2 * 2 * least + SCREENED + NEAREST * QUICK


def test_a_server_that_answers_as_no_other_adapter_names_none(
    server: Recorded, files: dict[str, Path], tmp_path: Path
) -> None:
    """The name a3 answers as a7, whose reference is not here; others are nearer to that than a3 is."""
    known = [
        shutil.copytree(files[name].parent, tmp_path / name) / files[name].name
        for name in ("a3", *ADAPTERS[:3], *ADAPTERS[4:7])
    ]
    broken = tmp_path / "broken.json.gz"
    broken.write_bytes(b"{}")
    first, second, *others = verify_adapter(references=[known[0], broken, *known[1:]], endpoint=server.url).engines
    assert first.verdict == "differs"
    assert first.fault != ANOTHER
    assert (second.engine, second.verdict, second.requests) == (str(broken), "failed", 0)
    assert {one.verdict for one in others} == {"as trained"}
    with pytest.raises(CheckpointError, match=r"broken\.json\.gz: not a reference"):
        verify_adapter(references=[broken], endpoint=server.url)
    with pytest.raises(ConfigError, match=f"served_name: 2, and there are {NUMBER} references; name all of them"):
        verify_adapter(references=[files["a0"].parents[1]], endpoint=server.url, served_name=["a0", "a1"])


def test_an_adapter_whose_reference_lies_beside_is_named(server: Recorded, files: dict[str, Path]) -> None:
    (found,) = verify_adapter(references=[files["a3"]], endpoint=server.url, base_name="base").engines
    assert (found.verdict, found.fault) == ("differs", ANOTHER), found.reason
    assert found.reason == f"{ANOTHER}: the server answers as a7 was trained"


def watched(folder: Path, files: Mapping[str, Path], url: str, **more: Any) -> Watched:
    adapters = [{"name": name, "reference": str(files[name]), "quick": True} for name in ADAPTERS]
    for each in adapters[:8]:
        each["quick"] = False
    content = {"servers": [{"name": "prod", "url": url, "base_name": "base", "adapters": adapters}], **more}
    (folder / "watch.yaml").write_text(yaml.safe_dump(content))
    return read_config(folder / "watch.yaml")


def test_a_watch_names_the_adapter_that_answers_within_its_budget(
    server: Recorded, files: dict[str, Path], tmp_path: Path
) -> None:
    found = watched(tmp_path, files, server.url)
    target = next(each for each in found.targets if each.adapter == "a3")
    check = ask(target)
    assert (check.verdict, check.fault) == ("differs", ANOTHER), check.reason
    assert "answers as a7 was trained" in check.reason
    assert check.requests == len(server.bodies) + 3, "and three for the names"
    assert check.requests <= target.most + target.search
    server.bodies.clear()
    asked: list[int] = []

    def refuse(requests: int) -> bool:
        asked.append(requests)
        return False

    check = ask(target, reserve=refuse)
    assert asked == [target.search]
    assert check.verdict == "differs"
    assert check.fault != ANOTHER
    assert len(server.bodies) <= target.most


def test_a_search_is_reserved_in_the_budget_and_given_back(files: dict[str, Path], tmp_path: Path) -> None:
    found = watched(tmp_path, files, "http://localhost:9", budget=2000)
    canary = Canary(found, History(tmp_path / "h.sqlite"), NOW, random.Random(1))
    target = canary.begin(NOW + 1e6)
    assert target is not None
    before = canary.left(NOW + 1e6)
    assert not canary.reserve(target, before + 1, NOW + 1e6)
    assert canary.reserve(target, before, NOW + 1e6)
    assert canary.left(NOW + 1e6) == 0
    canary.end(target, Check(*target.key, NOW + 1e6, "differs", None, "a reason", 0.1, 0.2, 1.0, 0.1, requests=60))
    assert canary.left(NOW + 1e6) == 2000 - 60
