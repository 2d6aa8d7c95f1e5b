"""The command `loraover-serve up`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from loraover_serve.cli.options import PATH, START_TIMEOUT, SplitAtDashes


@click.command(cls=SplitAtDashes, options_metavar="[OPTIONS]")
@click.argument("adapters", metavar="ADAPTER... [-- VLLM OPTIONS]", nargs=-1, required=True, type=PATH)
@click.option("--model", help="Base model, folder or hub name, instead of the one that the adapters name.")
@click.option("--vllm", envvar="LORAOVER_VLLM", default="vllm", show_default=True, help="The command vllm.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address or name to listen on.")
@click.option("--port", type=click.IntRange(1, 65535), help="Port to listen on; 8000 or the next free one otherwise.")
@click.option("--log", type=PATH, default=Path("vllm.log"), show_default=True, help="The server's output.")
@START_TIMEOUT
@click.pass_obj
def up(options: tuple[str, ...], /, **request: Any) -> None:
    """Start vLLM with ADAPTERs, as `loraover-export vllm` writes them, and print a request that works.

    Adapters that vLLM refuses, or would serve wrongly without a message, are refused before it starts. The server is
    ready when the base model and each adapter have answered. What stands after -- goes to vllm serve unchanged; what up
    sets itself, such as --port, is refused there. The server asks for the key in VLLM_API_KEY, if that is set.
    Ctrl-C, SIGTERM and SIGHUP stop the server.
    """
    from loraover_serve.vllm.up import UpRequest, serve_until_stopped

    serve_until_stopped(UpRequest(options=options, **request))
