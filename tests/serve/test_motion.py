"""Adapters that change while a server runs: what verify says of the stock server, and what the plug-in makes of it.

`make motion` writes docs/servers-in-motion.md from these tests.
"""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from loraover.client.endpoint import Endpoint
from loraover.common.errors import EngineError
from loraover_serve.judge.asker import Asker
from loraover_serve.judge.caches import ask_warm
from loraover_serve.judge.command import CheckOptions, check
from loraover_serve.judge.limits import OTHER
from loraover_serve.judge.names import LEAKS, STALE_OF_ADAPTER, STALE_OF_EARLIER, TEMPLATE
from loraover_serve.judge.reference import Reference
from loraover_serve.judge.results import Caches
from loraover_serve.verify.chats import pack_chats
from loraover_serve.vllm.client import VllmServer
from loraover_serve.vllm.server import VllmServerConfig

from benchmarks.churn import KINDS, churn, is_right
from support import motion
from support.long_questions import LongCase
from support.plugin import ROOT, plugged
from support.real_servers import llama_server
from support.tiny_hub import tiny_tokenizer
from support.vllm_command import leaks_in_mixed_batches, vllm_command
from support.vllm_loading import FEW_BLOCKS, load_adapter, serving_loader, unload_adapter

pytestmark = pytest.mark.matrix

OPTIONS = ("--max-model-len", "1024", "--max-loras", "1", "--enable-prefix-caching", "--enable-prompt-tokens-details")
STOCK = ("--dtype", "float32", "--enforce-eager", "--enable-lora", "--max-lora-rank", "16", *FEW_BLOCKS, *OPTIONS)
TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}|{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
SYSTEM = "{% if messages[0].role != 'system' %}<system>be rude|{% endif %}" + TURNS
TWO = ("--max-loras", "2", "--chat-template", SYSTEM)
"""Further options: versions share a batch only where two adapters fit into it."""
SETTLE_S = 1.0
TRIES = 5
"""How often a fault is looked for that shows only where the engine's scheduler puts both models into one batch."""
CHURN_S, END_S = 60.0, 30.0
RELOADS, RELOAD_S = 40, 0.2
LONG_ANSWER = 200
Said = tuple[str, str | None]
RIGHT: Said = ("as trained", None)
ENDED: Said = ("ended", None)


@dataclass(frozen=True)
class Moving:
    """A vLLM server whose adapters change, by the stock server's routes or by the plug-in.

    Args:
        server: Its client.
        case: The versions of the adapter, and what PyTorch answers with them.
        column: Column of the table.
        adapters: Folder of the adapters.
        cache: Folder of the plug-in's copies; None without it.
    """

    server: VllmServer
    case: LongCase
    column: str
    adapters: Path
    cache: Path | None = None

    def begin(self, name: str) -> Path:
        """Serve the earlier version under a name, and let the server keep what it reads; returns its folder."""
        folder = self.put(self.case.earlier, name)
        self.load(name, folder)
        assert self.asked(name).verdict == "as trained", "an earlier version is right on its own keys and values"
        return folder

    def put(self, version: Path, name: str) -> Path:
        folder = shutil.copytree(version, self.adapters / name, dirs_exist_ok=True)
        for file in folder.iterdir():
            file.touch()  # written now, as the plug-in's waiting expects
        return folder

    def load(self, name: str, folder: Path) -> None:
        if self.cache is None:
            load_adapter(self.server, name, folder)

    def reload(self, name: str, folder: Path) -> None:
        """The documented way."""
        unload_adapter(self.server, name)
        load_adapter(self.server, name, folder)

    def settle(self, name: str) -> None:
        """Wait until the plug-in serves what lies in the folder; the stock server knows nothing of it."""
        deadline = time.monotonic() + 60
        while self.cache is not None and self.listed(name)["changed_on_disk"]:
            assert time.monotonic() < deadline
            time.sleep(0.2)

    def listed(self, name: str) -> dict[str, Any]:
        adapters = self.server.request("/v1/adapters")["adapters"]
        return next(each for each in adapters if each["name"] == name)

    def evict(self) -> None:
        """Ask another adapter, which takes the one place."""
        self.server.complete("other", [1], max_tokens=1)

    def asked(self, name: str) -> Caches:
        asker = Asker.of(self.case.reference, Endpoint(self.server.url), name, str(self.case.base), "openai")
        return ask_warm(Asker(self.case.caches, asker.speaker, asker.names, asker.find_other))

    def said(self, name: str) -> Said:
        found = self.asked(name)
        return found.verdict, found.fault

    def say(self, row: str, name: str) -> Said:
        """Ask verify, keep what it says, and return its verdict and fault; "ended" if the server does not answer."""
        said = ENDED
        with suppress(EngineError):
            found = self.asked(name)
            if found.verdict != "inconclusive" or self.stays_alive():
                said = found.verdict, found.fault
        print(f"\n{row}, {self.column}: {said}")
        motion.record(row, self.column, shown(said))
        return said

    def stays_alive(self) -> bool:
        """Whether the server does not end within `END_S`, which it takes after a failure."""
        deadline = time.monotonic() + END_S
        while self.server.is_alive() and time.monotonic() < deadline:
            time.sleep(0.5)
        return self.server.is_alive()


def shown(said: Said) -> str:
    """A verdict in words."""
    verdict, fault = said
    return "**the server ended**" if verdict == "ended" else f"*{verdict}*" + (f": {fault}" if fault else "")


@pytest.fixture(scope="module", params=[motion.VERIFY, motion.PLUGIN])
def moving(
    request: pytest.FixtureRequest, long_case: LongCase, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Moving]:
    vllm_command()  # skips the tests before anything is made
    with serve(request.param, long_case, tmp_path_factory.mktemp("moving")) as running:
        yield running


@pytest.fixture(scope="module", params=[motion.VERIFY, motion.PLUGIN])
def of_two(
    request: pytest.FixtureRequest, long_case: LongCase, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Moving]:
    """A server into whose batches two adapters fit, with a system prompt of its own in the chat template."""
    vllm_command()
    with serve(request.param, long_case, tmp_path_factory.mktemp("of-two"), *TWO) as running:
        yield running


@contextmanager
def serve(column: str, case: LongCase, folder: Path, *more: str) -> Iterator[Moving]:
    adapters, base = folder / "adapters", str(case.base)
    shutil.copytree(case.earlier, adapters / "other")
    if column == motion.PLUGIN:
        made = (case.base, adapters)
        with plugged(folder / "server", made, folder / "cache", *OPTIONS, *more, settle_s=SETTLE_S) as found:
            yield Moving(found.server, case, column, adapters, found.cache)
        return
    with serving_loader(VllmServerConfig(base, options=(*STOCK, *more)), folder / "vllm.log") as server:
        load_adapter(server, "other", adapters / "other")
        motion.record_version(server.version())
        yield Moving(server, case, column, adapters)


def rewritten(moving: Moving) -> str:
    folder = moving.begin("rewritten")
    moving.put(moving.case.adapter, "rewritten")
    moving.reload("rewritten", folder)
    return "rewritten"


def in_place(moving: Moving) -> str:
    folder = moving.begin("in-place")
    moving.put(moving.case.adapter, "in-place")
    body = {"lora_name": "in-place", "lora_path": str(folder), "load_inplace": True}
    httpx2.post(f"{moving.server.url}/v1/load_lora_adapter", json=body, timeout=120).raise_for_status()
    return "in-place"


def read_again(moving: Moving) -> str:
    moving.begin("read-again")
    moving.put(moving.case.adapter, "read-again")
    moving.settle("read-again")
    moving.evict()
    return "read-again"


def new_path(moving: Moving) -> str:
    moving.begin("new-path")
    moving.reload("new-path", moving.put(moving.case.adapter, "another-path"))
    moving.evict()
    assert OTHER in {each.arm for each in moving.asked("new-path").warm}, "another adapter is asked in turn, too"
    return "new-path"


@pytest.mark.parametrize(
    ("row", "action", "is_stale"),
    [
        (motion.REWRITTEN, rewritten, True),
        (motion.IN_PLACE, in_place, True),
        (motion.READ_AGAIN, read_again, True),
        (motion.NEW_PATH, new_path, False),
    ],
)
def test_a_version_answers_on_its_own_keys_and_values(
    row: str, action: Callable[[Moving], str], is_stale: bool, moving: Moving
) -> None:
    expected = ("differs", STALE_OF_EARLIER) if is_stale and moving.column == motion.VERIFY else RIGHT
    assert moving.say(row, action(moving)) == expected


def test_rows_of_the_base_model_are_its_own(moving: Moving) -> None:
    """Beside an adapter in one batch, by the answers that the reference has of PyTorch."""
    name = "mixed"
    moving.load(name, moving.put(moving.case.adapter, name))
    for _ in range(TRIES):
        asker = Asker.of(moving.case.reference, Endpoint(moving.server.url), name, str(moving.case.base), "openai")
        found = check(asker, CheckOptions("fp32", without_template=True))
        if found["verdict"] == "differs":
            break
    print(f"\n{moving.column}: {found['verdict']}: {found['reason']}")
    said = found["verdict"], found["fault"]
    motion.record(motion.MIXED, moving.column, shown(said))
    leaks = moving.column == motion.VERIFY and leaks_in_mixed_batches()
    assert said == (("differs", LEAKS) if leaks else RIGHT)


@pytest.mark.parametrize("moving", [motion.PLUGIN], indirect=True)
@pytest.mark.parametrize("row", [motion.LOST, motion.GONE, motion.TORN])
def test_files_that_are_gone_do_not_end_the_server(row: str, moving: Moving) -> None:
    assert lose(moving, row) == RIGHT


@pytest.mark.parametrize("row", [motion.GONE, motion.TORN])
def test_the_stock_server_ends_when_files_are_gone(row: str, long_case: LongCase, tmp_path: Path) -> None:
    with serve(motion.VERIFY, long_case, tmp_path) as stock:
        assert lose(stock, row) == ENDED


def test_replicas_share_a_cache_and_each_serves_a_change_anew(long_case: LongCase, tmp_path: Path) -> None:
    """After the documented removal, and after the end of one of them, too."""
    vllm_command()
    with ExitStack() as until, serve(motion.PLUGIN, long_case, tmp_path) as first:
        assert first.cache is not None
        made = (long_case.base, first.adapters)
        found = until.enter_context(plugged(tmp_path / "second", made, first.cache, *OPTIONS, settle_s=SETTLE_S))
        both = first, Moving(found.server, long_case, motion.PLUGIN, first.adapters, found.cache)
        first.put(long_case.earlier, "shop")
        assert [each.said("shop") for each in both] == 2 * [RIGHT]
        before = {each.listed("shop")["served_digest"] for each in both}
        first.put(long_case.adapter, "shop")
        for each in both:
            each.settle("shop")
            assert each.said("shop") == RIGHT
        after = {each.listed("shop")["served_digest"] for each in both}
        assert len(before) == len(after) == 1
        assert before != after
        until.close()
        subprocess.run(["sh", "-c", removal()], cwd=first.cache, check=True)
        assert before | after <= {path.name for path in first.cache.iterdir()}, "the other replica may read them again"
        first.evict()
        assert first.said("shop") == RIGHT
    subprocess.run(["sh", "-c", removal()], cwd=found.cache, check=True)
    assert {path.name for path in found.cache.iterdir()} <= {"locks", "held"}, "nobody may"


def removal() -> str:
    """The command that the documentation gives for what no server may read again, whatever its age."""
    page = (ROOT / "docs" / "how-to" / "serve-any-adapter.md").read_text(encoding="utf-8")
    (command,) = (line.strip() for line in page.splitlines() if "flock -n held" in line)
    assert " -mtime +30 " in command
    return f"mkdir -p held; {command.replace(' -mtime +30 ', ' ')}"


def lose(moving: Moving, row: str) -> Said:
    """Evict an adapter, take its files away, and ask for it."""
    folder = moving.put(moving.case.adapter, row)
    moving.load(row, folder)
    moving.server.complete(row, [1], max_tokens=1)
    moving.evict()
    if row == motion.LOST:
        assert moving.cache is not None
        digest = moving.listed(row)["served_digest"]
        shutil.rmtree(moving.cache / digest)
    elif row == motion.GONE:
        shutil.rmtree(folder)
    else:
        file = folder / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
    return moving.say(row, row)


def test_another_system_prompt_is_named(of_two: Moving) -> None:
    """Which the plug-in cannot mend: the template is the server's."""
    name, case, told = "chatty", of_two.case, tiny_tokenizer()
    of_two.load(name, of_two.put(case.adapter, name))
    told.chat_template = TURNS
    content = json.loads(gzip.decompress(case.recorded.read_bytes()))
    reference = Reference(content | pack_chats(told, content["vocabulary"]))
    asker = Asker.of(reference, Endpoint(of_two.server.url), name, str(case.base), "openai")
    found = check(asker, CheckOptions("fp32", without_mixed=True))
    print(f"\n{of_two.column}: {found['verdict']}: {found['reason']}")
    said = found["verdict"], found["fault"]
    motion.record(motion.SYSTEM, of_two.column, shown(said))
    assert said == ("differs", TEMPLATE)


def test_a_reload_beside_a_running_request(of_two: Moving) -> None:
    name, server = "live", of_two.server
    versions = of_two.case.earlier, of_two.case.adapter
    folders = [of_two.put(version, f"live-{number}") for number, version in enumerate(versions)]
    of_two.load(name, folders[0])
    if of_two.cache is not None:
        load_adapter(server, name, folders[0])
    is_over = False

    def keep_asking() -> None:
        while not is_over and server.is_alive():
            with suppress(EngineError):
                server.complete(name, [1, 2, 3], max_tokens=LONG_ANSWER, timeout_s=60)

    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            pool.submit(keep_asking)
        for number in range(1, RELOADS):
            with suppress(EngineError):
                of_two.reload(name, folders[number % 2])
            if not server.is_alive():
                break
            time.sleep(RELOAD_S)
        is_over = True
    said = of_two.say(motion.BESIDE, name)
    assert said == (ENDED if of_two.column == motion.VERIFY else RIGHT)


@pytest.mark.parametrize("kind", KINDS)
def test_a_day_of_reloads(kind: str, tmp_path: Path) -> None:
    """In a minute; the command of the benchmark takes the seconds as its argument."""
    vllm_command()
    found = churn(kind, CHURN_S, tmp_path / "churn")
    motion.record_churn(kind, vars(found))
    print(f"\n{json.dumps({name: value for name, value in vars(found).items() if name != 'memory'}, indent=1)}")
    assert found.answers["its name"] > 0
    if kind == KINDS[0]:
        assert is_right(found)
        assert found.served
    assert not found.answers["another adapter"]


def test_llama_servers_host_memory(long_case: LongCase, tmp_path: Path) -> None:
    with llama_server(long_case.base, long_case.adapter, tmp_path) as url:
        asker = Asker.of(long_case.reference, Endpoint(url), "0", None, "llama-server")
        found = ask_warm(Asker(long_case.caches, asker.speaker, asker.names, asker.find_other))
    motion.record(motion.HOST_CACHE, motion.VERIFY, shown((found.verdict, found.fault)))
    assert (found.verdict, found.fault) == ("differs", STALE_OF_ADAPTER)


def test_llama_servers_global_scale(long_case: LongCase, tmp_path: Path) -> None:
    """Requests that name no adapter continue from what was read before the scale changed."""
    prompt = [*long_case.caches.questions[0].prompt]
    with llama_server(long_case.base, long_case.adapter, tmp_path) as url:

        def post(path: str, body: object) -> Any:
            return httpx2.post(f"{url}{path}", json=body, timeout=60).raise_for_status().json()

        def likeliest(is_cold: bool) -> tuple[int, float]:
            body = {"prompt": prompt, "n_predict": 1, "n_probs": 1, "cache_prompt": not is_cold}
            (found,) = post("/completion", body)["completion_probabilities"][0]["top_logprobs"]
            return found["id"], found["logprob"]

        post("/lora-adapters", [{"id": 0, "scale": 0.0}])
        right = likeliest(is_cold=True)
        post("/lora-adapters", [{"id": 0, "scale": 1.0}])
        likeliest(is_cold=True)
        post("/lora-adapters", [{"id": 0, "scale": 0.0}])
        stale = likeliest(is_cold=False)
    off = abs(stale[1] - right[1])
    print(f"\n{right} cold, {stale} warm")
    said = f"no fault: verify always names the adapter; an answer without a name is {off:.2g} nats off"
    motion.record(motion.GLOBAL_SCALE, motion.VERIFY, said)
    assert stale[0] != right[0] or off > 0.01
