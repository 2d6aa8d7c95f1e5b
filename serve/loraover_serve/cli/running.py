"""The commands `loraover serve up` and `loraover serve watch`, which run until they are stopped."""

from __future__ import annotations

import click

from loraover.reporting.request_command import request_command
from loraover_serve.vllm.request import ServeRequest
from loraover_serve.watch.request import WatchRequest


def _serve(request: ServeRequest, as_json: bool) -> None:
    from dataclasses import replace

    from loraover.common.errors import EngineError
    from loraover.reporting.reporter import ConsoleReporter
    from loraover.sources.verb import perform
    from loraover_serve.vllm.serve import example_request, serve_adapters

    with perform(serve_adapters, replace(request, report=ConsoleReporter())) as server:
        click.echo(f"ready: {server.url}\n\n{example_request(server)}\n\nCtrl-C stops it")
        server.wait()
    raise EngineError(f"vLLM ended or reported a failure; see {request.log}.")


def _watch(request: WatchRequest, as_json: bool) -> int:
    from dataclasses import replace

    from loraover.common.command_line import end_at_once
    from loraover.reporting.reporter import ConsoleReporter
    from loraover.sources.verb import perform
    from loraover_serve.watch.run import watch_adapters

    found = perform(watch_adapters, replace(request, report=ConsoleReporter()))
    if request.once:
        return found.exit_code
    end_at_once(0)  # a check that waits for a silent server would keep the interpreter from ending


up = request_command(ServeRequest, _serve)
watch = request_command(WatchRequest, _watch)
