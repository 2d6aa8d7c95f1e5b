"""`loraover doctor`: what is here, what is missing, and how to get it."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from loraover.cli import cli
from loraover.common.command_line import run
from loraover.common.extras import install
from loraover.inspection import installation
from loraover.inspection.installation import ListedEngine, check_installation, find_engines, missing_extras

from support.machine import with_hub

REQUIREMENTS = [
    "click>=8.1",
    'trl>=0.24; extra == "train"',
    'no-such-package; extra == "train"',
    'click>=99; extra == "eval"',
    "click>=8; sys_platform == 'nowhere' and extra == 'eval'",
    'loraover[eval]; extra == "all"',
    'ray>=2.40; extra == "dev"',
]


@dataclass(frozen=True)
class Found:
    name: str = "Bazaar"
    version: str | None = None
    takes: str = "a folded adapter"
    install: str = "pip install bazaar"


def found_engines() -> list[Found]:
    return [Found(), Found("PyTorch", "2.13", "an adapter", "pip install torch")]


def broken() -> list[Found]:
    raise OSError("libcuda.so is missing")


def point(function: str) -> EntryPoint:
    return EntryPoint("engines", f"{__name__}:{function}", installation.GROUP)


def test_engines_come_from_the_packages_that_have_them() -> None:
    engines, faults = find_engines([point("found_engines"), point("broken"), point("no_such_function")])
    assert engines[0] == ListedEngine(
        name="Bazaar", version=None, takes="a folded adapter", install="pip install bazaar"
    )
    assert [engine.version for engine in engines] == [None, "2.13"]
    assert len(faults) == 2
    assert "OSError: libcuda.so is missing" in faults[0]
    assert "no_such_function" in faults[1]
    assert find_engines([]) == ([], [])


def test_extras_that_lack_a_package_say_how_to_get_it() -> None:
    train, other, more = missing_extras(["train", "eval", "all", "dev"], REQUIREMENTS)
    assert (train.name, train.missing, train.install) == ("train", ["no-such-package"], install("train"))
    assert (other.name, other.missing) == ("eval", ["click"])  # too old; the other one is for another system
    assert (more.name, more.missing) == ("all", ["click"])  # of the extra that it names


def test_what_is_shown_names_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the engines of another package, which is installed for the test."""
    (info := tmp_path / "bazaar-1.0.dist-info").mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bazaar\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{installation.GROUP}]\nengines = {__name__}:found_engines\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert run(cli, ["doctor", "--offline"]) == 0
    shown = capsys.readouterr().out
    assert "cpu: " in shown
    assert "not installed: pip install bazaar; takes a folded adapter" in shown
    assert "not asked (offline)" in shown
    assert run(cli, ["doctor", "--offline", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["libraries"]["torch"] is not None
    assert "Bazaar" in [engine["name"] for engine in found["engines"]]
    assert found["devices"][0]["memory_bytes"] > 2**28


def test_the_function_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    assert check_installation(offline=True).extras
    assert capfd.readouterr() == ("", "")


def test_a_hub_that_does_not_answer_costs_little_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking up a name has no time limit."""
    with_hub(monkeypatch, HF_HUB_OFFLINE=False)
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: time.sleep(60))
    monkeypatch.setattr(installation, "HUB_TIMEOUT_S", 0.2)
    assert "does not answer within 0.2 s" in check_installation().hub


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "no address", "http://[::1"])
def test_a_hub_that_cannot_be_reached_is_no_error(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_hub(monkeypatch, HF_HUB_OFFLINE=False, ENDPOINT=address)
    assert check_installation().hub.startswith(f"{address} cannot be reached")


def test_known_faults_of_installed_engines_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    named = {fault for engine in check_installation(offline=True).engines for fault in engine.faults}
    assert run(cli, ["doctor", "--offline"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert all(fault in printed for fault in named)
    assert ("known faults" in printed) == bool(named)
