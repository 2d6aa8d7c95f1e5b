"""vLLM's plug-in on the real vLLM: adapters of any kind by name, each as PEFT answers, or refused with the reason."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from torch import Tensor

from loraover_serve import EngineResult, verify_adapter
from loraover_serve.vllm.server import VllmServerConfig

from support.compatibility import PluginRow, record_row
from support.engine_forms import TINY
from support.make_checkpoint import edit_tensors
from support.plugin import DAMAGED, MAX_RANK, SOURCES, UNLIKE, Plugged, make_adapters, plugged, reason
from support.vllm_command import assert_as_trained, vllm_command
from support.vllm_loading import serving_loader

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plugged]:
    vllm_command()  # skips the tests before anything is made
    folder = tmp_path_factory.mktemp("plugged")
    with plugged(folder / "server", make_adapters(folder), folder / "cache") as running:
        yield running


def verified(server: Plugged, name: str, trained: str) -> EngineResult:
    """The verdict on a server's answers under a name, against those that PyTorch gives with a trained adapter."""
    report = verify_adapter(
        server.adapters / trained, endpoint=server.server.url, served_name=name, base_name=str(server.base)
    )
    (found,) = report.engines
    print(f"\n{name}: {found.verdict}: {found.reason}")
    assert report.reference == ("the unfolded checkpoint" if trained == "checkpoint" else "PEFT")
    return found


@pytest.mark.parametrize("name", ["loha", "pissa"])
def test_an_adapter_of_another_kind_answers_as_peft_does(name: str, server: Plugged) -> None:
    """`test_every_row` has all kinds."""
    assert_as_trained(verified(server, name, name))


ROWS = {**dict.fromkeys(SOURCES), "checkpoint": None, "misplaced": "plain", **dict.fromkeys([*DAMAGED, *UNLIKE], "")}
"""Adapters of the table; the one that is the reference, if another is, or "" if none is right."""


@pytest.mark.matrix
@pytest.mark.parametrize("name", ROWS)
def test_every_row(name: str, server: Plugged, stock: Plugged) -> None:
    """The stock server gets adapters by its own route, and the plug-in by the name in a request."""
    trained = name if ROWS[name] is None else ROWS[name]
    loaded = stock.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(stock.adapters / name)})
    asked = server.complete(name)
    for running, which, status in ((stock, "stock", loaded.status_code), (server, "plug-in", asked.status_code)):
        verdict, nats = "refused", None
        if status == 200 and trained:
            found = verified(running, name, trained)
            assert found.adapter is not None
            right = found.adapter.rms <= (found.allowed or 0.0)
            verdict, nats = "as trained" if right else "wrong silently", found.adapter.rms
        elif status == 200:
            verdict = "wrong silently"  # PEFT cannot load such files
        record_row(PluginRow(name, which, status, verdict, nats))
        if which == "plug-in":
            assert verdict == ("as trained" if trained else "refused")


@pytest.fixture(scope="module")
def stock(server: Plugged, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plugged]:
    """A vLLM without the plug-in, on the same model."""
    log = tmp_path_factory.mktemp("stock") / "vllm.log"
    options = ("--enable-lora", "--max-loras", "2", "--max-lora-rank", str(MAX_RANK), *TINY)
    with serving_loader(VllmServerConfig(str(server.base), options=options), log) as client:
        yield Plugged(client, server.base, server.adapters, server.cache, log)


def test_names_of_the_settings_are_prepared_when_the_server_starts(server: Plugged) -> None:
    """No request asks for them."""
    deadline = time.monotonic() + 60
    while (
        not (found := {each["name"]: each for each in server.get("/v1/adapters").json()["adapters"]})
        .get("first", {})
        .get("digest")
    ):
        assert time.monotonic() < deadline, found
        time.sleep(0.2)
    assert found["first"]["status"] == "ready"
    assert "absent cannot be prepared: there is no such adapter" in server.log.read_text(errors="replace")


def test_a_wrong_prefix_is_mended(server: Plugged) -> None:
    answers = [server.complete(name).json() for name in ("plain", "misplaced", str(server.base))]
    texts = [answer["choices"][0]["text"] for answer in answers]
    assert texts[0] == texts[1] != texts[2]
    found = {each["name"]: each for each in server.get("/v1/adapters").json()["adapters"]}
    assert "below 'model.language_model'" in found["misplaced"]["notes"][0]
    assert found["plain"]["done"] == "rewritten"


REFUSED = {name: part for name, (_, part) in (DAMAGED | UNLIKE).items()}


@pytest.mark.parametrize("name", REFUSED)
def test_a_damaged_adapter_is_refused_with_the_reason(name: str, server: Plugged) -> None:
    answer = server.complete(name)
    assert answer.status_code == 400
    assert REFUSED[name] in reason(answer)
    assert str(server.adapters.parent) not in answer.text
    found = {each["name"]: each for each in server.get("/v1/adapters").json()["adapters"]}
    assert (found[name]["status"], found[name]["reason"]) == ("refused", reason(answer).partition(" (param")[0])


def test_a_name_of_nothing_is_not_found(server: Plugged) -> None:
    assert server.complete("nothing").status_code == 404
    assert server.post("/v1/adapters/nothing/prefetch").status_code == 404
    assert server.get("/v1/adapters/nothing/certificate").status_code == 404


def test_the_routes_of_an_operator(server: Plugged) -> None:
    answer = server.post("/v1/adapters/vera/prefetch")
    assert (answer.status_code, answer.json()["done"]) == (200, "converted")
    found = server.get("/v1/adapters/vera/certificate")
    assert found.json()["prepared"]["digest"] == answer.json()["digest"]
    assert found.json()["certificate"]["verdict"] == "passed"
    assert str(server.adapters) not in found.text
    assert server.get("/v1/adapters").json()["max_lora_rank"] == MAX_RANK
    assert server.post("/v1/adapters/narrow/prefetch").status_code == 400


def test_vllms_own_route_prepares_too(server: Plugged) -> None:
    def load(name: str, folder: Path) -> int:
        return server.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)}).status_code

    assert load("mine", server.adapters / "lokr") == 200
    assert server.complete("mine").status_code == 200
    assert load("mine", server.adapters / "lokr") == 400  # it is loaded already
    assert load("wrong", server.adapters / "narrow") == 400


def test_a_change_in_place_is_served_after_an_unload(server: Plugged) -> None:
    folder = shutil.copytree(server.adapters / "plain", server.adapters / "changing")
    before = server.complete("changing").json()["choices"][0]["text"]
    edit_tensors(folder / "adapter_model.safetensors", lambda tensors: [tensor.zero_() for tensor in tensors.values()])
    assert server.complete("changing").json()["choices"][0]["text"] == before
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "changing"}).status_code == 200
    after = server.complete("changing").json()["choices"][0]["text"]
    assert after == server.complete(str(server.base)).json()["choices"][0]["text"] != before


def scale(factor: float, tensors: dict[str, Tensor]) -> None:
    for tensor in tensors.values():
        tensor.mul_(factor)


def test_many_cold_requests_while_the_worker_is_killed(server: Plugged) -> None:
    names = [f"cold-{k}" for k in range(5)]
    for k, name in enumerate(names, 1):
        folder = shutil.copytree(server.adapters / "loha", server.adapters / name)
        edit_tensors(folder / "adapter_model.safetensors", partial(scale, 1 + k / 10))
    before = server.worker()
    before.suspend()  # so that no request is answered before the kill
    with ThreadPoolExecutor(20) as pool:
        answers = [pool.submit(server.complete, name) for name in names * 4]
        before.kill()
        refused = {reason(each) for answer in answers if (each := answer.result()).status_code != 200}
    assert refused == set()
    assert server.worker().pid != before.pid


def test_a_cache_that_cannot_be_written_is_no_refusal_for_ever(server: Plugged) -> None:
    folder = shutil.copytree(server.adapters / "plain", server.adapters / "later")
    edit_tensors(folder / "adapter_model.safetensors", lambda tensors: [tensor.mul_(2) for tensor in tensors.values()])
    aside = server.cache.rename(server.cache.with_name("aside"))
    server.cache.write_text("a file where the folder was")
    answer = server.complete("later")
    server.cache.unlink()
    aside.rename(server.cache)
    assert answer.status_code == 400
    assert "cannot be written" in reason(answer)
    assert server.complete("later").status_code == 200


def test_the_log_has_no_traceback_for_a_users_mistake(server: Plugged) -> None:
    """Whatever the tests before asked for: a mistake is an answer, not a fault of the server."""
    assert "Traceback" not in server.log.read_text(errors="replace")
