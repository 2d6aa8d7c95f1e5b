"""onnxruntime-genai's builder in forks of one process that has imported it and has no threads.

A fork of the tests' own process may wait for ever for a lock that a thread of some library held at that moment.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from ctypes import CDLL
from functools import cache
from importlib import import_module
from pathlib import Path
from socketserver import ForkingMixIn, StreamRequestHandler, UnixStreamServer

from loraover_export.formats.onnx.builder_process import BUILDER

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class ForkedBuilder:
    """Stand-in of `decoder.BuilderProcess` that spares each build the builder's imports."""

    def __enter__(self) -> ForkedBuilder:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
        request = {"arguments": list(arguments), "folder": str(Path.cwd()), "environment": dict(os.environ)}
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(server_address())
            answers = connection.makefile("rw", encoding="utf-8", errors="replace")
            answers.write(json.dumps(request) + "\n")
            answers.flush()
            fork = int(answers.readline())
            try:
                *output, code = answers.read().splitlines(keepends=True)
            except BaseException:
                os.kill(fork, signal.SIGKILL)
                raise
        return subprocess.CompletedProcess([BUILDER, *arguments], int(code), "", "".join(output))


@cache
def server_address() -> str:
    """The abstract socket of this process's server, which is started by the first call and ends with the process."""
    name = f"builder-forks-{os.getpid()}"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    server = subprocess.Popen([sys.executable, "-m", __name__, name], stdout=subprocess.PIPE, env=environment)
    assert server.stdout is not None
    server.stdout.readline()
    return f"\0{name}"


class _Server(ForkingMixIn, UnixStreamServer):
    pass


class _Build(StreamRequestHandler):
    """One build, in a fork: answers its process's number, the builder's output, and its exit code."""

    def handle(self) -> None:
        _end_with_parent()
        request = json.loads(self.rfile.readline())
        os.environ |= request["environment"] | {"HF_HUB_OFFLINE": "1"}
        os.chdir(request["folder"])
        with os.fdopen(os.dup(self.connection.fileno()), "w", buffering=1) as output:
            print(os.getpid(), file=output)
            sys.stdout = sys.stderr = output
            code = _run_builder(request["arguments"])
            print(f"\n{code}")


def _run_builder(arguments: Sequence[str]) -> int:
    sys.argv = [BUILDER, *arguments]
    try:
        runpy.run_module(BUILDER, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        return int(ended.code or 0)
    except Exception as error:
        print(f"Traceback, in short:\n{type(error).__name__}: {error}")
        return 1
    return 0


def _end_with_parent() -> None:
    CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _serve(name: str) -> None:
    _end_with_parent()
    import_module(BUILDER)  # once, for all forks
    with _Server(f"\0{name}", _Build) as server:
        print("ready", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    _serve(sys.argv[1])
