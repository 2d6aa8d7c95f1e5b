"""The plug-in's settings and names, and what it may import and install in vLLM's environment."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from loraover.common.errors import ExportError
from loraover_serve.plugin.front import LINE_BYTES, Front
from loraover_serve.plugin.service import PluginServer, Service
from loraover_serve.plugin.settings import RefusedError, Settings, folder_of, read_settings
from loraover_serve.plugin.worker import answer_to

from support.vllm_command import vllm_command

COMMIT = 40 * "7"
ROOT = Path(__file__).parents[2]


def settings_of(adapters: Path, **more: str) -> Settings:
    found = read_settings({"LORAOVER_ADAPTERS": str(adapters)} | {f"LORAOVER_{k}": v for k, v in more.items()})
    assert found is not None
    return found


def test_settings_of_the_environment(tmp_path: Path) -> None:
    assert read_settings({"LORAOVER_CACHE": "/cache"}) is None, "it does nothing without a folder"
    numbers = {"APPROXIMATE": "16", "THREADS": "3"}
    found = settings_of(tmp_path, CACHE="/cache", PREPARE="shop, support", HUB_ALLOW="org/*", **numbers)
    assert (found.adapters, found.cache, found.approximate, found.threads) == (tmp_path, Path("/cache"), 16, 3)
    assert found.prepare == ("shop", "support")
    allowed = ["org/a", "org/a@main", "other/a", "org", "org/a/b", "../org/a"]
    assert [found.is_on_hub(name) for name in allowed] == [True, True, False, False, False, False]


@pytest.mark.parametrize(
    ("name", "value"), [("ADAPTERS", "/nowhere"), ("THREADS", "0"), ("APPROXIMATE", "few"), ("PYTHON", "/no")]
)
def test_a_setting_that_cannot_be_used_is_named(name: str, value: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"LORAOVER_{name} is '{value}'"):
        settings_of(tmp_path, **{name: value})


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
    assert "its rank is 6" in answer_to({"source": str(adapter), **request, "max_rank": 1})["refused"]
    assert "cannot be reached" in answer_to({"hub": "org/other", **request})["refused"]
    (repository / "snapshots" / COMMIT).unlink()
    torn = shutil.copytree(adapter, repository / "snapshots" / COMMIT) / "adapter_model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-100])
    reason = answer_to({"hub": "org/shop", **request})["refused"]
    assert reason.startswith("org/shop/adapter_model.safetensors: not a complete safetensors file")


def test_a_service_fits_its_server_and_names_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "adapters" / "shop").mkdir(parents=True)
    service = Service(settings_of(tmp_path / "adapters", APPROXIMATE="32"))
    with pytest.raises(ValueError, match="LORAOVER_APPROXIMATE is 32, more than --max-lora-rank, which is 16; lower"):
        service.serve(PluginServer("base", "fp32", 16, "0.33.0"))
    service.serve(PluginServer(str(tmp_path / "models" / "base"), "fp32", 32, "0.33.0"))

    async def refuse(**request: str) -> None:
        raise RefusedError(f"{request['source']} does not fit {request['model']} below {request['cache']}")

    monkeypatch.setattr(service.front, "prepare", refuse)
    with pytest.raises(RefusedError, match=r"^shop does not fit base below the cache$"):
        asyncio.run(service.find("shop"))


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
