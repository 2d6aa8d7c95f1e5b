"""The command `loraover-serve`; a command that does more than to report is a file here."""

from __future__ import annotations

import click

from loraover.common.command_line import LazyGroup, entry_point
from loraover.reporting.request_command import Reporting

COMMANDS = {
    "up": "loraover_serve.cli.running:up",
    "watch": "loraover_serve.cli.running:watch",
    "parity": Reporting(
        "loraover_serve.parity.request:ParityRequest",
        "loraover_serve.parity.run:measure_parity",
        "loraover_serve.parity.tables:show_report",
        leaves_out=["runs"],
    ),
    "record": Reporting(
        "loraover_serve.verify.request:RecordRequest",
        "loraover_serve.verify.recorder:record_adapter",
        "loraover_serve.verify.show:show_recording",
    ),
    "verify": Reporting(
        "loraover_serve.verify.request:VerifyRequest",
        "loraover_serve.verify.run:verify_adapter",
        "loraover_serve.verify.show:show_report",
    ),
    "judge-rollouts": Reporting(
        "loraover_serve.rollouts.request:RolloutFileRequest",
        "loraover_serve.rollouts.run:judge_rollout_file",
        "loraover_serve.rollouts.show:show_report",
    ),
}
EXAMPLES = [
    "loraover serve up for-vllm",
    "loraover serve watch watch.yaml",
    "loraover serve judge-rollouts rollouts.jsonl",
    "loraover serve parity --adapter folded --baseline plain-lora -o parity",
]


@click.group(cls=LazyGroup, commands_at=COMMANDS, tree="loraover.cli:cli", examples=EXAMPLES)
@click.version_option(package_name="loraover")
def cli() -> None:
    """Serve adapters with vLLM, verify that engines answer as they were trained, and measure how fast they are."""


main = entry_point(cli)
