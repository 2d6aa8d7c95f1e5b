"""Reloads and churn on the real vLLM: wrong answers after a reload in place are named, and new paths have none.

A vLLM or a llama-server that is killed meanwhile is told as ended.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from loraover_serve import verify_adapter
from loraover_serve.judge.names import IN_CHURN, SERVER_ENDED, STALE_CACHES, STALE_OF_EARLIER
from loraover_serve.verify.report import EngineResult
from loraover_serve.vllm.server import VllmServerConfig

from support.long_questions import LongCase
from support.real_servers import llama_server
from support.vllm_loading import FEW_BLOCKS, load_adapter, serving_loader, unload_adapter

pytestmark = [pytest.mark.engine, pytest.mark.matrix]

OPTIONS = ("--enforce-eager", "--enable-lora", "--max-model-len", "1024", "--enable-prompt-tokens-details", *FEW_BLOCKS)
SECONDS, KILLED_S = 45.0, 20.0
RELOAD = """
import itertools, json, shutil, sys, time, urllib.request

def post(path, **body):
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    urllib.request.urlopen(request).read()

url, live, pause, *folders = sys.argv[1:]
for turn, folder in enumerate(itertools.cycle(folders) if float(pause) else folders):
    goal = live.format(turn)
    shutil.rmtree(goal, ignore_errors=True)
    shutil.copytree(folder, goal)
    post("/v1/unload_lora_adapter", lora_name="shop")
    post("/v1/load_lora_adapter", lora_name="shop", lora_path=goal)
    time.sleep(float(pause))
"""


def reload(url: str, live: str, *folders: Path, pause: float = 0.0) -> str:
    """The command that loads folders under the adapter's name in turn, by copies of them; {} is the turn."""
    return shlex.join([sys.executable, "-c", RELOAD, url, live, str(pause), *map(str, folders)])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reloads_and_churn(dtype: str, long_case: LongCase, tmp_path: Path) -> None:
    live = shutil.copytree(long_case.earlier, tmp_path / "live")
    config = VllmServerConfig(str(long_case.base), options=("--dtype", dtype, *OPTIONS))

    def verified(**more: Any) -> EngineResult:
        asked: dict[str, Any] = {"endpoint": server.url, "served_name": ["shop"], "base_name": str(long_case.base)}
        (found,) = verify_adapter(references=[long_case.recorded], without_mixed=True, **asked, **more).engines
        print(f"\n{dtype} {found.verdict} {found.fault}: {found.reason}")
        return found

    with serving_loader(config, tmp_path / "vllm.log") as server:
        load_adapter(server, "shop", live)
        rewritten = verified(reload=reload(server.url, str(live), long_case.adapter))
        assert (rewritten.verdict, rewritten.fault) == ("differs", STALE_OF_EARLIER)
        assert f"the server names the same path {live}" in rewritten.reason
        unload_adapter(server, "shop")
        load_adapter(server, "shop", shutil.copytree(long_case.earlier, tmp_path / "earlier"))
        moved = verified(reload=reload(server.url, str(tmp_path / "new"), long_case.adapter))
        assert (moved.verdict, moved.fault) == ("as trained", None)
        versions = long_case.earlier, long_case.adapter
        command = reload(server.url, str(tmp_path / "v{}"), *versions, pause=1.0)
        right = verified(churn_s=SECONDS, run=command, quick=True)
        assert right.churn is not None
        assert right.churn.fault is None
        assert not any(each.wrong for each in right.churn.models)
        unload_adapter(server, "shop")
        load_adapter(server, "shop", shutil.copytree(long_case.adapter, tmp_path / "again"))
        command = reload(server.url, str(tmp_path / "live"), *versions, pause=1.0)
        wrong = verified(churn_s=SECONDS, run=command, quick=True)
        assert wrong.churn is not None
        assert wrong.churn.fault in (*STALE_CACHES, *IN_CHURN)
        killed = verified(churn_s=KILLED_S, run=f"sleep 5; kill -9 {server.pid}", quick=True)
        assert (killed.verdict, killed.fault) == ("differs", SERVER_ENDED)


def test_a_llama_server_that_is_killed_in_churn_has_ended(long_case: LongCase, tmp_path: Path) -> None:
    others = {*psutil.Process().children()}  # servers of other tests
    with llama_server(long_case.base, long_case.adapter, tmp_path) as url:
        (server,) = {*psutil.Process().children()} - others
        (found,) = verify_adapter(
            references=[long_case.recorded],
            endpoint=url,
            served_name=["0"],
            protocol="llama-server",
            churn_s=KILLED_S,
            run=f"sleep 5; kill -9 {server.pid}",
            quick=True,
            without_template=True,
        ).engines
    print(f"\n{found.verdict} {found.fault}: {found.reason}")
    assert (found.verdict, found.fault) == ("differs", SERVER_ENDED)
    assert found.churn is not None
    assert any(each.answers for each in found.churn.models), "it has answered before"
