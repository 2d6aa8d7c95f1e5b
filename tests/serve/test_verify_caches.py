"""Answers on kept keys and values: servers that keep them wrongly are named, and right ones pass."""

from __future__ import annotations

import gzip
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from loraover.client.endpoint import Endpoint
from loraover.common.errors import ConfigError, DataError, EngineError
from loraover_serve import verify_adapter
from loraover_serve.judge.asker import Asker
from loraover_serve.judge.caches import ask_warm
from loraover_serve.judge.names import STALE_OF_ADAPTER, STALE_OF_BASE, STALE_OF_EARLIER, STALE_OF_OTHERS
from loraover_serve.judge.reference import Reference
from loraover_serve.judge.results import Caches
from loraover_serve.judge.user_command import CommandError, UserCommand
from loraover_serve.judge.warm_probe import long_questions
from loraover_serve.verify.checker import write_checker
from loraover_serve.watch.canary import Canary, ask
from loraover_serve.watch.config import read_config
from loraover_serve.watch.history import Check, History
from loraover_serve.watch.page import to_page

from support.caching_server import BY_NAME, BY_TOKENS, BY_WEIGHTS, CachingServer, Key, LlamaServer
from support.long_questions import LongCase
from support.openai_server import openai_server
from support.verified import FAULTS, plant

NAMES = {"base": None, "shop": "base"}
NOISE = 0.003  # nats


def served(case: LongCase, key: Key = BY_WEIGHTS, **more: Any) -> CachingServer:
    return CachingServer(case.base, {"base": None, "shop": case.adapter}, key, **more)


def asked(reply: Any, reference: Reference, names: Any = NAMES, **pages: Callable[[], str]) -> Caches:
    with openai_server(reply, names, pages={f"/{name}": page for name, page in pages.items()}) as server:
        asker = Asker.of(reference, Endpoint(server.url), "shop")
        return ask_warm(Asker(long_questions(reference), asker.speaker, asker.names, asker.find_other))


@pytest.mark.parametrize("noise", [0.0, NOISE])
@pytest.mark.parametrize("block", [16, 128])
def test_a_server_that_keeps_by_weights_passes(noise: float, block: int, long_case: LongCase) -> None:
    found = asked(served(long_case, block=block, noise=noise), long_case.reference)
    assert (found.verdict, found.fault) == ("as trained", None), found.reason
    assert found.hits
    assert (found.noise is not None and found.noise.rms > NOISE / 2) == bool(noise)


@pytest.mark.parametrize("noise", [0.0, NOISE])
def test_one_that_keeps_by_tokens_is_named(noise: float, long_case: LongCase) -> None:
    """The base model continues what the adapter has read, which came first."""
    found = asked(served(long_case, BY_TOKENS, noise=noise), long_case.reference)
    assert (found.verdict, found.fault) == ("differs", STALE_OF_ADAPTER), found.reason


@pytest.mark.parametrize(
    ("before", "fault", "noise"),
    [
        *(("earlier", STALE_OF_EARLIER, noise) for noise in (0.0, NOISE)),
        *(("base", STALE_OF_BASE, noise) for noise in (0.0, NOISE)),
        ("another", STALE_OF_OTHERS, 0.0),
    ],
)
def test_what_was_kept_before_a_reload_is_named(
    before: str, fault: str, noise: float, long_case: LongCase, tmp_path: Path
) -> None:
    """The name's keys and values of the time before the reload: an earlier check has sent the same prompts."""
    server = served(long_case, BY_NAME, noise=noise)
    planted = {"another": "permutation dropped", "base": "not loaded"}
    folder = plant(FAULTS[planted[before]], long_case.adapter, tmp_path / before) if before in planted else None
    server.load("shop", folder or long_case.earlier)
    asked(server, long_case.reference)
    server.load("shop", long_case.adapter)
    found = asked(server, long_case.reference)
    assert (found.verdict, found.fault) == ("differs", fault), found.reason


def test_a_reload_passes_where_other_weights_have_another_key(long_case: LongCase) -> None:
    server = served(long_case)
    server.load("shop", long_case.earlier)
    asked(server, long_case.reference)
    server.load("shop", long_case.adapter)
    assert asked(server, long_case.reference).verdict == "as trained"


@contextmanager
def loading(
    case: LongCase, key: Key, now: Path | None = None, **more: Any
) -> Iterator[tuple[str, Callable[[Path], str]]]:
    """A server that serves the earlier version, and the command that loads another one."""
    server, live = served(case, key, **more), [now or case.earlier]
    server.load("shop", live[0])

    def reply(body: dict[str, Any]) -> Any:
        if "load" not in body:
            return server(body)
        live[0] = Path(body["load"])
        server.load("shop", live[0])
        return b"{}"

    def models() -> str:
        place = "live" if key is BY_NAME else str(live[0])
        return json.dumps({"data": [{"id": "base"}, {"id": "shop", "parent": "base", "root": place}]})

    with openai_server(reply, pages={"/v1/models": models}) as running:
        post = "import sys, urllib.request as u; u.urlopen(sys.argv[1], sys.argv[2].encode()).read()"

        def command(folder: Path) -> str:
            words = [sys.executable, "-c", post, f"{running.url}/load", json.dumps({"load": str(folder)})]
            return f"{shlex.join(words)} && echo loaded"

        yield running.url, command


def reloaded(case: LongCase, key: Key, now: Path | None = None) -> Caches:
    with loading(case, key, now) as (url, command):
        asker = Asker.of(case.reference, Endpoint(url), "shop")
        asker = Asker(case.caches, asker.speaker, asker.names, asker.find_other)
        return ask_warm(asker, UserCommand(command(case.adapter), "--reload"))


def test_a_reload_in_place_is_named_and_one_to_a_new_path_passes(long_case: LongCase) -> None:
    in_place = reloaded(long_case, BY_NAME)
    assert (in_place.verdict, in_place.fault) == ("differs", STALE_OF_EARLIER), in_place.reason
    assert "the server names the same path live after the command" in in_place.reason
    moved = reloaded(long_case, BY_WEIGHTS)
    assert (moved.verdict, moved.fault) == ("as trained", None), moved.reason
    assert f"the server names the new path {long_case.adapter} after the command" in moved.reason
    assert moved.reload is not None
    assert moved.reload.apart.rms > 0.01
    assert moved.reload.roots == (str(long_case.earlier), str(long_case.adapter))


def test_a_reload_of_the_same_weights_shows_nothing(long_case: LongCase) -> None:
    found = reloaded(long_case, BY_NAME, long_case.adapter)
    assert (found.verdict, found.fault) == ("inconclusive", None)
    assert "no stale answer could be seen (serve its earlier version before" in found.reason


def test_verify_runs_the_command_of_a_reload(long_case: LongCase, recorded: Path, tmp_path: Path) -> None:
    write_checker(tmp_path / "check.pyz")
    with loading(long_case, BY_NAME) as (url, command):
        asked_for: dict[str, Any] = {"endpoint": url, "served_name": ["shop"]}
        words = [sys.executable, "-I", "check.pyz", str(long_case.recorded), url, "--served-name", "shop", "--json"]
        words += ["--reload", command(long_case.adapter), "--quick"]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
        found = json.loads(done.stdout)
        assert (done.returncode, found["fault"]) == (1, STALE_OF_EARLIER), done.stdout + done.stderr
        assert found["caches"]["reload"]["command"] == command(long_case.adapter)
        with pytest.raises(EngineError, match=r"reload: the command ended with exit code 3, expected 0; it wrote: no"):
            verify_adapter(references=[long_case.recorded], reload="echo no; exit 3", **asked_for)
        with pytest.raises(EngineError, match="reload: the reference of adapter has no long questions"):
            verify_adapter(references=[recorded], reload="touch never", **asked_for)
        with pytest.raises(ConfigError, match="reload checks one adapter; give one references"):
            verify_adapter(references=[recorded, long_case.recorded], reload="true", endpoint=url)


def test_own_prompts_need_no_reference_and_say_nothing_of_the_weights(long_case: LongCase, tmp_path: Path) -> None:
    prompts = tmp_path / "mine.txt"
    prompts.write_text("\n".join(f"{number} {'A farmer has 17 sheep. ' * 20}" for number in range(4)))
    for key, verdict, fault in ((BY_WEIGHTS, "consistent", None), (BY_TOKENS, "differs", STALE_OF_OTHERS)):
        with openai_server(served(long_case, key, noise=NOISE), NAMES) as server:
            asked: dict[str, Any] = {"endpoint": server.url, "served_name": ["shop"], "prompts": prompts}
            report = verify_adapter(caches=True, output=tmp_path / verdict, **asked)
            (found,) = report.engines
            assert (found.verdict, found.fault) == (verdict, fault), found.reason
            assert [each for each in found.not_checked if each.startswith("whether the weights are right: ")]
            assert report.exit_code == (0 if fault is None else 1)
    with pytest.raises(ConfigError, match="without references, prompts is missing"):
        verify_adapter(caches=True, endpoint="http://localhost:1", served_name=["shop"])
    with pytest.raises(ConfigError, match="caches needs references, which is missing"):
        verify_adapter(long_case.adapter, caches=True, endpoint="http://localhost:1", served_name=["shop"])
    prompts.write_bytes(b"\xff")
    with pytest.raises(DataError, match="cannot be read as UTF-8 text"):
        verify_adapter(caches=True, **asked)


def test_another_adapter_is_asked_in_turn(long_case: LongCase) -> None:
    adapters = {"base": None, "shop": long_case.adapter, "other": long_case.earlier}
    names = {"base": None, "shop": "base", "other": "base"}
    right = asked(CachingServer(long_case.base, adapters), long_case.reference, names)
    assert right.verdict == "as trained", right.reason
    assert [each.arm for each in right.warm] == ["base", "adapter", "base", "other", "adapter"]


@pytest.mark.parametrize("is_right", [True, False])
def test_prompts_come_back_from_the_hosts_memory_of_llama_server(is_right: bool, long_case: LongCase) -> None:
    server = LlamaServer(long_case.base, long_case.adapter, is_right=is_right)
    found = asked(server, long_case.reference, (), props=lambda: json.dumps({"total_slots": 1}))
    expected = ("as trained", None) if is_right else ("differs", STALE_OF_ADAPTER)
    assert (found.verdict, found.fault) == expected, found.reason


def test_a_server_without_a_hit_is_inconclusive(long_case: LongCase) -> None:
    for more in ({"block": 4096}, {"tells": False}):
        found = asked(served(long_case, **more), long_case.reference)
        assert (found.verdict, found.fault) == ("inconclusive", None)
        assert "no prompt was seen to use the cache" in found.reason
        assert "--enable-prompt-tokens-details" in found.reason
    silent = served(long_case, tells=False)
    assert asked(silent, long_case.reference, metrics=silent.metrics).verdict == "as trained"
    for line in ("NaN", "+Inf", "0 1700000000000", ""):
        page = f'vllm:prefix_cache_hits_total{{engine="0"}} {line}\n'
        found = asked(served(long_case, tells=False), long_case.reference, metrics=partial(str, page))
        assert found.verdict == "inconclusive", line


def test_a_server_without_cold_answers_is_inconclusive(long_case: LongCase) -> None:
    found = asked(served(long_case, fields=()), long_case.reference)
    assert (found.verdict, found.fault) == ("inconclusive", None)
    assert "it ignores cache_salt and cache_prompt, or answers other clients" in found.reason
    hidden = served(long_case, fields=(), tells=False)
    assert "it ignores cache_salt" in asked(hidden, long_case.reference, metrics=hidden.metrics).reason
    right = served(long_case)
    strict = asked(lambda body: 400 if "user" in body else right(body), long_case.reference)
    assert strict.verdict == "inconclusive"
    assert "expected cache_salt (vLLM) or cache_prompt (llama-server)" in strict.reason


def test_verify_has_the_worse_verdict(
    long_case: LongCase, reference: Reference, recorded: Path, tmp_path: Path
) -> None:
    with openai_server(served(long_case, BY_TOKENS), NAMES) as server:
        asked_for: dict[str, Any] = {"endpoint": server.url, "served_name": ["shop"], "caches": True}
        report = verify_adapter(references=[long_case.recorded], output=tmp_path / "out", **asked_for)
        (found,) = report.engines
        assert (found.verdict, found.fault) == ("differs", STALE_OF_ADAPTER)
        assert found.strength is not None
        assert abs(found.strength.value - 1) < 0.01
        (written,) = json.loads((tmp_path / "out" / "verify.json").read_text())["engines"]
        assert written["caches"]["fault"] == STALE_OF_ADAPTER
        with pytest.raises(EngineError, match=r"no long questions, expected some; record it again: loraover record"):
            verify_adapter(references=[recorded], **asked_for)
    with pytest.raises(ConfigError, match="caches: the reference of adapter has no long questions"):
        long_questions(reference, lambda field: field)


def test_a_watch_asks_the_cache_in_each_nth_check_and_until_it_is_right(long_case: LongCase, tmp_path: Path) -> None:
    content = json.loads(gzip.decompress(long_case.recorded.read_bytes())) | {"variants": []}
    (tmp_path / "reference.json").write_text(json.dumps(content))
    right, wrong = served(long_case), served(long_case, BY_TOKENS)
    serving = [wrong]
    config: dict[str, Any] = {"reference": "reference.json", "name": "shop", "quick": True, "caches_every": 3}
    with openai_server(lambda body: serving[0](body), NAMES) as server:
        servers = [{"name": "prod", "url": server.url, "adapters": [config]}]
        (tmp_path / "watch.yaml").write_text(json.dumps({"servers": servers}))
        watched = read_config(tmp_path / "watch.yaml")
        history = History(tmp_path / "history.sqlite")
        canary, (target,) = Canary(watched, history, 0.0), watched.targets

        def checked(now: float) -> Check:
            canary.end(target, ask(target, lambda: now, with_caches=canary.asks_caches(target)))
            found = history.last(target.key)
            assert found is not None
            assert found.requests <= target.most
            return found

        found = [checked(1.0), checked(2.0)]
        page = to_page(canary, 2.0, "", None).html
        serving[0] = right
        found += [checked(float(now)) for now in range(3, 8)]
    assert [each.caches for each in found] == [*[STALE_OF_ADAPTER] * 2, "as trained", None, None, "as trained", None]
    assert [each.verdict for each in found] == ["differs"] * 2 + ["as trained"] * 5
    assert found[1].fault == STALE_OF_ADAPTER
    assert f"{STALE_OF_ADAPTER}, 1970-01-01 00:00:02" in page
    assert [each.changed for each in found] == [True, False, True, *[False] * 4]


def test_a_cache_that_cannot_be_checked_is_asked_again_in_the_nth_check(long_case: LongCase, tmp_path: Path) -> None:
    """The server is too slow for the long questions, even in the longer time of a check with them; then it is gone."""
    right, long = served(long_case), min(len(question.prompt) for question in long_case.caches.questions)

    def serving(body: dict[str, Any]) -> Any:
        time.sleep(0.8 if len(body.get("prompt", "")) >= long else 0)
        return right(body)

    content = json.loads(gzip.decompress(long_case.recorded.read_bytes())) | {"variants": []}
    (tmp_path / "reference.json").write_text(json.dumps(content))
    config: dict[str, Any] = {"reference": "reference.json", "name": "shop", "quick": True, "caches_every": 3}
    with openai_server(serving, NAMES) as server:
        servers = [{"name": "prod", "url": server.url, "adapters": [config], "timeout_s": 1}]
        (tmp_path / "watch.yaml").write_text(json.dumps({"servers": servers}))
        watched, history = read_config(tmp_path / "watch.yaml"), History(tmp_path / "history.sqlite")
        canary, (target,) = Canary(watched, history, 0.0), watched.targets

        def checked(now: float) -> Check:
            check = ask(target, lambda: now, with_caches=canary.asks_caches(target))
            canary.end(target, check)
            return check

        found = [checked(now) for now in range(3)]
    found += [checked(now) for now in range(3, 5)]
    assert (found[0].verdict, found[0].caches) in {(each, each) for each in ("failed", "inconclusive")}
    assert [(each.verdict, each.caches) for each in found[1:]] == [
        *[("as trained", None)] * 2,
        ("failed", "failed"),
        ("failed", None),
    ]
    assert found[0].seconds > 2, "it had more time"


def test_a_watch_needs_long_questions_for_the_cache(recorded: Path, tmp_path: Path) -> None:
    adapters = [{"reference": str(recorded), "name": "shop", "caches_every": 1}]
    servers = [{"name": "prod", "url": "http://localhost:9", "adapters": adapters}]
    (tmp_path / "watch.yaml").write_text(json.dumps({"servers": servers}))
    with pytest.raises(
        ConfigError, match=r"shop on prod: caches_every: the reference of adapter has no long questions"
    ):
        read_config(tmp_path / "watch.yaml")


def test_the_checker_of_the_standard_library_judges_alike(long_case: LongCase, tmp_path: Path) -> None:
    write_checker(tmp_path / "check.pyz")
    for key, code, words in ((BY_WEIGHTS, 0, "as trained: "), (BY_TOKENS, 1, f"differs: {STALE_OF_ADAPTER}")):
        with openai_server(served(long_case, key), NAMES) as server:
            command = [sys.executable, "-I", "check.pyz", str(long_case.recorded), server.url, "--served-name", "shop"]
            done = subprocess.run([*command, "--caches"], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout[: len(words)]) == (code, words), done.stdout + done.stderr


def test_garbage_on_each_hit_is_no_pass_where_one_logprob_is_told(long_case: LongCase) -> None:
    server = served(long_case)

    def garbled(body: dict[str, Any]) -> Any:
        if body.get("logprobs", 0) > 1:
            return 400
        raw = server(body)
        assert isinstance(raw, bytes)
        answer = json.loads(raw)
        if (
            body["model"] == "base"
            or "cache_salt" in body
            or not answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        ):
            return raw
        size = long_case.reference.vocabulary
        return re.sub(r"token_id:(\d+)", lambda at: f"token_id:{(int(at[1]) + 7) % size}", json.dumps(answer)).encode()

    found = asked(garbled, long_case.reference)
    assert found.verdict != "as trained", found.reason


def test_llama_server_without_slots_is_inconclusive(long_case: LongCase) -> None:
    for pages in ({}, {"props": lambda: json.dumps({"total_slots": 65})}):
        server = LlamaServer(long_case.base, long_case.adapter, is_right=False)
        found = asked(server, long_case.reference, (), **pages)
        assert found.verdict == "inconclusive", found.reason
        assert "does not report its number of slots, or has too many" in found.reason


def test_a_command_that_empties_the_cache_shows_nothing(long_case: LongCase) -> None:
    server = served(long_case, BY_NAME)
    server.load("shop", long_case.earlier)

    def reply(body: dict[str, Any]) -> Any:
        if "load" not in body:
            return server(body)
        server.load("shop", long_case.adapter)
        server._kept.clear()
        return b"{}"

    with openai_server(reply, NAMES) as running:
        post = "import sys, urllib.request as u; u.urlopen(sys.argv[1], b'{\"load\": 1}').read()"
        asker = Asker.of(long_case.reference, Endpoint(running.url), "shop")
        command = UserCommand(shlex.join([sys.executable, "-c", post, f"{running.url}/load"]), "--reload")
        found = ask_warm(Asker(long_case.caches, asker.speaker, asker.names, asker.find_other), command)
    assert (found.verdict, found.fault) == ("inconclusive", None)
    assert "had cached nothing of the base model's prompts from before the command" in found.reason


def test_a_command_is_ended_with_the_time_and_with_all_that_it_started(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    stubborn = f"(trap '' TERM; echo $$ >/dev/null; sh -c 'echo $PPID' > {pid}; sleep 60; sleep 60) & sleep 60"
    begun = time.monotonic()
    with pytest.raises(CommandError, match="the time for all requests was over before the command ended;"):
        UserCommand(stubborn, "--reload").run(begun + 1)
    assert time.monotonic() - begun < 15
    assert _ends(int(pid.read_text()))
    with UserCommand(f"sleep 60 & echo $! > {pid}", "--run").beside() as failure:
        while failure() is None:
            time.sleep(0.02)
    assert _ends(int(pid.read_text()))


def _ends(pid: int) -> bool:
    """Whether a killed process ends in some seconds; one that nobody has waited for has ended, too."""
    state, until = "R", time.monotonic() + 10
    while state not in "ZX" and time.monotonic() < until:
        time.sleep(0.02)
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            state = "X"
    return state in "ZX"


def test_a_command_may_write_much_and_its_secrets_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_KEY", "sk-secret-of-ours")
    endpoint = Endpoint("http://localhost:9", "THE_KEY")
    command = UserCommand(
        "head -c 50000000 /dev/zero | tr '\\0' x; echo; echo sk-secret-of-ours last; exit 3", "--run", endpoint.hidden
    )
    assert "sk-secret-of-ours" not in command.shown
    with pytest.raises(CommandError, match=r"exit code 3, expected 0; it wrote: x+.*\*\*\* last"):
        command.run()


def test_sigterm_ends_the_command_of_the_checker(long_case: LongCase, tmp_path: Path) -> None:
    write_checker(tmp_path / "check.pyz")
    pid = tmp_path / "pid"
    with openai_server(served(long_case), NAMES) as server:
        words = [sys.executable, "-I", "check.pyz", str(long_case.recorded), server.url, "--served-name", "shop"]
        words += ["--reload", f"echo $$ > {pid}.new; mv {pid}.new {pid}; sleep 60"]
        with subprocess.Popen(words, cwd=tmp_path) as process:
            until = time.monotonic() + 60
            while not pid.exists() and time.monotonic() < until:
                time.sleep(0.05)
            process.terminate()
            assert process.wait(20) == 130
    assert _ends(int(pid.read_text()))
