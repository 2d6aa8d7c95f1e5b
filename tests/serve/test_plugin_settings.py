"""The plug-in's settings and names, and what it may import and install in vLLM's environment."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from loraover.common.errors import ExportError
from loraover_serve import serve_adapters
from loraover_serve.plugin.front import LINE_BYTES, Front
from loraover_serve.plugin.service import GRACE_S, Folders, Holds, PluginServer, Service, is_whole
from loraover_serve.plugin.settings import RefusedError, Settings, folder_of, read_settings
from loraover_serve.plugin.worker import answer_to

from support.lines import Lines
from support.vllm_command import vllm_command
from support.vllm_stand_in import stand_in

COMMIT = 40 * "7"
ROOT = Path(__file__).parents[2]


def settings_of(adapters: Path, **more: str) -> Settings:
    found = read_settings({"LORAOVER_ADAPTERS": str(adapters)} | {f"LORAOVER_{k}": v for k, v in more.items()})
    assert found is not None
    return found


def test_settings_of_the_environment(tmp_path: Path) -> None:
    assert read_settings({"LORAOVER_CACHE": "/cache"}) is None, "it does nothing without a folder"
    numbers = {"APPROXIMATE": "16", "THREADS": "3", "RELOAD": "1", "SETTLE": "0.5"}
    found = settings_of(tmp_path, CACHE="/cache", PREPARE="shop, support", HUB_ALLOW="org/*", **numbers)
    assert (found.adapters, found.cache, found.approximate, found.threads) == (tmp_path, Path("/cache"), 16, 3)
    assert found.prepare == ("shop", "support")
    assert (found.reload, found.settle_s, settings_of(tmp_path).reload) == (True, 0.5, False)
    allowed = ["org/a", "org/a@main", "other/a", "org", "org/a/b", "../org/a"]
    assert [found.is_on_hub(name) for name in allowed] == [True, True, False, False, False, False]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ADAPTERS", "/nowhere"),
        ("THREADS", "0"),
        ("APPROXIMATE", "few"),
        ("PYTHON", "/no"),
        ("RELOAD", "yes"),
        ("SETTLE", "nan"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(name: str, value: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"LORAOVER_{name} is '{value}'"):
        settings_of(tmp_path, **{name: value})


Answer = Callable[..., Awaitable[dict[str, Any]]]


class Answering(Front):
    """A worker's front that answers by itself."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    @property
    def pid(self) -> int | None:
        return 1

    async def prepare(self, **request: Any) -> dict[str, Any]:
        return await self._answer(**request)


def front_of(folder: Path, program: str) -> Front:
    """The server's side of a worker whose Python is this program."""
    python = folder / "python"
    python.write_text(program)
    python.chmod(0o755)
    return Front(settings_of(folder, PYTHON=str(python)))


@pytest.mark.process
def test_the_worker_may_live_in_another_environment(tmp_path: Path) -> None:
    mark = tmp_path / "mark"

    async def ask() -> None:
        front = front_of(tmp_path, f'#!/bin/sh\ntouch {mark}\nexec {sys.executable} "$@"\n')
        with pytest.raises(RefusedError, match="expected a folder that holds it"):
            await front.prepare(source=str(tmp_path), cache=str(tmp_path / "cache"), model="base")
        assert front.pid is not None
        os.kill(front.pid, signal.SIGKILL)
        while front.pid is not None:
            await asyncio.sleep(0.05)

    asyncio.run(ask())
    assert mark.exists()


@pytest.mark.process
def test_a_worker_that_cannot_be_read_is_ended(tmp_path: Path) -> None:
    """Else it would count as one that runs, and every later request would wait for it for ever."""
    line = f"print({LINE_BYTES + 1} * 'x', flush=True)"

    async def ask() -> None:
        program = f"#!{sys.executable}\nimport sys, time\nsys.stdin.readline()\n{line}\ntime.sleep(60)\n"
        front = front_of(tmp_path, program)
        with pytest.raises(RefusedError, match="ended while it worked on this one"):
            await asyncio.wait_for(front.prepare(source="shop"), 20)
        assert front.pid is None

    asyncio.run(ask())


def test_an_answer_of_the_worker_fits_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ExportError(f"the key {LINE_BYTES * 'x'}")

    monkeypatch.setattr("loraover_export.prepare_adapter", refuse)
    reason = answer_to({"source": "shop"})["refused"]
    assert reason.startswith("the key xxx")
    assert reason.endswith("characters are left out)")
    assert len(reason) < LINE_BYTES / 100


@pytest.mark.parametrize("name", ["../out", "a/../../out", "/etc", "", "a//b", ".", "a\0b", "link", "file", "a" * 300])
def test_no_name_leads_out_of_the_folder(name: str, tmp_path: Path) -> None:
    for folder in ("adapters/a/b", "out", "adapters/file"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "adapters/link").symlink_to(tmp_path / "out")
    (tmp_path / "adapters/file/adapter_config.json").symlink_to(tmp_path / "out")
    adapters = (tmp_path / "adapters").resolve()
    assert folder_of(adapters, "a/b") == adapters / "a/b"
    assert folder_of(adapters, "c") is None
    with pytest.raises(RefusedError):
        folder_of(adapters, name)


def test_the_worker_answers_for_a_name_of_the_hub_and_for_a_refusal(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "hub" / "models--org--shop"
    for folder in ("refs", "snapshots"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "snapshots" / COMMIT).symlink_to(adapter)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    request = {"cache": str(tmp_path / "cache"), "model": str(base), "dtype": "fp32"}
    answer = answer_to({"hub": "org/shop", **request})
    prepared = json.loads(json.dumps(answer))["prepared"]
    assert prepared["done"] == json.loads(Path(prepared["record"]).read_text())["done"] == "rewritten"
    assert "its rank is 6" in answer_to({"source": str(adapter), **request, "max_lora_rank": 1})["refused"]
    assert "cannot be reached" in answer_to({"hub": "org/other", **request})["refused"]
    (repository / "snapshots" / COMMIT).unlink()
    torn = shutil.copytree(adapter, repository / "snapshots" / COMMIT) / "adapter_model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-100])
    reason = answer_to({"hub": "org/shop", **request})["refused"]
    assert reason.startswith("org/shop/adapter_model.safetensors: not a complete safetensors file")


def test_a_service_fits_its_server_and_names_no_path(tmp_path: Path) -> None:
    async def refuse(**request: str) -> dict[str, Any]:
        raise RefusedError(f"{request['source']} does not fit {request['model']} below {request['cache']}")

    (tmp_path / "adapters" / "shop").mkdir(parents=True)
    service = Service(settings_of(tmp_path / "adapters", APPROXIMATE="32"), Answering(refuse))
    with pytest.raises(ValueError, match="LORAOVER_APPROXIMATE is 32, more than --max-lora-rank, which is 16; lower"):
        service.serve(PluginServer("base", "fp32", 16, "0.33.0"))
    service.serve(PluginServer(str(tmp_path / "models" / "base"), "fp32", 32, "0.33.0"))
    with pytest.raises(RefusedError, match=r"^shop does not fit base below the cache$"):
        asyncio.run(service.find("shop"))


def half_overwrite(file: Path, half: int) -> None:
    """Overwrite the first or second half of a file in place, so that it keeps its size."""
    size = file.stat().st_size // 2
    with file.open("r+b") as opened:
        opened.seek(half * size)
        opened.write(b"n" * size)


@pytest.mark.parametrize("begins", ["before it is asked for", "while it is prepared"])
def test_a_folder_that_is_half_overwritten_is_not_prepared(begins: str, tmp_path: Path) -> None:
    file, seen = tmp_path / "adapters" / "shop" / "adapter_model.safetensors", []

    async def prepare(**_: object) -> dict[str, Any]:
        seen.append(file.read_bytes())
        if begins == "while it is prepared" and len(seen) == 1:
            half_overwrite(file, 0)
            asyncio.get_running_loop().call_later(0.15, half_overwrite, file, 1)
        return made(tmp_path, f"digest-{len(seen)}")

    async def ask() -> dict[str, object] | None:
        if begins == "before it is asked for":
            half_overwrite(file, 0)
            asyncio.get_running_loop().call_later(0.15, half_overwrite, file, 1)
        return await service.find("shop")

    service = service_of(tmp_path, prepare, SETTLE="0.3")
    found = asyncio.run(ask())
    assert seen == [8 * b"o", 8 * b"n"][-len(seen) :]
    assert seen[-1] == 8 * b"n"
    assert found is not None
    assert found["digest"] == f"digest-{len(seen)}"
    assert len(seen) == (1 if begins == "before it is asked for" else 2)


def test_a_folder_that_never_rests_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(8 * b"o")

    async def ask() -> None:
        writing = asyncio.create_task(write())
        with pytest.raises(RefusedError, match="its files are still being written; ask again"):
            await Folders(0.2, patience_s=0).settle(tmp_path)
        writing.cancel()

    async def write() -> None:
        for k in range(100):
            await asyncio.sleep(0.05)
            half_overwrite(file, k % 2)

    asyncio.run(ask())


def test_the_list_names_the_served_version_the_prepared_one_and_a_change(tmp_path: Path) -> None:
    file = tmp_path / "adapters" / "shop" / "adapter_model.safetensors"

    async def prepare(**_: object) -> dict[str, Any]:
        content = file.read_bytes()
        if content.startswith(b"bad"):
            raise RefusedError("it is bad")
        return made(tmp_path, content.decode())

    def shown(path: str) -> tuple[object, ...]:
        (found,) = service.shown({"shop": path})["adapters"]
        keys = ("status", "served_digest", "prepared_digest", "changed_on_disk", "reason")
        return tuple(found.get(key) for key in keys)

    service = service_of(tmp_path, prepare, SETTLE="0")
    first = asyncio.run(service.find("shop"))
    assert first is not None
    served = first["path"]
    assert shown("") == ("ready", None, "oooooooo", False, None)
    assert shown(served) == ("ready", "oooooooo", "oooooooo", False, None)
    file.write_bytes(b"nnnnnnnn")
    assert shown(served) == ("ready", "oooooooo", "oooooooo", True, None)
    assert list(service.changed({"shop": served})) == ["shop"]
    renewed = asyncio.run(service.renew("shop", file.parent))
    assert renewed is not None
    assert shown(served) == ("ready", "oooooooo", "nnnnnnnn", True, None)
    assert shown(renewed["path"]) == ("ready", "nnnnnnnn", "nnnnnnnn", False, None)
    assert not service.changed({"shop": renewed["path"]})
    file.write_bytes(b"bad")
    with pytest.raises(RefusedError, match="it is bad"):
        asyncio.run(service.renew("shop", file.parent))
    assert shown(renewed["path"]) == ("refused", "nnnnnnnn", "nnnnnnnn", True, "it is bad")
    assert not service.changed({"shop": renewed["path"]}), "it is not tried again at each look"
    shutil.rmtree(file.parent)
    assert shown(renewed["path"])[3], "and a folder that is gone has changed"
    assert not service.changed({"shop": renewed["path"]})


@pytest.mark.process
def test_the_documented_removal_spares_what_a_server_may_read_again(tmp_path: Path) -> None:
    """The first version, too, which a request that still runs may need."""
    file = tmp_path / "adapters" / "shop" / "adapter_model.safetensors"

    service = service_of(tmp_path, copied(tmp_path, file), SETTLE="0")
    asyncio.run(service.find("shop"))
    file.write_text("next")
    asyncio.run(service.find("shop"))
    made(tmp_path, "another")
    (tmp_path / "cache" / "locks").mkdir()
    page = (ROOT / "docs/how-to/serve-any-adapter.md").read_text()
    lines = page.partition("cd ~/.cache/loraover/adapters && ")[2].partition("```")[0]
    lines = lines.replace("-mtime +30", "")
    subprocess.run(["bash", "-ec", lines], cwd=tmp_path / "cache", check=True)
    left = {path.name for path in (tmp_path / "cache").iterdir()}
    assert left == {"oooooooo", "next", "held", "locks"}


def is_removable(cache: Path, digest: str) -> bool:
    """Whether the documented removal would take a prepared adapter."""
    return subprocess.run(["flock", "-n", cache / "held" / digest, "true"]).returncode == 0


@pytest.mark.process
def test_a_version_stays_until_the_last_replica_lets_it_go(tmp_path: Path) -> None:
    for digest in ("old", "new"):
        made(tmp_path, digest)
    cache = tmp_path / "cache"
    replicas = [Holds(cache) for _ in range(2)]
    assert [each.hold(digest) for each in replicas for digest in ("old", "new")] == 4 * [True]
    replicas[0].let_go("old")
    assert not is_removable(cache, "old"), "the other replica may read it again"
    for digest in ("old", "new"):
        replicas[1].let_go(digest)
    assert [is_removable(cache, digest) for digest in ("old", "new")] == [True, False]
    shutil.rmtree(cache / "held")
    assert replicas[0].hold("new")
    assert not is_removable(cache, "new"), "a file of the lock that was removed is made again"
    shutil.rmtree(cache / "new")
    assert not Holds(cache).hold("new"), "after a restart, an adapter that was removed is prepared again"


def test_a_version_is_let_go_when_no_request_can_need_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, now = tmp_path / "adapters" / "shop" / "adapter_model.safetensors", [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def after(seconds: float, *used: dict[str, Any]) -> list[bool]:
        now[0] += seconds
        service.let_go({each["path"] for each in used})
        return [is_removable(tmp_path / "cache", digest) for digest in ("oooooooo", "next")]

    service = service_of(tmp_path, copied(tmp_path, file), SETTLE="0")
    old = asyncio.run(service.find("shop"))
    file.write_text("next")
    new = asyncio.run(service.find("shop"))
    assert old is not None
    assert new is not None
    assert after(GRACE_S - 1, new) == [False, False], "a request may still be on its way"
    assert after(2, old, new) == [False, False], "a request runs with the earlier version"
    assert after(GRACE_S - 1, new) == [False, False]
    assert after(2, new) == [True, False]
    assert after(10 * GRACE_S, new) == [True, False], "what is served is held"
    assert list(service.changed({"shop": new["path"]})) == [], "and known"


def test_a_version_that_is_taken_up_again_is_not_let_go_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rollback long after the version was served last, with a look at what may go before it is served again."""
    file, now, hold = tmp_path / "adapters" / "shop" / "adapter_model.safetensors", [1000.0], Holds.hold
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def hold_and_look(holds: Holds, digest: str) -> bool:
        is_there = hold(holds, digest)
        service.let_go(())
        return is_there

    service = service_of(tmp_path, copied(tmp_path, file), SETTLE="0")
    for content in ("old", "new"):
        file.write_text(content)
        asyncio.run(service.find("shop"))
    now[0] += GRACE_S + 1
    file.write_text("old")
    monkeypatch.setattr(Holds, "hold", hold_and_look)
    asyncio.run(service.find("shop"))
    assert [is_removable(tmp_path / "cache", digest) for digest in ("old", "new")] == [False, True]


def test_threads_may_hold_and_let_go_of_one_version(tmp_path: Path) -> None:
    made(tmp_path, "digest")
    holds, before = Holds(tmp_path / "cache"), len(list(Path("/proc/self/fd").iterdir()))

    def use(number: int) -> None:
        for _ in range(500):
            if number % 2:
                holds.let_go("digest")
            elif number:
                assert holds.hold("digest")
            else:  # as where the folder of locks is removed, so that each lock is made again
                (tmp_path / "cache" / "held" / "digest").unlink(missing_ok=True)

    holds.hold("digest")
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    with ThreadPoolExecutor(5) as pool:
        list(pool.map(use, range(5)))
    sys.setswitchinterval(interval)
    holds.let_go("digest")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


HEADERS = [
    "[]",
    '{"a": []}',
    '{"a": {}}',
    '{"a": {"data_offsets": [0]}}',
    '{"a": {"data_offsets": "xy"}}',
    100_000 * "[",
]


@pytest.mark.parametrize("header", HEADERS)
def test_a_copy_with_an_odd_header_is_not_whole(header: str, tmp_path: Path) -> None:
    """A load that meets it has to wait, since an error there ends the server."""
    folder = Path(made(tmp_path, "digest")["path"])
    assert is_whole(folder)
    (folder / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode())
    assert not is_whole(folder)


def test_without_reloading_only_what_was_lost_is_prepared_again(tmp_path: Path) -> None:
    async def prepare(**_: object) -> dict[str, Any]:
        return made(tmp_path, "digest")

    service = service_of(tmp_path, prepare, SETTLE="0", RELOAD="0")
    found = asyncio.run(service.find("shop"))
    assert found is not None
    served, folder = {"shop": found["path"]}, tmp_path / "adapters" / "shop"
    assert service.changed(served) == {}
    shutil.rmtree(found["path"])
    assert service.changed(served) == {"shop": folder}
    (folder / "adapter_model.safetensors").write_text("another")
    assert service.changed(served) == {}, "a new version is not what was lost"


@pytest.mark.parametrize("harm", ["removed", "torn", "empty", "another"])
def test_a_served_adapter_that_the_cache_lost_is_prepared_again(harm: str, tmp_path: Path) -> None:
    seen = []

    async def prepare(**_: object) -> dict[str, Any]:
        record = tmp_path / "cache" / "digest" / "prepared.json"
        seen.append(record.exists())
        return fields if record.exists() else made(tmp_path, "digest")

    fields: dict[str, Any] = made(tmp_path, "digest")
    (tmp_path / "cache" / "digest" / "prepared.json").unlink()
    service = service_of(tmp_path, prepare, SETTLE="0")
    found = asyncio.run(service.find("shop"))
    assert found is not None
    served, tensors = {"shop": found["path"]}, Path(found["path"], "adapter_model.safetensors")
    assert not service.changed(served)
    content = tensors.read_bytes()
    if harm == "removed":
        shutil.rmtree(found["path"])
    else:
        tensors.write_bytes({"torn": content[:-1], "empty": b"", "another": 16 * b"\xff"}[harm])
    assert not is_whole(Path(found["path"]))
    ((name, folder),) = service.changed(served).items()
    again = asyncio.run(service.renew(name, folder))
    assert again is not None
    assert seen == [False, True, False], "what the cache has is torn, and is made again without its record"
    assert again["path"] == found["path"]
    assert is_whole(Path(found["path"]))


def copied(folder: Path, file: Path) -> Answer:
    """Worker whose prepared adapter has the text of a file as its digest."""

    async def prepare(**_: object) -> dict[str, Any]:
        return made(folder, file.read_text())

    return prepare


def service_of(folder: Path, prepare: Answer, **more: str) -> Service:
    """The service of a folder with the adapter "shop", whose worker answers so."""
    shop = folder / "adapters" / "shop"
    shop.mkdir(parents=True)
    (shop / "adapter_config.json").write_text("{}")
    (shop / "adapter_model.safetensors").write_bytes(8 * b"o")
    settings = settings_of(folder / "adapters", **{"CACHE": str(folder / "cache"), "RELOAD": "1"} | more)
    service = Service(settings, Answering(prepare))
    service.serve(PluginServer("base", "fp32", 16, "0.33.0"))
    return service


def made(root: Path, digest: str) -> dict[str, Any]:
    """A prepared adapter in the cache."""
    folder = root / "cache" / digest
    (folder / "adapter").mkdir(parents=True, exist_ok=True)
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    save_file({"a": np.ones(2)}, folder / "adapter" / "adapter_model.safetensors")
    (folder / "prepared.json").touch()
    return {"digest": digest, "path": str(folder / "adapter"), "rank": 4, "done": "taken", "notes": [], "cached": False}


@pytest.mark.process
@pytest.mark.parametrize(("mode", "warns"), [("reloads", False), ("answers", True)])
def test_a_server_that_reloads_nothing_is_warned_of(mode: str, warns: bool, base: Path, tmp_path: Path) -> None:
    """As on a release of vLLM that is not known."""
    said, vllm = Lines(), stand_in(tmp_path, mode)
    with serve_adapters(folder=tmp_path, model=base, vllm=vllm, log=tmp_path / "log", report=said) as server:
        assert not server.names
    assert any("changed folders are not reloaded" in line for line in said.lines) == warns


@pytest.mark.process
def test_the_servers_side_imports_the_standard_library_only() -> None:
    """Python without its site-packages has nothing else; `vllm.py` adds vLLM and its web framework."""
    path = [str(ROOT), str(ROOT / "export"), str(ROOT / "serve")]
    code = f"import sys; sys.path += {path!r}; import loraover_serve.plugin.service"
    subprocess.run([sys.executable, "-S", "-c", code], check=True, env={})


@pytest.mark.process
def test_the_extra_adds_nothing_to_vllms_environment() -> None:
    """What pip would install there, without an index to take anything else from."""
    python = vllm_command().with_name("python")
    options = ["--dry-run", "--no-index", "--no-build-isolation", "--quiet", "--report", "-"]
    done = subprocess.run(
        [str(python), "-m", "pip", "install", *options, f"{ROOT}[load]"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert [entry["metadata"]["name"] for entry in json.loads(done.stdout)["install"]] == ["loraover"]
