"""`loraover train` in a process of its own: what it prints, and that it reaches for nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from loraover.training.recipe import load_recipe
from loraover.training.run_result import RunResult, read_run

from support.tiny_hub import write_recipe
from support.train_command import STEPS

pytestmark = pytest.mark.process

COMMIT = "0123456789abcdef" * 2 + "01234567"
WATCH_NETWORK = """
import atexit, pathlib, socket, threading, time
reached = []
def refuse(*address, **_):
    reached.append(f"{threading.current_thread().name}: {address}")
    raise OSError("the network is out of bounds")
socket.getaddrinfo = refuse
socket.socket.connect = refuse
@atexit.register
def tell():
    time.sleep(1)  # a thread in the background may still be on its way
    pathlib.Path("REACHED").write_text(chr(10).join(reached))
"""


@dataclass(frozen=True)
class Ended:
    """`train --json` in a process of its own, as a user runs it; libraries print what they print.

    Args:
        folder: Holds `recipe.yaml`, the run in `out`, and what the process tried to reach in `reached.txt`.
    """

    folder: Path
    code: int
    out: str
    error: str


@pytest.fixture(scope="module")
def processes(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """A run on a local folder, and one on a model in the hub's cache without a hub; side by side, to save time."""
    cache = tmp_path_factory.mktemp("cache")
    repository = cache / "hub" / "models--owner--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / COMMIT).symlink_to(bases["llama"])
    started = {}
    for name, model, more in (("local", bases["llama"], {}), ("cached", "owner/tiny", {"HF_HUB_OFFLINE": "1"})):
        folder = tmp_path_factory.mktemp(name)
        recipe = write_recipe(folder / "recipe.yaml", model)
        program = WATCH_NETWORK.replace("REACHED", str(folder / "reached.txt"))
        program += "import sys\nfrom loraover.cli import main\nsys.argv[0] = 'loraover'\nmain()\n"
        command = [sys.executable, "-c", program, "train", str(recipe), "-o", str(folder / "out"), "--json"]
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "DISABLE_TELEMETRY", "DO_NOT_TRACK"))}
        variables = kept | {"OMP_NUM_THREADS": "1", "HF_HOME": str(cache)} | more
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started[name] = (folder, subprocess.Popen(command, env=variables, **pipes))
    ended = {}
    for name, (folder, process) in started.items():
        out, error = process.communicate()
        ended[name] = Ended(folder, process.returncode, out, error)
    return ended


@pytest.mark.parametrize("name", ["local", "cached"])
def test_a_process_prints_one_json_object_only(name: str, processes: dict[str, Ended]) -> None:
    ended = processes[name]
    assert ended.code == 0, ended.error
    assert RunResult.model_validate_json(ended.out) == read_run(ended.folder / "out")
    assert f"step     {STEPS}/{STEPS}  loss" in ended.error
    for noise in ("Traceback", "Warning", "examples/s]", "\x1b"):
        assert noise not in ended.error, "libraries stay quiet, and bars belong on a terminal"


def test_a_cached_hub_model_is_pinned(processes: dict[str, Ended]) -> None:
    out = processes["cached"].folder / "out"
    assert COMMIT[:12] in read_run(out).model_origin
    assert load_recipe(str(out / "recipe.yaml")).model_revision == COMMIT
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/tiny", COMMIT)


@pytest.mark.parametrize("name", ["local", "cached"])
def test_a_run_on_local_files_reaches_for_nothing(name: str, processes: dict[str, Ended]) -> None:
    """Telemetry of libraries included: the name of a model is nobody else's business."""
    assert (processes[name].folder / "reached.txt").read_text().splitlines() == []
