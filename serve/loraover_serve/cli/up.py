"""The command `loraover serve up`."""

from __future__ import annotations

from pathlib import Path

import click

from loraover_serve.cli.options import MODEL, PATH, START_TIMEOUT, VLLM, SplitAtDashes


@click.command(
    cls=SplitAtDashes,
    options_metavar="[OPTIONS]",
    examples=["loraover serve up for-vllm", "loraover serve up shop support --port 8080 -- --max-model-len 2048"],
)
@click.argument("adapters", metavar="ADAPTER... [-- VLLM OPTIONS]", nargs=-1, required=True, type=PATH)
@MODEL
@VLLM
@click.option("--host", default="127.0.0.1", show_default=True, help="Address or host name that the server listens on.")
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    show_default="8000 or the next free one",
    help="Port that the server listens on.",
)
@click.option("--log", type=PATH, default=Path("vllm.log"), show_default=True, help="File for the server's output.")
@START_TIMEOUT
@click.pass_obj
def up(
    options: tuple[str, ...],
    /,
    adapters: tuple[Path, ...],
    model: str | None,
    vllm: str,
    host: str,
    port: int | None,
    log: Path,
    start_timeout_s: float,
) -> None:
    """Start vLLM with adapters, and print a request that works.

    Each ADAPTER is a folder that `loraover export vllm` has written; requests address the adapter by the folder's name.
    Adapters that vLLM would refuse, or would serve wrongly without a message, are refused before it starts.

    The server is ready when the base model and each adapter have answered. Ctrl-C, SIGTERM and SIGHUP stop it. If the
    environment variable VLLM_API_KEY is set, the server asks for that key.

    Words after -- are passed to `vllm serve`, except options that this command sets itself, such as --port.
    """
    from loraover.common.errors import EngineError
    from loraover.reporting.reporter import ConsoleReporter
    from loraover_serve.vllm.serve import example_request, serve_adapters

    with serve_adapters(
        adapters,
        model=model,
        vllm=vllm,
        host=host,
        port=port,
        log=log,
        start_timeout_s=start_timeout_s,
        options=options,
        report=ConsoleReporter(),
    ) as server:
        click.echo(f"ready: {server.url}\n\n{example_request(server)}\n\nCtrl-C stops it")
        server.wait()
    raise EngineError(f"vLLM ended or reported a failure; see {log}.")
