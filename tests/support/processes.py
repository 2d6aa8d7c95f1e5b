"""Code in two processes that exchange messages through gloo, and a count of these messages."""

from __future__ import annotations

import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.multiprocessing.spawn import start_processes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TESTS = Path(__file__).parents[1]
EXAMPLES = TESTS.parent / "docs" / "examples"
PATIENCE_S = 60


def in_two_processes(work: Callable[[int], Any], folder: Path, count: int = 2) -> list[Any]:
    """What `work(rank)` returns in each of two forks, which have everything imported already."""
    folder.mkdir(exist_ok=True)
    start_processes(_take_part, (work, folder, count), nprocs=count, start_method="fork")  # type: ignore[no-untyped-call]
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


def _take_part(rank: int, work: Callable[[int], Any], folder: Path, count: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=PATIENCE_S),
    )
    torch.save(work(rank), folder / f"{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def script_in_two_processes(script: Path, *arguments: object) -> None:
    """A script in two forks that have the environment that torchrun gives."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    start_processes(_run_script, (script, arguments, port), nprocs=2, start_method="fork")  # type: ignore[no-untyped-call]


def _run_script(rank: int, script: Path, arguments: tuple[object, ...], port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    sys.argv = [str(script), *map(str, arguments)]
    left = runpy.run_path(str(script), run_name="__main__")
    assert left  # held until the end: freed in a fork of a process with threads, it has been seen to wait for ever
    os._exit(0)


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")
"""`accelerate launch`; --multi_gpu, because --cpu starts several processes by mpirun only. GPUs are not needed."""


def launched(
    launcher: tuple[str, ...], script: Path, *arguments: object, fails: bool = False, limit_s: int = 560
) -> None:
    """A script in two processes that a launcher starts, with the tests' own modules to import; fails where it fails.

    Args:
        fails: The script ends one of its processes by force.
        limit_s: Seconds after which the launcher is ended.
    """
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", *launcher, str(script), *map(str, arguments)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit_s)
    assert (ended.returncode != 0) is fails, ended.stdout + ended.stderr


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Record every collective of a block, by name, with the bytes of the tensor that it reduces, gathers or sends."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.messages: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.name().partition("::")[2]
        is_message = function.namespace in ("c10d", "_c10d_functional") and not name.startswith(("wait", "_wrap"))
        if is_message:
            tensors = [leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, Tensor)]
            self.messages.append((name, max(tensor.nbytes for tensor in tensors)))
        return result
