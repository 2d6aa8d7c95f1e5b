"""vLLM's plug-in on the real vLLM: adapters of any kind by name, each as PEFT answers, or refused with the reason."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import httpx2
import pytest
from torch import Tensor

from loraover_serve import EngineResult, verify_adapter
from loraover_serve.vllm.server import VllmServerConfig

from support.compatibility import PluginRow, record_row
from support.engine_forms import TINY
from support.make_checkpoint import edit_tensors
from support.plugin import DAMAGED, MAX_RANK, SOURCES, UNLIKE, Plugged, make_adapters, plugged, reason, truncate
from support.vllm_command import assert_as_trained, vllm_command
from support.vllm_loading import serving_loader

pytestmark = pytest.mark.engine

SETTLE_S = 1.5
LONG = {"prompt": "the train", "max_tokens": 100, "temperature": 0, "ignore_eos": True}


@pytest.mark.matrix
def test_the_stock_server_ends_when_a_name_is_loaded_again(tmp_path: Path) -> None:
    """The fault that the plug-in mends; a release of vLLM that passes here needs no mend."""
    options = ("--enable-lora", "--max-loras", "2", "--max-lora-rank", str(MAX_RANK), *TINY)
    vllm_command()  # skips the test before anything is made
    base, adapters = make_adapters(tmp_path)
    log, folders = tmp_path / "vllm.log", [str(adapters / name) for name in ("plain", "first")]
    with serving_loader(VllmServerConfig(str(base), options=options), log) as client:
        stock = Plugged(client, base, adapters, tmp_path, log)
        loads, ends = 0, time.monotonic() + 90

        def has_ended() -> bool:
            return "KeyError" in log.read_text(errors="replace") or time.monotonic() > ends

        def keep_asking() -> None:
            while not has_ended():
                with suppress(httpx2.HTTPError):
                    stock.post("/v1/completions", {"model": "live", **LONG})

        with ThreadPoolExecutor(4) as pool:
            for _ in range(4):
                pool.submit(keep_asking)
            while not has_ended():
                with suppress(httpx2.HTTPError):
                    stock.post("/v1/load_lora_adapter", {"lora_name": "live", "lora_path": folders[loads % 2]})
                    time.sleep(0.2)
                    stock.post("/v1/unload_lora_adapter", {"lora_name": "live"})
                loads += 1
        with pytest.raises(httpx2.HTTPError):
            stock.get("/health")
        print(f"\nthe stock server ended after {loads} loads")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plugged]:
    vllm_command()  # skips the tests before anything is made
    folder = tmp_path_factory.mktemp("plugged")
    with plugged(folder / "server", make_adapters(folder), folder / "cache", settle_s=SETTLE_S) as running:
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
    found = verified(server, name, name)
    assert_as_trained(found)
    assert found.verdict == "as trained", "rows of the base model in mixed batches are its own, too"


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
        .get("prepared_digest")
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
    shutil.copytree(server.adapters / "vera", server.adapters / "prefetched")
    answer = server.post("/v1/adapters/prefetched/prefetch")
    assert (answer.status_code, answer.json()["done"]) == (200, "converted")
    found = server.get("/v1/adapters/prefetched/certificate")
    assert found.json()["prepared"]["digest"] == answer.json()["prepared_digest"]
    assert answer.json()["served_digest"] is None
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


def until(server: Plugged, name: str, **expected: object) -> dict[str, object]:
    """Wait until the list says something of an adapter, and return what it says."""
    deadline = time.monotonic() + 60
    while not expected.items() <= (found := server.listed(name)).items():
        assert time.monotonic() < deadline, (expected, found)
        time.sleep(0.1)
    return found


def text(server: Plugged, name: str) -> str:
    answer = server.complete(name)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def test_a_changed_folder_is_served_anew(server: Plugged) -> None:
    folder = shutil.copytree(server.adapters / "plain", server.adapters / "changing")
    before, first = text(server, "changing"), server.listed("changing")
    assert first["served_digest"] == first["prepared_digest"] is not None
    assert not first["changed_on_disk"]
    edit_tensors(folder / "adapter_model.safetensors", lambda tensors: [tensor.zero_() for tensor in tensors.values()])
    found = server.listed("changing")
    assert (found["served_digest"], found["changed_on_disk"]) == (first["served_digest"], True)
    assert text(server, "changing") == before
    until(server, "changing", changed_on_disk=False)
    after = server.listed("changing")
    assert after["served_digest"] == after["prepared_digest"] != first["served_digest"]
    assert text(server, "changing") == text(server, str(server.base)) != before
    truncate(folder)
    refused = until(server, "changing", status="refused")
    assert (refused["served_digest"], refused["changed_on_disk"]) == (after["served_digest"], True)
    assert "not a complete safetensors file" in str(refused["reason"])
    assert text(server, "changing") == text(server, str(server.base)), "the last whole version is served"


def test_a_folder_is_read_when_it_is_complete(server: Plugged) -> None:
    """Whatever is asked while its tensors are overwritten in place, as a copy does that is slow."""
    old, new = (server.adapters / name / "adapter_model.safetensors" for name in ("plain", "doubled"))
    folder = shutil.copytree(server.adapters / "plain", server.adapters / "slow")
    shutil.copytree(server.adapters / "plain", new.parent)
    edit_tensors(new, partial(scale, 2.0))
    content, file = new.read_bytes(), folder / "adapter_model.safetensors"
    assert len(content) == len(old.read_bytes())
    for name in ("plain", "doubled"):
        text(server, name)
    whole = [server.listed(name)["served_digest"] for name in ("plain", "doubled")]
    with file.open("r+b", buffering=0) as opened, ThreadPoolExecutor(1) as pool:
        asked = None
        for k in range(8):
            opened.write(content[k * len(content) // 8 : (k + 1) * len(content) // 8])
            asked = asked or pool.submit(text, server, "slow")
            assert not asked.done()
            time.sleep(SETTLE_S / 3)
        assert asked is not None
        assert asked.result() == text(server, "doubled")
    assert server.listed("slow")["served_digest"] == whole[1]
    seen = set()
    with file.open("r+b", buffering=0) as opened:
        for k in range(8):
            opened.write(old.read_bytes()[k * len(content) // 8 : (k + 1) * len(content) // 8])
            time.sleep(SETTLE_S / 3)
            seen.add(server.listed("slow")["served_digest"])
    assert seen == {whole[1]}
    until(server, "slow", served_digest=whole[0], changed_on_disk=False)


def test_reloads_beside_running_requests_leave_the_server_alive(server: Plugged) -> None:
    """By the folder, by unloading and by `load_inplace`."""
    names = ["swapped-0", "swapped-1"]
    for k, name in enumerate(names):
        folder = shutil.copytree(server.adapters / "plain", server.adapters / name)
        edit_tensors(folder / "adapter_model.safetensors", partial(scale, 1.0 + k))
    live = shutil.copytree(server.adapters / names[0], server.adapters / "live")

    def ask(name: str) -> tuple[int, str]:
        answer = server.post("/v1/completions", {"model": name, **LONG})
        return answer.status_code, answer.json()["choices"][0]["text"] if answer.is_success else answer.text

    def keep_asking(name: str) -> list[tuple[int, str]]:
        found = []
        while not over.is_set():
            found.append(ask(name))
        return found

    def load(source: str) -> int:
        body = {"lora_name": "loaded", "lora_path": str(server.adapters / source), "load_inplace": True}
        return server.post("/v1/load_lora_adapter", body).status_code

    right = {ask(name) for name in names}
    assert len(right) == 2
    assert load(names[0]) == 200

    def renewed() -> int:
        return server.log.read_text(errors="replace").count("live has changed, and is served from")

    began, k, over = time.monotonic(), 0, threading.Event()
    with ThreadPoolExecutor(4) as pool, ExitStack() as until:
        until.callback(over.set)
        asking = [pool.submit(keep_asking, name) for name in ("live", "loaded", "live", "loaded")]
        while (took := time.monotonic() - began) < 30 or (took < 240 and not renewed()):  # on a slow machine
            k += 1
            assert load(names[k % 2]) == 200
            if k % 24 == 0:
                shutil.copytree(server.adapters / names[k // 24 % 2], live, dirs_exist_ok=True)
            elif k % 24 == 23:  # by then the change has settled
                server.post("/v1/unload_lora_adapter", {"lora_name": "live"})
            time.sleep(0.1)
    found = [answer for each in asking for answer in each.result()]
    missed = sum(status == 404 for status, _ in found)
    print(f"\n{k} loads and {renewed()} changed folders beside {len(found)} requests, {missed} of them refused")
    assert server.get("/health").is_success
    assert {answer for answer in found if answer[0] != 404} == right
    assert missed <= 2 * (k // 24 + 1), "vLLM looks a name up twice, and an unload may fall in between for both"
    assert renewed() > 0


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
