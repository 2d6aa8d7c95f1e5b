"""A watch, until a signal ends it or every adapter was checked once: its loop, page, signals and configuration."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pydantic import Field

from loraover.common.errors import LoraOverError, OutputError
from loraover.common.reporter import Reporter
from loraover.common.strict_json import StrictModel
from loraover.sources.verb import verb
from loraover_serve.judge.limits import EXIT_CODES
from loraover_serve.watch.canary import Canary, ask
from loraover_serve.watch.config import WatchTarget, read_config
from loraover_serve.watch.history import Check, History
from loraover_serve.watch.page import Metrics, moment, to_page
from loraover_serve.watch.request import WatchRequest


class WatchReport(StrictModel):
    """Findings of a watch at its end."""

    checks: list[Check] = Field(description="Last check of each adapter on each server, in the order of the file")

    @property
    def exit_code(self) -> int:
        """Exit code of the worst verdict, that of `loraover verify`; 0 if there is none."""
        found = {check.verdict for check in self.checks}
        return next((code for verdict, code in EXIT_CODES.items() if verdict in found), 0)


@verb(WatchRequest)
def watch_adapters(request: WatchRequest) -> WatchReport:
    """Check adapters on their servers again and again, until SIGTERM or SIGINT, or each of them once.

    Without `once` it blocks, serves the page and /metrics meanwhile, and has to be called in the main thread, which
    receives signals.

    Returns:
        The last check of each adapter.

    Raises:
        ConfigError: A configuration that cannot be used.
        CheckpointError: A file that is no reference.
        ModuleNotFoundError: prometheus_client or PyYAML is not installed.
        OutputError: A history that cannot be written, or a port that is in use.
    """
    if request.once:
        return check_once(request)
    watch = Watch(request)
    try:
        with serving(watch, request.report), signals(watch):
            watch.run()
        last = [check for target in watch.canary.targets() if (check := watch.history.last(target.key)) is not None]
    finally:
        watch.close()
    request.report.line("ended; the history is complete")
    return WatchReport(checks=last)


def check_once(request: WatchRequest) -> WatchReport:
    """Check every adapter once, without a history."""
    found = []
    for target in read_config(request.config).targets:
        check = ask(target, time.time)
        request.report.line(f"{check.adapter} on {check.server}: {check.verdict} ({check.reason})")
        found.append(check)
    return WatchReport(checks=found)


TICK_S, SHORTEST_S = 1.0, 0.2
"""Longest and shortest time between two looks at the configuration and the plan, in seconds."""
REFRESH_S = 30
SILENT_S = 60.0
"""Seconds without a request after which the connection of a reader is closed."""


class Watch:
    """A running watch.

    Args:
        clock: Clock in seconds since 1970.
    """

    def __init__(self, request: WatchRequest, clock: Callable[[], float] = time.time) -> None:
        self._request, self._clock, self._report = request, clock, request.report
        self.stopping, self._reload = threading.Event(), threading.Event()
        self._state = _state(request)
        watched = read_config(request.config)
        self.history = History(watched.history)
        self.canary = Canary(watched, self.history, clock(), on_change=self._say)
        self.metrics = Metrics(self.canary, clock)
        self._config_fault: str | None = None
        self._mistake: BaseException | None = None

    def page(self) -> str:
        """The page."""
        return to_page(self.canary, self._clock(), self._request.command(), self._config_fault).html

    def run(self) -> None:
        """Check until `stopping` is set; checks that are still running then are not written to the history.

        An error outside of a check, such as a full disk, ends the watch.
        """
        while not self.stopping.is_set():
            self._read_again()
            while (target := self.canary.begin(self._clock())) is not None:
                threading.Thread(target=self._check, args=(target,), daemon=True).start()
            self.stopping.wait(min(TICK_S, max(SHORTEST_S, self.canary.wait_s(self._clock()))))
        if self._mistake is not None:
            raise self._mistake

    def close(self) -> None:
        """Close the history after the check that is being written; later checks are not written."""
        self.stopping.set()
        self.history.close()

    def _check(self, target: WatchTarget) -> None:
        try:
            check = ask(
                target,
                self._clock,
                lambda requests: self.canary.reserve(target, requests, self._clock()),
                with_caches=self.canary.asks_caches(target),
            )
            if not self.stopping.is_set():
                self.canary.end(target, check)
        except BaseException as error:
            if not self.stopping.is_set():  # else the history may have been closed meanwhile
                self._mistake = error
                self.stopping.set()

    def read_again(self) -> None:
        """Have the configuration read again at the next tick."""
        self._reload.set()

    def _read_again(self) -> None:
        state = _state(self._request)
        if state == self._state and not self._reload.is_set():
            return
        self._state = state
        self._reload.clear()
        try:
            watched = read_config(self._request.config)
            old, new = ((each.history, each.config.host, each.config.port) for each in (self.canary.watched, watched))
            if old != new:
                raise OutputError(
                    "history, host and port cannot change while the watch runs; put them back, or start it again."
                )
        except LoraOverError as error:
            self._config_fault, self.metrics.is_config_read = str(error), False
            self._report.line(f"the configuration could not be read again, so the earlier one is still used: {error}")
            return
        self._config_fault, self.metrics.is_config_read = None, True
        self.canary.configure(watched, self._clock())
        self._report.line(f"read {self._request.config} again: {len(watched.targets)} adapters")

    def _say(self, check: Check, before: Check | None) -> None:
        was = "" if before is None else f"{_named(before)} -> "
        self._report.line(
            f"{moment(check.at)} {check.adapter} on {check.server}: {was}{_named(check)} ({check.reason})"
        )


def _named(check: Check) -> str:
    return check.verdict if check.fault is None else f"{check.verdict}, {check.fault}"


def _state(request: WatchRequest) -> tuple[int, ...]:
    """Facts about the configuration's file that change when it is written or replaced."""
    try:
        found = request.config.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report an error, unless a reader hung up."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def serving(watch: Watch, report: Reporter) -> Iterator[str]:
    """Serve the page, /metrics and /healthz during a block, and yield the page's address.

    Args:
        report: Receiver of the address.

    Raises:
        OutputError: The port is in use.
    """

    class Handler(BaseHTTPRequestHandler):
        timeout = SILENT_S

        def do_GET(self) -> None:
            made: dict[str, tuple[str, Callable[[], bytes]]] = {
                "/": ("text/html; charset=utf-8", lambda: watch.page().encode()),
                "/metrics": ("text/plain; version=0.0.4; charset=utf-8", watch.metrics.text),
                "/healthz": ("text/plain", lambda: b"ok\n"),
            }
            kind, content = made.get(self.path.partition("?")[0], ("", bytes))
            status = 200 if kind else 404
            try:
                body = content() if kind else b"not found\n"
            except OutputError as error:  # the history
                status, kind, body = 503, "text/plain; charset=utf-8", f"{error}\n".encode()
            self.send_response(status)
            self.send_header("Content-Type", kind or "text/plain")
            self.send_header("Content-Length", str(len(body)))
            if self.path == "/":
                self.send_header("Refresh", str(REFRESH_S))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            """Log nothing for requests of the page."""

    config = watch.canary.watched.config
    try:
        server = _Server((config.host, config.port), Handler)
    except OSError as error:
        raise OutputError(f"{config.host}:{config.port}: {error.strerror}; choose another host or port.") from error
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://{config.host}:{server.server_port}"
    report.line(f"watching {len(watch.canary.targets())} adapters; page {url}, metrics {url}/metrics")
    try:
        yield url
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def signals(watch: Watch) -> Iterator[None]:
    """End the watch on SIGTERM and SIGINT, and read its configuration again on SIGHUP, during a block."""
    ends = {number: lambda *_: watch.stopping.set() for number in (signal.SIGTERM, signal.SIGINT)}
    taken = {**ends, signal.SIGHUP: lambda *_: watch.read_again()}
    before = {number: signal.signal(number, handler) for number, handler in taken.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
