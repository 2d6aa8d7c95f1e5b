"""Files of the watch: rules and dashboard name figures that it has, Prometheus takes the rules; and its history."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import socket
import sqlite3
import struct
import subprocess
import urllib.error
import urllib.request
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from serve.test_watch import until

from loraover.common.errors import OutputError
from loraover.common.reporter import SILENT
from loraover_serve.judge.reference import read_reference
from loraover_serve.watch.canary import Canary, ask
from loraover_serve.watch.config import WatchConfig, read_config
from loraover_serve.watch.history import DAY_S, Check, History
from loraover_serve.watch.page import Metrics, to_page
from loraover_serve.watch.request import WatchRequest
from loraover_serve.watch.run import Watch, serving

from support import reports
from support.openai_server import openai_server
from support.real_servers import free_port, running
from support.reference_server import AS_BASE, RIGHT, FromReference

FOLDER = Path(__file__).parents[2] / "docker" / "watch"
PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "watch.md"
NOW = 1_700_000_000.0


@pytest.fixture(scope="module")
def canary(recorded: Path, tmp_path_factory: pytest.TempPathFactory) -> Canary:
    """A canary with a check of each verdict."""
    folder = tmp_path_factory.mktemp("watch")
    for name in ("shop", "news"):
        (folder / name).mkdir()
        shutil.copy(recorded, folder / name / "adapter_reference.json.gz")
    shutil.copy(FOLDER / "watch.yaml", folder)
    watched = read_config(folder / "watch.yaml")
    canary = Canary(watched, History(watched.history), NOW, random.Random(0))
    for at in range(40):
        for target, verdict in zip(watched.targets, ("as trained", "differs"), strict=True):
            reason = "because of <script>alert(1)</script>"
            fault, distance = "served as base" if verdict == "differs" else None, 0.01 * (1 + at % 3)
            when = NOW - 60 * (40 - at)
            canary.end(target, Check(*target.key, when, verdict, fault, reason, distance, 0.05, 0.98, 1.5, 400))
    return canary


def debian(name: str) -> str:
    """Path of a program of Prometheus; skips the test if there is none."""
    path = shutil.which(name, path=os.pathsep.join([os.environ.get("LORAOVER_PROMETHEUS", ""), os.environ["PATH"]]))
    if path is None:
        pytest.skip(f"{name} is missing: `make prometheus` fetches Debian's, or name its folder in LORAOVER_PROMETHEUS")
    return path


@pytest.mark.parametrize("words", [["check", "rules", "alerts.yaml"], ["test", "rules", "alerts.test.yaml"]])
def test_promtool_takes_the_rules(words: list[str]) -> None:
    done = subprocess.run([debian("promtool"), *words], cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_takes_the_metrics_and_the_configuration(canary: Canary) -> None:
    pytest.importorskip("prometheus_client", reason="the extra watch is not installed")
    metrics = Metrics(canary, lambda: NOW).text()
    done = subprocess.run([debian("promtool"), "check", "metrics"], input=metrics, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    command = [debian("promtool"), "check", "config", "prometheus.yaml"]
    assert subprocess.run(command, cwd=FOLDER, capture_output=True).returncode == 0


@pytest.mark.process
def test_prometheus_reads_the_watch_and_fires_its_alert(recorded: Path, tmp_path: Path) -> None:
    """The real one, with our rules, asks a watch whose server has lost an adapter."""
    pytest.importorskip("prometheus_client", reason="the extra watch is not installed")
    program, port, reference = debian("prometheus"), free_port(), read_reference(recorded)
    state = {"shop": RIGHT, "news": AS_BASE}
    listed = {"base": None, "shop": "base", "news": "base"}
    with openai_server(FromReference(reference, state.__getitem__), listed) as server:
        adapters = [{"name": name, "reference": str(recorded), "quick": True} for name in state]
        servers = [{"name": "prod", "url": server.url, "base_name": "base", "adapters": adapters}]
        (tmp_path / "watch.yaml").write_text(yaml.safe_dump({"servers": servers, "port": 0}))
        watch = Watch(WatchRequest(tmp_path / "watch.yaml"))
        try:
            for target in watch.canary.targets():
                watch.canary.end(target, ask(target))
            with serving(watch, SILENT) as url:
                config = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
                config["rule_files"] = [str(FOLDER / name) for name in config["rule_files"]]
                config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
                (job,) = config["scrape_configs"]
                job["scrape_interval"] = "1s"
                job["static_configs"][0]["targets"] = [url.removeprefix("http://")]
                (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(config))
                words = [program, f"--config.file={tmp_path}/prometheus.yaml", f"--web.listen-address=127.0.0.1:{port}"]
                words.append(f"--storage.tsdb.path={tmp_path}/data")
                with running(words, port, "/-/ready", tmp_path / "log", {}) as prometheus:
                    fired = until(partial(firing, prometheus))
        finally:
            watch.close()
    assert fired == [("AdapterDiffers", "news", "prod")]


def firing(prometheus: str) -> list[tuple[str, ...]]:
    """Alerts that fire: their names, adapters and servers."""
    with urllib.request.urlopen(f"{prometheus}/api/v1/alerts", timeout=10) as answer:
        alerts = json.load(answer)["data"]["alerts"]
    names = ("alertname", "adapter", "server")
    return [tuple(alert["labels"][name] for name in names) for alert in alerts if alert["state"] == "firing"]


def test_rules_dashboard_and_page_name_figures_of_the_watch(canary: Canary) -> None:
    pytest.importorskip("prometheus_client", reason="the extra watch is not installed")
    text = Metrics(canary, lambda: NOW).text().decode()
    shown = set(re.findall(r"^(loraover_watch_\w+)", text, re.M))
    assert len(re.findall(r"^loraover_watch_verdict\{.*\} 1.0$", text, re.M)) == len(canary.targets())
    for path in (FOLDER / "alerts.yaml", FOLDER / "dashboard.json", PAGE):
        named = set(re.findall(r"loraover_watch_\w+", path.read_text()))
        assert named
        assert named <= shown, path
    panels = json.loads((FOLDER / "dashboard.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_the_page_escapes_what_servers_say(canary: Canary) -> None:
    page = to_page(canary, NOW, "loraover serve watch watch.yaml", "a fault of <the file>").html
    assert "<script" not in page
    assert "a fault of &lt;the file&gt;" in page
    assert page.index(">news<") < page.index(">shop<")  # the worst first
    assert page.count("<circle") == 80
    assert "1 of 2 not as trained" in page


def test_the_page_says_what_was_checked_long_ago() -> None:
    """A fault stays red, whenever it was found; nobody knows whether the rest is still as trained."""
    watch = reports.canary(NOW)
    page = to_page(watch, NOW, "", None).html
    assert page.count(">as trained (old)<") == 1
    assert "not as trained" in page
    shop, late = (target for target in watch.targets() if target.adapter in ("shop-0", "shop-4"))
    watch.configure(replace(watch.watched, targets=(shop, late)), NOW)
    page = to_page(watch, NOW, "", None).html
    assert '<section class="verdict open">' in page
    assert "1 was last checked more than 3 intervals ago." in page
    watch.configure(replace(watch.watched, targets=(shop,)), NOW)
    assert '<section class="verdict good">' in to_page(watch, NOW, "", None).html


def test_the_formats_page_has_every_key() -> None:
    page = (PAGE.parents[1] / "formats.md").read_text()
    section = page[page.index("## Configuration of a watch") : page.index("## Attestation")]
    servers = WatchConfig.model_json_schema()["$defs"]
    for fields in (WatchConfig.model_json_schema(), *servers.values()):
        assert [name for name in fields["properties"] if f"`{name}`" not in section] == []


# The history: what it keeps, what is none or cannot be written, and what readers then see


CHECK = Check("prod", "shop", NOW, "failed", None, "a reason", 0.1, 0.2, 1.0, 0.1, 8)


def test_a_history_of_another_program_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a text, and no database" * 100)
    with pytest.raises(OutputError, match="cannot be used as a history"):
        History(tmp_path / "text")
    with sqlite3.connect(tmp_path / "later") as later:
        later.execute("PRAGMA user_version = 7")
    with pytest.raises(OutputError, match="a history of version 7"):
        History(tmp_path / "later")


def test_a_history_of_version_1_is_used_on(tmp_path: Path) -> None:
    path = tmp_path / "h.sqlite"
    History(path).add(CHECK)
    with sqlite3.connect(path) as older:
        older.execute("ALTER TABLE checks DROP COLUMN caches")
        older.execute("PRAGMA user_version = 1")
    for _ in range(2):
        history = History(path)
        assert history.last(CHECK.key) == CHECK
        assert history.last_of_caches(CHECK.key) == (None, 0)
        history.close()
    history = History(path)
    history.add(asked := replace(CHECK, caches="as trained"))
    history.add(CHECK)
    assert history.last_of_caches(CHECK.key) == (asked, 1)


def test_a_history_that_another_program_holds_is_told(tmp_path: Path) -> None:
    history = History(tmp_path / "h.sqlite", wait_s=0.1)
    with sqlite3.connect(tmp_path / "h.sqlite") as other:
        other.execute("BEGIN EXCLUSIVE")
        message = r"h\.sqlite: cannot be used as a history: database is locked; see whether"
        with pytest.raises(OutputError, match=message):
            history.add(CHECK)
        with pytest.raises(OutputError, match=message):
            history.forget_before(NOW)
    history.add(CHECK)
    assert history.last(CHECK.key) == CHECK


def test_the_last_change_is_kept_however_old_it_is(tmp_path: Path) -> None:
    history = History(tmp_path / "h.sqlite")
    changes = [replace(CHECK, at=NOW + day * DAY_S, changed=day in (0, 2)) for day in range(9)]
    for each in changes:
        history.add(each)
    history.forget_before(NOW + 7 * DAY_S)
    assert history.last_change(CHECK.key) == changes[2]
    assert history.since(CHECK.key, 0, 99) == [changes[2], *changes[7:]]


def test_a_reader_is_told_of_a_held_history_and_may_hang_up(capfd: pytest.CaptureFixture[str]) -> None:
    def held() -> Any:
        raise OutputError("h.sqlite: database is locked")

    watched = SimpleNamespace(config=SimpleNamespace(host="127.0.0.1", port=0))
    canary, metrics = SimpleNamespace(watched=watched, targets=list), SimpleNamespace(text=held)
    watch: Any = SimpleNamespace(page=held, metrics=metrics, canary=canary)
    with serving(watch, SILENT) as url:
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as reader:
            reader.sendall(b"GET /heal")
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # it is cut off
        for path in ("/", "/metrics"):
            with pytest.raises(urllib.error.HTTPError, match="503") as caught:
                urllib.request.urlopen(f"{url}{path}")
            assert caught.value.read() == b"h.sqlite: database is locked\n"
    assert "Traceback" not in capfd.readouterr().err
