"""The command `loraover serve up`."""

from __future__ import annotations

import click

from loraover.reporting.request_command import request_command
from loraover_serve.vllm.request import ServeRequest


def _serve(request: ServeRequest, as_json: bool) -> None:
    """Serve until the server ends or is stopped."""
    from dataclasses import replace

    from loraover.common.errors import EngineError
    from loraover.reporting.reporter import ConsoleReporter
    from loraover.sources.verb import perform
    from loraover_serve.vllm.serve import example_request, serve_adapters

    with perform(serve_adapters, replace(request, report=ConsoleReporter())) as server:
        click.echo(f"ready: {server.url}\n\n{example_request(server)}\n\nCtrl-C stops it")
        server.wait()
    raise EngineError(f"vLLM ended or reported a failure; see {request.log}.")


up = request_command(ServeRequest, _serve)
