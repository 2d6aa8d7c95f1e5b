"""Caches of the real vLLM, which goes by an adapter's name and path, and of llama-server, which goes by tokens."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from loraover.client.endpoint import Endpoint
from loraover_serve.judge.asker import Asker
from loraover_serve.judge.caches import ask_warm
from loraover_serve.judge.names import STALE_OF_ADAPTER, STALE_OF_EARLIER
from loraover_serve.judge.results import Caches
from loraover_serve.vllm.server import VllmServerConfig

from support.long_questions import LongCase
from support.real_servers import llama_server
from support.vllm_loading import FEW_BLOCKS, load_adapter, serving_loader, unload_adapter

pytestmark = pytest.mark.engine

OPTIONS = ("--enforce-eager", "--enable-lora", "--max-model-len", "1024", "--enable-prompt-tokens-details", *FEW_BLOCKS)


def asked(url: str, case: LongCase, name: str, base: str | None = None, protocol: str = "openai") -> Caches:
    asker = Asker.of(case.reference, Endpoint(url), name, base, protocol)
    return ask_warm(Asker(case.caches, asker.speaker, asker.names, asker.find_other))


@pytest.mark.matrix
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_that_is_rewritten_is_named_and_a_new_path_passes(
    dtype: str, long_case: LongCase, tmp_path: Path
) -> None:
    live = shutil.copytree(long_case.earlier, tmp_path / "live")
    config = VllmServerConfig(str(long_case.base), options=("--dtype", dtype, *OPTIONS))
    with serving_loader(config, tmp_path / "vllm.log") as server:
        assert server.engine() == ("vllm", server.version())
        load_adapter(server, "shop", live)
        before = asked(server.url, long_case, "shop", str(long_case.base))
        assert before.verdict == "as trained", "an earlier version is right on its own keys and values"
        unload_adapter(server, "shop")
        shutil.rmtree(live)
        load_adapter(server, "shop", shutil.copytree(long_case.adapter, live))
        rewritten = asked(server.url, long_case, "shop", str(long_case.base))
        print(f"\n{rewritten.verdict}: {rewritten.reason}")
        assert (rewritten.verdict, rewritten.fault) == ("differs", STALE_OF_EARLIER)
        unload_adapter(server, "shop")
        load_adapter(server, "shop", shutil.copytree(long_case.adapter, tmp_path / "new"))
        moved = asked(server.url, long_case, "shop", str(long_case.base))
        print(f"{moved.verdict}: {moved.reason}")
        assert (moved.verdict, moved.fault) == ("as trained", None)


def test_llama_servers_host_memory_gives_the_base_model_what_the_adapter_has_read(
    long_case: LongCase, tmp_path: Path
) -> None:
    with llama_server(long_case.base, long_case.adapter, tmp_path) as url:
        found = asked(url, long_case, "0", protocol="llama-server")
        engine, _ = Endpoint(url).engine() or ("", "")
        assert engine == "llamacpp"
    print(f"\n{found.verdict}: {found.reason}")
    assert (found.verdict, found.fault) == ("differs", STALE_OF_ADAPTER)
    right = [each for each in found.warm if "every slot" not in each.after]
    assert max(abs(each.value) for one in right for each in one.strengths.values()) < 0.01, "all else is right"
