"""Does a parity run find a delay of known size? Three copies of one adapter, one of them behind a slow proxy.

It takes a few minutes, and a machine that does nothing else:

    cd tests && ../.venv/bin/python -m benchmarks.planted_delay
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from loraover.common.command_line import quiet_libraries
from loraover.models.load import load_tokenizer, resolve_model
from loraover_serve.engines.vllm import VllmEngine
from loraover_serve.parity.blocks import measure
from loraover_serve.parity.samples import CONTROL, FOLDED, VANILLA, Measurement, make_requests
from loraover_serve.parity.statistics import overall, results
from loraover_serve.vllm.client import VllmServer
from loraover_serve.vllm.server import VllmServerConfig, serve_vllm

from support.delaying_proxy import delaying
from support.serving import MODEL, vanilla
from support.vllm_command import vllm_command

ARMS = (VANILLA, CONTROL, FOLDED)
MARGIN = 0.05


def run_delayed(share: float, blocks: int, folder: Path) -> Measurement:
    """Send one request at a time, with 16 tokens to read and 12 to generate."""
    source = resolve_model(MODEL)
    adapter = vanilla(source, folder / "adapter")
    requests = make_requests("fixed", load_tokenizer(source), blocks, prompt_tokens=16, new_tokens=12, seed=0)
    config = VllmServerConfig(
        model=source.location,
        adapters=dict.fromkeys(ARMS, adapter),
        max_loras=len(ARMS),
        options=("--no-enable-prefix-caching", "--max-model-len", "64"),
    )
    with (
        serve_vllm(config, folder / "vllm.log", executable=str(vllm_command())) as server,
        delaying(server.url, FOLDED, share) as url,
    ):
        engine = VllmEngine(VllmServer(url, server.pid), dict(zip(ARMS, ARMS, strict=True)), timeout_s=60)
        return measure(engine, requests, concurrency=1, blocks=blocks, seed=0)


@click.command()
@click.option("--blocks", default=60, show_default=True, help="Number of blocks to measure.")
@click.option("--share", default=0.12, show_default=True, help="Delay to plant, as a share of a request's time.")
def main(blocks: int, share: float) -> None:
    """Plant a delay and look for it; exit code 1 unless it is found and the intervals cover its size."""
    quiet_libraries()
    with TemporaryDirectory() as folder:
        found = results([run_delayed(share, blocks, Path(folder))], MARGIN)
    verdict, reason = overall(found)
    print(f"{verdict}: {reason}")
    for result in found:
        low, high = result.interval
        print(f"{result.arm}, {result.measure}: {result.ratio:.4f} [{low:.4f}, {high:.4f}], {result.verdict}")
    delayed = [result.interval for result in found if result.arm == FOLDED]
    is_covered = all(low <= 1 + share <= high for low, high in delayed)
    print(f"{1 + share:g} is {'covered' if is_covered else 'missed'}")
    sys.exit(0 if verdict == "different" and is_covered else 1)


if __name__ == "__main__":
    main()
