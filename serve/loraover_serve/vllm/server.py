"""A vLLM server as a child process, for the length of a block."""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

from loraover.common.errors import ConfigError, EngineError, OutputError
from loraover.common.file_lock import lock
from loraover.common.request import as_written
from loraover_export.formats.vllm.run import lora_module
from loraover_serve.vllm.client import VllmServer
from loraover_serve.vllm.request import KEY_VARIABLE, LAST_PORT, LOOPBACK, STARTUP_S

POLL_S = 0.5  # between two questions to a server that starts
STOP_S, CLEAN_UP_S = 15.0, 1.0  # for the server to end, and for its children to release shared memory
VERSION_S = 120.0  # for `vllm --version`, which imports torch
LOCK_S = 5.0  # for the processes of a server that was stopped to let go of its log
LOG_LINES, LINE_SHOWN = 12, 300  # lines of the log, characters of each
CPU_CACHE_GIB = 4  # for keys and values; vLLM's own default is most of the machine's memory
_ERROR = re.compile(r"\w(Error|Exception): \S")
_VERSION = re.compile(r"\d+\.\d+\S*")
_SCRIPT = re.compile(rb"#!(/\S*python\S*)\n.*^from vllm\.", re.DOTALL | re.MULTILINE)
_INSTALLED = "from importlib.metadata import version; print(version('vllm'))"


@dataclass(frozen=True)
class VllmServerConfig:
    """Arguments and environment of `vllm serve`.

    Args:
        model: Folder or hub name of the base model, which requests address by this name.
        adapters: Folder of each adapter, by the name that requests use.
        max_lora_rank: One of vLLM's allowed values, at least as large as every adapter's rank.
        max_loras: Number of adapters that one batch may use.
        revision: Commit of the model on the hub.
        host: Address or name that the server listens on.
        options: Further words of the command line.
        plugin: Environment variables of our plug-in, which serves adapters by name; empty without it.
    """

    model: str
    adapters: Mapping[str, Path] = field(default_factory=dict)
    max_lora_rank: int = 16
    max_loras: int = 1
    revision: str | None = None
    host: str = LOOPBACK
    options: Sequence[str] = ()
    plugin: Mapping[str, str] = field(default_factory=dict)

    def command(self, executable: str, port: int) -> list[str]:
        """The command line of a server that listens on `port`."""
        lora = ["--enable-lora", "--max-loras", str(self.max_loras), "--max-lora-rank", str(self.max_lora_rank)]
        modules = [lora_module(name, path) for name, path in self.adapters.items()]
        return [
            *(executable, "serve", self.model, "--host", self.host, "--port", str(port)),
            *(["--revision", self.revision] if self.revision is not None else []),
            *(lora if self.adapters or self.plugin else []),
            *(["--lora-modules", *modules] if modules else []),
            *self.options,
        ]

    def variables(self) -> dict[str, str]:
        """The server's environment: no usage statistics leave the machine, and no hub is asked about a folder."""
        given = {"VLLM_NO_USAGE_STATS": "1"}
        if "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
            given["VLLM_CPU_KVCACHE_SPACE"] = str(CPU_CACHE_GIB)
        if Path(self.model).is_dir():
            given["HF_HUB_OFFLINE"] = "1"
        return {**os.environ, **given, **self.plugin}

    def api_key(self) -> str | None:
        """The key that the server asks for, from its environment; None if it asks for none."""
        key = self.variables().get(KEY_VARIABLE) or None
        if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
            raise ConfigError(f"{KEY_VARIABLE}: a key has printable ASCII characters without spaces; choose another.")
        return key

    def url(self, port: int) -> str:
        """Address at which this machine reaches the server."""
        host = self.host
        with suppress(ValueError):
            address = ipaddress.ip_address(host)
            if address.is_unspecified:  # listens on every interface
                host = LOOPBACK if address.version == 4 else "::1"
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextmanager
def serve_vllm(
    config: VllmServerConfig,
    log: Path,
    *,
    executable: str = "vllm",
    port: int | None = None,
    startup_timeout_s: float = STARTUP_S,
    watch: Callable[[int], AbstractContextManager[Any]] = nullcontext,
) -> Iterator[VllmServer]:
    """Start vLLM, wait until the base model and every adapter have answered, and stop it after the block.

    A healthy endpoint is not enough: some models fail at the first request. SIGTERM and SIGHUP end the block as Ctrl-C
    does, with KeyboardInterrupt, so that no server is left behind.

    Args:
        config: The server's arguments and environment.
        log: File for everything that the server prints; it is kept.
        executable: Command that starts vLLM, in any environment.
        port: Port that the server listens on; None means any free one.
        startup_timeout_s: Seconds that the server may take until its first answers.
        watch: Context manager that runs as long as the server; it is called with the id of the server's process.

    Yields:
        A client of the running server.

    Raises:
        ConfigError: A key that cannot be sent in an HTTP header.
        EngineError: A port in use, a command that does not exist, or a server that ends, refuses an adapter or stays
            silent; the message has the end of the log.
        OutputError: A log that cannot be written, or that another server writes.
    """
    key = None if config.api_key() is None else KEY_VARIABLE
    port = free_port(config.host, port or 0)
    with signals_as_interrupts(), open_log(log) as output:
        try:
            process = subprocess.Popen(
                config.command(executable, port),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=config.variables(),
                start_new_session=True,  # one group to stop, workers included
            )
        except OSError as error:
            raise _not_started(executable, error) from error
        try:
            client = VllmServer(config.url(port), process.pid, key, names=list(config.adapters))
            deadline = time.monotonic() + startup_timeout_s
            with watch(process.pid):
                _await_answers(client, [config.model, *config.adapters], process, log, deadline)
                yield client
        finally:
            _stop(process)


@contextmanager
def signals_as_interrupts() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise KeyboardInterrupt; a signal that is ignored, as nohup does, stays ignored."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in previous.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _await_answers(
    client: VllmServer, names: Sequence[str], process: subprocess.Popen[bytes], log: Path, deadline: float
) -> None:
    _check_runs(process, log)  # first, since another server on the port would answer in its place
    while not client.is_healthy():
        if time.monotonic() > deadline:
            raise EngineError(f"vllm serve did not come up in time; {end_of(log)}")
        time.sleep(POLL_S)
        _check_runs(process, log)
    for name in names:
        try:
            client.complete(name, [1], max_tokens=1, timeout_s=max(deadline - time.monotonic(), POLL_S))
        except EngineError as error:
            raise EngineError(f"vllm serve is up, but {name!r} does not answer: {error} {end_of(log)}") from error


def _check_runs(process: subprocess.Popen[bytes], log: Path) -> None:
    if process.poll() is not None:
        raise EngineError(f"vllm serve ended with code {process.returncode}; {end_of(log)}")


def _not_started(executable: str, error: OSError) -> EngineError:
    return EngineError(f"{executable}: cannot be started: {error.strerror}; is vLLM installed there?")


def vllm_version(executable: str) -> str | None:
    """Version of a command `vllm`, such as "0.32.0+cpu"; None if it prints none.

    The command takes ten seconds to say it. The metadata of the Python that an installer's script names say the same.

    Raises:
        EngineError: A command that does not exist.
    """
    script = None
    with suppress(OSError), Path(shutil.which(executable) or os.devnull).open("rb") as file:
        script = _SCRIPT.match(file.read(4096))
    installed = None if script is None else _printed_version([os.fsdecode(script[1]), "-I", "-c", _INSTALLED])
    return installed or _printed_version([executable, "--version"])


def _printed_version(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=VERSION_S
        )
    except OSError as error:
        raise _not_started(command[0], error) from error
    except subprocess.TimeoutExpired:
        return None
    words = done.stdout.split()
    return words[-1] if words and _VERSION.fullmatch(words[-1]) else None


def next_free_port(host: str, first: int) -> int:
    """The first port, from `first` on, that is free on a host.

    Raises:
        EngineError: No free port, or a host that is not this machine.
    """
    for port in range(first, LAST_PORT + 1):
        try:
            return _bound(host, port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise EngineError(
                    f"{host} cannot be listened on: {error.strerror}; choose another {as_written('host')}."
                ) from error
    raise EngineError(f"no port from {first} to {LAST_PORT} is free on {host}.")


def free_port(host: str, port: int = 0) -> int:
    """The port, or any free one if it is 0; one that was used a moment ago (TIME_WAIT) can be named again.

    Raises:
        EngineError: A port that is in use, or a host that is not this machine.
    """
    try:
        return _bound(host, port, reuse=port != 0)
    except OSError as error:
        raise EngineError(f"port {port} cannot be used on {host}: {error.strerror}; choose another.") from error


def _bound(host: str, port: int, *, reuse: bool = False) -> int:
    """The port that a server gets when it asks for this one; the address family is chosen as vLLM does.

    vLLM binds its port, with SO_REUSEADDR and SO_REUSEPORT, long before it listens. A probe with SO_REUSEADDR succeeds
    beside it, and then two servers would share the port.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
        probe.bind((host, port))
        found: int = probe.getsockname()[1]
        return found


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and its children: ask first, and kill them after STOP_S or at another Ctrl-C."""
    try:
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(STOP_S)
            _await_end(process.pid)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            _await_end(process.pid)  # a large process takes a moment to end
        process.wait()


def _await_end(group: int) -> None:
    """Wait until a process group has ended, which raises ProcessLookupError, or for CLEAN_UP_S."""
    deadline = time.monotonic() + CLEAN_UP_S
    while time.monotonic() < deadline:
        os.killpg(group, 0)
        time.sleep(0.05)


def open_log(log: Path) -> BinaryIO:
    """Open a server's log, which is emptied, and locked as long as a process of the server has it open.

    It may be /dev/null, which takes what any number of servers print.

    Raises:
        OutputError: A file that cannot be written, or that another server writes.
    """
    deadline = time.monotonic() + LOCK_S
    try:
        output = log.open("ab")
        while stat.S_ISREG(os.fstat(output.fileno()).st_mode):
            try:
                lock(output, wait=False)
                output.truncate(0)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    output.close()
                    raise
            time.sleep(POLL_S)
        return output
    except OSError as error:
        reason = "another running server writes it" if isinstance(error, BlockingIOError) else error.strerror
        raise OutputError(
            f"{log}: the log cannot be written: {reason}; name another with {as_written('log')}."
        ) from error


def end_of(log: Path) -> str:
    """The last lines of a log, after its first error: the lines that vLLM prints last seldom name the cause."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    first = next((line for line in lines if _ERROR.search(line) and "WARNING" not in line), None)
    end = [line for line in lines[-LOG_LINES:] if line.strip()]
    shown = end if first is None or first in end else [first, "...", *end]
    return "\n".join([f"the end of {log}:", *(line[-LINE_SHOWN:] for line in shown)])
