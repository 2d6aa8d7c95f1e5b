"""Files for the watch: Prometheus takes the rules, and rules and dashboard name figures that the watch has."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from loraover_serve.watch.canary import Canary
from loraover_serve.watch.config import WatchConfig, read_config
from loraover_serve.watch.history import Check, History
from loraover_serve.watch.metrics import Metrics
from loraover_serve.watch.page import to_page

from support.chromium import looked_at

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


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is missing: Debian's package promtool has it")
@pytest.mark.parametrize("words", [["check", "rules", "alerts.yaml"], ["test", "rules", "alerts.test.yaml"]])
def test_promtool_takes_the_rules(words: list[str]) -> None:
    done = subprocess.run(["promtool", *words], cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is missing: Debian's package promtool has it")
def test_promtool_takes_the_metrics_and_the_configuration(canary: Canary) -> None:
    pytest.importorskip("prometheus_client", reason="prometheus_client is missing: pip install 'loraover[watch]'")
    metrics = Metrics(canary, lambda: NOW).text()
    done = subprocess.run(["promtool", "check", "metrics"], input=metrics, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    command = ["promtool", "check", "config", "prometheus.yaml"]
    assert subprocess.run(command, cwd=FOLDER, capture_output=True).returncode == 0


def test_rules_dashboard_and_page_name_figures_of_the_watch(canary: Canary) -> None:
    pytest.importorskip("prometheus_client", reason="prometheus_client is missing: pip install 'loraover[watch]'")
    shown = set(re.findall(r"^(loraover_watch_\w+)", Metrics(canary, lambda: NOW).text().decode(), re.M))
    for path in (FOLDER / "alerts.yaml", FOLDER / "dashboard.json", PAGE):
        named = set(re.findall(r"loraover_watch_\w+", path.read_text()))
        assert named
        assert named <= shown, path
    panels = json.loads((FOLDER / "dashboard.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_the_page_escapes_what_servers_say(canary: Canary) -> None:
    page = to_page(canary, NOW, "loraover serve watch watch.yaml", "a fault of <the file>")
    assert "<script" not in page
    assert "a fault of &lt;the file&gt;" in page
    assert page.index(">news<") < page.index(">shop<")  # the worst first
    assert page.count("<circle") == 80
    assert "1 of 2 not as trained" in page


@pytest.mark.engine
@pytest.mark.parametrize("is_dark", [False, True])
def test_a_browser_shows_the_page_at_each_width(is_dark: bool, canary: Canary, tmp_path: Path) -> None:
    page = to_page(canary, NOW, "loraover serve watch watch.yaml", None)
    for found in looked_at(tmp_path, page, (400, 800, 1200), is_dark=is_dark):
        assert found["needed"] == found["given"], "the page scrolls sideways"
        assert found["title"] == "Watch: adapters on servers"
        assert found["scripts"] == 0


def test_the_formats_page_has_every_key() -> None:
    page = (PAGE.parents[1] / "formats.md").read_text()
    section = page[page.index("## Configuration of a watch") : page.index("## Attestation")]
    servers = WatchConfig.model_json_schema()["$defs"]
    for fields in (WatchConfig.model_json_schema(), *servers.values()):
        assert [name for name in fields["properties"] if f"`{name}`" not in section] == []
