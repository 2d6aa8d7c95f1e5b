"""`loraover serve watch`: its configuration, its plan, a day with a server that flaps, and the process."""

from __future__ import annotations

import gc
import gzip
import json
import random
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import tracemalloc
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from loraover.common.command_line import run
from loraover.common.errors import ConfigError
from loraover_serve import watch_adapters
from loraover_serve.cli import cli
from loraover_serve.judge.reference import Reference
from loraover_serve.watch.canary import Canary, ask
from loraover_serve.watch.config import HOUR_S, Watched, read_config
from loraover_serve.watch.history import DAY_S, Check, History
from loraover_serve.watch.page import Metrics, to_page

from support.openai_server import openai_server
from support.reference_server import AS_BASE, REFUSED, RIGHT, VERDICT, FromReference

NOW = 1_700_000_000.0
NAMES = {"base": None, "steady": "base", "lost": "base", "locked": "base"}


@pytest.fixture(scope="module")
def short(recorded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference without its faults, which a quick check does not look at and which take long to read."""
    content = json.loads(gzip.decompress(recorded.read_bytes())) | {"variants": []}
    path = tmp_path_factory.mktemp("short") / "reference.json.gz"
    path.write_bytes(gzip.compress(json.dumps(content).encode()))
    return path


def write(folder: Path, recorded: Path, url: str = "http://localhost:9", **more: Any) -> Path:
    """A configuration of three adapters on one server."""
    adapters = [{"name": name, "reference": str(recorded), "quick": True} for name in ("steady", "lost", "locked")]
    server = {"name": "prod", "url": url, "base_name": "base", "timeout_s": 20, "adapters": adapters}
    path = folder / "watch.yaml"
    path.write_text(yaml.safe_dump({"servers": [server], "interval_s": 300, "port": 0} | more))
    return path


def result(watched: Watched, adapter: str, at: float, verdict: str = "as trained", requests: int = 10) -> Check:
    return Check("prod", adapter, at, verdict, None, "a reason", 0.1, 0.2, 1.0, 0.1, requests)


FAULTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "an unknown key": (lambda c: c.update(intervall=3), "intervall: Extra inputs are not permitted"),
    "no servers": (lambda c: c.update(servers=[]), "servers: List should have at least 1 item"),
    "a jitter": (lambda c: c.update(jitter=2), "jitter: Input should be less than or equal to 0.5"),
    "a budget": (lambda c: c.update(budget=17) or c["servers"][0]["adapters"][0].update(quick=False), "raise budget"),
    "a name twice": (lambda c: c["servers"][0]["adapters"][1].update(name="steady"), "steady on prod is named twice"),
    "a server twice": (lambda c: c["servers"].append(c["servers"][0]), "two servers are named prod"),
    "a format": (lambda c: c["servers"][0].update(served_format="fp7"), "servers.0.served_format"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_configuration_is_refused_with_its_fault(name: str, recorded: Path, tmp_path: Path) -> None:
    path = write(tmp_path, recorded)
    content = yaml.safe_load(path.read_text())
    change, message = FAULTS[name]
    change(content)
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_config(path)


@pytest.mark.parametrize("text", ["", "- a", "a: [", "\x00", "servers: &a [*a]", "port: 1\nport: 2"])
def test_a_file_that_is_no_configuration_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "watch.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"watch\.yaml"):
        read_config(tmp_path / "watch.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config(tmp_path / "absent.yaml")


def test_the_budget_holds_in_every_hour_and_outlives_a_restart(recorded: Path, tmp_path: Path) -> None:
    watched = read_config(write(tmp_path, recorded, budget=40, interval_s=60))
    history, draw, now, sent = History(tmp_path / "h.sqlite"), random.Random(1), NOW, list[tuple[float, int]]()
    canary = Canary(watched, history, now, draw)
    while now < NOW + 4 * HOUR_S:
        target = canary.begin(now)
        if target is None:
            now += 7
            continue
        requests = draw.randrange(8, target.most + 1)
        sent.append((now, requests))
        canary.end(target, result(watched, target.adapter, now, requests=requests))
        if len(sent) % 4 == 0:
            canary = Canary(watched, history, now, draw)
    assert max(sum(n for at, n in sent if begin < at <= begin + HOUR_S) for begin, _ in sent) <= 40
    assert len(sent) >= 4 * (40 // 16)
    assert canary.deferred > 0


@pytest.mark.parametrize("restarts", [False, True])
def test_a_clock_that_is_set_back_hides_no_check_and_delays_none(
    restarts: bool, recorded: Path, tmp_path: Path
) -> None:
    """Checks from the time when it was a day ahead stay in the history."""
    watched = read_config(write(tmp_path, recorded, budget=80, jitter=0))
    history, ahead = History(tmp_path / "h.sqlite"), NOW + DAY_S
    canary = Canary(watched, history, ahead, random.Random(1))
    while (target := canary.begin(ahead)) is not None:
        canary.end(target, result(watched, target.adapter, ahead))
    canary = Canary(watched, history, NOW, random.Random(1)) if restarts else canary
    left = 80 if restarts else 50
    assert canary.left(NOW) == left
    assert canary.begin(NOW) is None
    while (target := canary.begin(NOW + 300)) is not None:
        canary.end(target, result(watched, target.adapter, NOW + 300, "differs"))
    assert canary.left(NOW + 300) == left - 30
    for target in watched.targets:
        last, change = history.last(target.key), history.last_change(target.key)
        assert last is not None
        assert (last.at, last.verdict) == (NOW + 300, "differs")
        assert change == last
        assert [check.at for check in history.since(target.key, NOW, 9)] == [ahead, NOW + 300]
    assert canary.left(NOW + HOUR_S + 300) == 80


def test_a_large_check_that_waits_for_the_budget_is_overtaken_for_an_hour(short: Path, tmp_path: Path) -> None:
    """Small checks of another server take its place, and neither side waits for ever."""
    watched = read_config(write(tmp_path, short, budget=40, interval_s=300, jitter=0))
    large, small = watched.targets[:2]
    large = replace(large, most=40, interval_s=4 * HOUR_S)
    small = replace(small, server=small.server.model_copy(update={"name": "other"}))
    canary = Canary(replace(watched, targets=(large, small)), History(tmp_path / "h.sqlite"), NOW, random.Random(1))
    begun: dict[str, list[float]] = {"steady": [], "lost": []}
    for minute in range(12 * 60):
        now = NOW + 60.0 * minute
        while (target := canary.begin(now)) is not None:
            begun[target.adapter].append(now)
            check = result(watched, target.adapter, now, requests=target.most)
            canary.end(target, replace(check, server=target.server.name))
    assert len(begun["steady"]) > 1
    for before, at in pairwise(begun["steady"]):
        due = before + large.interval_s
        assert any(due < small_at < at for small_at in begun["lost"])
        assert at - due <= 2 * HOUR_S


def test_another_verdict_or_fault_is_a_change(recorded: Path, tmp_path: Path) -> None:
    """And a server has one check at a time."""
    watched = read_config(write(tmp_path, recorded))
    changes: list[tuple[str, str | None]] = []
    canary = Canary(
        watched,
        History(tmp_path / "h.sqlite"),
        NOW,
        random.Random(1),
        lambda check, before: changes.append((check.verdict, check.fault)),
    )
    now = NOW
    for verdict, fault in [RIGHTLY, RIGHTLY, ("differs", "a"), ("differs", "b"), ("differs", "b"), RIGHTLY]:
        for _ in watched.targets:
            target = canary.begin(now := now + 1000)
            assert target is not None
            assert canary.begin(now) is None
            canary.end(target, replace(result(watched, target.adapter, now, verdict), fault=fault))
    assert changes == [each for each in (RIGHTLY, ("differs", "a"), ("differs", "b"), RIGHTLY) for _ in watched.targets]


RIGHTLY = ("as trained", None)


def test_another_configuration_keeps_what_it_still_names(recorded: Path, tmp_path: Path) -> None:
    path = write(tmp_path, recorded)
    watched = read_config(path)
    history = History(tmp_path / "h.sqlite")
    canary = Canary(watched, history, NOW, random.Random(1))
    while (target := canary.begin(NOW + 60)) is not None:
        canary.end(target, result(watched, target.adapter, NOW + 60))
    fewer = replace(watched, targets=watched.targets[:1])
    canary.configure(fewer, NOW + 61)
    assert canary.begin(NOW + 62) is None
    assert [target.adapter for target in canary.targets()] == ["steady"]
    assert {key[1] for key in canary.checks} == {"steady"}
    canary.configure(watched, NOW + 63)
    assert canary.begin(NOW + 64) is None  # the others were checked within the interval
    assert canary.begin(NOW + 60 + 1.1 * 300) is not None


def flips(seed: int, other: str) -> Callable[[float], str]:
    """States of a day that last 17 to 60 minutes each, more than two intervals with their jitter."""
    draw, at, times = random.Random(seed), NOW, list[float]()
    while at < NOW + DAY_S:
        at += draw.uniform(1020, 3600)
        times.append(at)
    return lambda now: (RIGHT, other)[sum(time <= now for time in times) % 2]


BLOCKS, BYTES, TRACED_FROM = 5_000, 150_000, 18
"""Largest growth from the third hour to the last one, in Python's blocks of memory, of which the process has some
200,000; and in bytes in the last four hours, some 96 checks. Tracing begins an hour before, and makes checks slow."""


@pytest.mark.matrix
def test_a_day_with_a_server_that_flaps(short: Path, reference: Reference, tmp_path: Path) -> None:
    """Some 576 checks over HTTP on a simulated clock: every change is seen, there is no false alarm and no leak."""
    now, states = NOW, {"steady": lambda _: RIGHT, "lost": flips(1, AS_BASE), "locked": flips(2, REFUSED)}
    expected: dict[str, list[str]] = {name: [] for name in states}
    found: dict[str, list[str]] = {name: [] for name in states}
    blocks, traced = dict[int, int](), dict[int, int]()
    with openai_server(FromReference(reference, lambda name: states[name](now)), NAMES) as server:
        watched = read_config(write(tmp_path, short, server.url, interval_s=450))
        history = History(tmp_path / "h.sqlite")
        changes: list[tuple[str, str]] = []
        canary = Canary(watched, history, now, random.Random(3), lambda c, _: changes.append((c.adapter, c.verdict)))
        metrics = Metrics(canary, lambda: now)
        clock: Callable[[], float] = lambda: now  # noqa: E731
        while now < NOW + DAY_S:
            hour = int((now - NOW) // HOUR_S)
            if hour not in blocks:
                server.bodies.clear()
                server.headers.clear()
                assert b"loraover_watch_verdict" in metrics.text()
                to_page(canary, now, "a command", None)
                gc.collect()
                blocks[hour] = sys.getallocatedblocks()
                if hour == TRACED_FROM:
                    tracemalloc.start()
                traced[hour] = tracemalloc.get_traced_memory()[0]
            target = canary.begin(now)
            if target is None:
                now += max(1.0, canary.wait_s(now))
                continue
            name = target.adapter
            expected[name].append(VERDICT[states[name](now)])
            check = ask(target, clock)
            found[name].append(check.verdict)
            canary.end(target, check)
        tracemalloc.stop()
    checks = sum(map(len, found.values()))
    assert found == expected
    assert checks >= 550
    for name, states_of in expected.items():
        seen = [verdict for at, verdict in enumerate(states_of) if at == 0 or states_of[at - 1] != verdict]
        assert [verdict for adapter, verdict in changes if adapter == name] == seen
    flipped = {
        name: sum(state(NOW + at) != state(NOW + at + 1) for at in range(int(DAY_S))) for name, state in states.items()
    }
    assert {name: len([c for c in changes if c[0] == name]) - 1 for name in states} == flipped
    assert flipped["steady"] == 0
    assert min(flipped["lost"], flipped["locked"]) >= 24
    assert blocks[23] - blocks[2] <= BLOCKS, blocks
    assert traced[23] - traced[TRACED_FROM + 1] <= BYTES, traced
    print(
        f"{checks} checks, {sum(flipped.values())} changes; {blocks[23] - blocks[2]} blocks more from the third "
        f"hour on, {traced[23] - traced[TRACED_FROM + 1]} bytes in the last four"
    )


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        content: str = answer.read().decode()
    return content


def until(condition: Callable[[], Any], seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.1)
    return found


@pytest.mark.process
def test_the_process_shows_changes_reads_its_configuration_again_and_ends(
    recorded: Path, reference: Reference, tmp_path: Path
) -> None:
    pytest.importorskip("prometheus_client", reason="the extra watch is not installed")
    state = {"steady": RIGHT, "lost": RIGHT, "locked": RIGHT}
    with (
        openai_server(FromReference(reference, state.__getitem__), NAMES) as server,
        socket.create_server(("127.0.0.1", 0)) as silent,  # which takes connections, and never answers
    ):
        path = write(tmp_path, recorded, server.url, interval_s=1)
        content = yaml.safe_load(path.read_text())
        mute = content["servers"][0]["adapters"][0] | {"name": "mute"}
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        content["servers"].append({"name": "silent", "url": url, "adapters": [mute]})
        path.write_text(yaml.safe_dump(content))
        log = (tmp_path / "log").open("w")
        words = [sys.executable, "-c", SCRIPT, str(path)]
        process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT)
        try:
            shown = tmp_path / "log"
            url = until(lambda: re.search(r"page (http://\S+),", shown.read_text().replace("\n", " ")))[1]
            mark = 'loraover_watch_verdict{adapter="%s",server="prod",verdict="%s"} 1.0'
            until(lambda: all(mark % (name, "as trained") in fetch(f"{url}/metrics") for name in state))
            state["lost"] = AS_BASE
            until(lambda: mark % ("lost", "differs") in fetch(f"{url}/metrics"))
            page = fetch(url)
            assert "Look at lost on prod" in page
            assert page.count("<svg ") == 4
            assert fetch(f"{url}/healthz") == "ok\n"
            path.write_text("servers: [")
            until(lambda: "loraover_watch_config_read 0.0" in fetch(f"{url}/metrics"))
            assert "the earlier one is still used" in fetch(url)
            content["servers"][0]["adapters"].pop(1)
            path.write_text(yaml.safe_dump(content))
            process.send_signal(signal.SIGHUP)
            until(lambda: 'adapter="lost"' not in fetch(f"{url}/metrics"))
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0, shown.read_text()
        finally:
            process.kill()
            process.wait()
            log.close()
    told = shown.read_text().replace("\n", " ")
    assert "the history is complete" in told
    assert "heavy !" in told
    with sqlite3.connect(tmp_path / "watch.sqlite") as history:
        assert history.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert history.execute("SELECT count(*) FROM checks WHERE verdict = 'differs'").fetchone()[0] >= 1


SCRIPT = """
import os, sys
from loraover.common.command_line import run
from loraover_serve import watch_adapters
from loraover_serve.cli import cli
end, heavy = os._exit, {"torch", "numpy", "transformers"}
os._exit = lambda code: (print("heavy", *(heavy & {*sys.modules}), "!", flush=True), end(code))
run(cli, ["watch", sys.argv[1]])
"""


def test_each_adapter_is_checked_once(
    recorded: Path, reference: Reference, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {"steady": RIGHT, "lost": AS_BASE, "locked": RIGHT}
    with openai_server(FromReference(reference, state.__getitem__), NAMES) as server:
        path = write(tmp_path, recorded, server.url)
        assert run(cli, ["watch", str(path), "--once"]) == 1
        found = watch_adapters(path, once=True)
        assert [(check.adapter, check.verdict) for check in found.checks] == [
            ("steady", "as trained"),
            ("lost", "differs"),
            ("locked", "as trained"),
        ]
        assert found.exit_code == 1
        state["lost"] = RIGHT
        assert run(cli, ["watch", str(path), "--once"]) == 0
    assert "lost on prod: differs" in "".join(capsys.readouterr())
    assert not (tmp_path / "watch.sqlite").exists()
