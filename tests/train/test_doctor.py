"""`loraover doctor`: what is here, what is missing, and how to get it."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from importlib.metadata import EntryPoint

import pytest

from loraover.cli import cli
from loraover.common.command_line import run
from loraover.common.extras import install
from loraover.inspection import installation
from loraover.inspection.installation import ListedEngine, check_installation, find_engines, missing_extras

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
    name: str = "vLLM"
    version: str | None = None
    takes: str = "a folded adapter"
    install: str = "pip install vllm"


def found_engines() -> list[Found]:
    return [Found(), Found("PyTorch", "2.13", "an adapter", "pip install torch")]


def broken() -> list[Found]:
    raise OSError("libcuda.so is missing")


def point(function: str) -> EntryPoint:
    return EntryPoint("engines", f"{__name__}:{function}", installation.GROUP)


def test_engines_come_from_the_packages_that_have_them() -> None:
    engines, faults = find_engines([point("found_engines"), point("broken"), point("no_such_function")])
    assert engines[0] == ListedEngine(name="vLLM", version=None, takes="a folded adapter", install="pip install vllm")
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
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(installation, "entry_points", lambda group: [point("found_engines")])
    assert run(cli, ["doctor", "--offline"]) == 0
    shown = capsys.readouterr().out
    assert "cpu: " in shown
    assert "not installed: pip install vllm; takes a folded adapter" in shown
    assert "not asked (offline)" in shown
    assert run(cli, ["doctor", "--offline", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["libraries"]["torch"] is not None
    assert [engine["name"] for engine in found["engines"]] == ["vLLM", "PyTorch"]
    assert found["devices"][0]["memory_bytes"] > 2**28


def test_the_function_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    assert check_installation(offline=True).extras
    assert capfd.readouterr() == ("", "")


def test_a_hub_that_does_not_answer_costs_little_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking up a name has no time limit."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: time.sleep(60))
    monkeypatch.setattr(installation, "HUB_TIMEOUT_S", 0.2)
    assert "does not answer within 0.2 s" in check_installation().hub


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "no address", "http://[::1"])
def test_a_hub_that_cannot_be_reached_is_no_error(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    assert check_installation().hub.startswith(f"{address} cannot be reached")
