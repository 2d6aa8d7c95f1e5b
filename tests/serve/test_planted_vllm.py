"""Every planted fault of servers and base models, in the real vLLM, has its verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from loraover.client.endpoint import Endpoint
from loraover_serve.judge.names import INTERMITTENT, LEAKS
from loraover_serve.verify.by_pytorch import verify_engine
from loraover_serve.vllm.client import VllmServer
from loraover_serve.vllm.server import VllmServerConfig

from support.engine_forms import TINY
from support.openai_server import openai_server
from support.planted_faults import FAULTS, Ask, Fault, models, reply
from support.verified import Case
from support.vllm_command import leaks_in_mixed_batches
from support.vllm_loading import serving_loader

pytestmark = pytest.mark.matrix

Started = Callable[[Fault, ExitStack], Ask]


@pytest.fixture(scope="module")
def started(sharp: Case, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    """Starts the vLLM server that a fault is planted in; those with the right base model are one, which goes on.

    Each takes more than a gibibyte, so another base model's server ends with its test.
    """
    folder = tmp_path_factory.mktemp("vLLM")
    adapters = {name: adapter for name, adapter in models(sharp, folder).items() if adapter is not None}
    numbers = count()
    options = (*TINY, "--logprobs-mode", "processed_logprobs")

    def serve(base: Path, more: tuple[str, ...], until: ExitStack) -> Ask:
        config = VllmServerConfig(str(base), adapters, max_lora_rank=8, max_loras=2, options=(*options, *more))
        return asking(until.enter_context(serving_loader(config, folder / f"{next(numbers)}.log")), str(base))

    with ExitStack() as until_the_end:
        right: list[Ask] = []

        def start(fault: Fault, until: ExitStack) -> Ask:
            if fault.cache is not DynamicCache:
                if torch.backends.cpu.get_cpu_capability() in ("NO AVX", "AVX2"):
                    pytest.skip("vLLM keeps keys and values in float8 only on a CPU with AVX-512")
                return serve(sharp.base, ("--kv-cache-dtype", "fp8"), until)
            if fault.base is not None:
                return serve(fault.base(folder / f"base-{next(numbers)}"), (), until)
            if not right:
                right.append(serve(sharp.base, (), until_the_end))
            return right[0]

        yield start


def asking(server: VllmServer, base: str) -> Ask:
    endpoint = Endpoint(server.url)
    return lambda body: endpoint.request("/v1/completions", body | ({"model": base} if body["model"] == "base" else {}))


@pytest.mark.parametrize("name", FAULTS)
def test_each_planted_fault_has_its_verdict(name: str, sharp: Case, started: Started, tmp_path: Path) -> None:
    fault = FAULTS[name]
    with ExitStack() as until:
        running = until.enter_context(openai_server(reply(fault.wrong(started(fault, until))), fault.listed))
        setting = sharp.setting(tmp_path, endpoint=running.url, served_name="shop")
        found = verify_engine("endpoint", setting, sharp.models)
    print(f"\n{name}: {found.verdict}: {found.reason}")
    # A leak is looked at after all other faults. It makes answers of the base model beside the adapter's the adapter's,
    # by which requests happen to share a batch: then a fleet's answers may be those of no known fault.
    leaks = leaks_in_mixed_batches() and (fault.verdict != "differs" or fault.name == INTERMITTENT)
    allowed = {(fault.verdict, fault.name)} | ({("differs", LEAKS)} if leaks else set())
    allowed |= {("differs", None)} if leaks and fault.name == INTERMITTENT else set()
    assert (found.verdict, found.fault) in allowed, found.reason
    assert (found.cache_share > 0) == (fault.cache is not DynamicCache)
