"""The command `loraover-export`."""

from __future__ import annotations

from pathlib import Path

import click

from loraover.command import entry_point


@click.group()
@click.version_option(package_name="loraover")
def cli() -> None:
    """Fold LoRA-Over checkpoints into plain LoRA adapters, and prove the fold."""


@cli.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="New folder for the adapter.")
@click.option(
    "--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", show_default=True, help="Storage type."
)
@click.option("--check-error", is_flag=True, help="Compare outputs with the unfolded model too.")
@click.option("--base", help="Base model, folder or hub name, instead of the one that the checkpoint names.")
@click.option("--prompts", type=click.Path(path_type=Path), help="Text file with one prompt a line, for --check-error.")
@click.option("--json", "as_json", is_flag=True, help="Print the certificate as JSON.")
def fold(
    checkpoint: Path, output: Path, dtype: str, check_error: bool, base: str | None, prompts: Path | None, as_json: bool
) -> int:
    """Contract CHECKPOINT's cores into a plain PEFT adapter and certify every matrix.

    CHECKPOINT is a LoRA-Over checkpoint or a Trainer's checkpoint-N. Exit code 1: the check failed, and no adapter
    was left behind.
    """
    from loraover_export.run_fold import run_fold

    return run_fold(checkpoint, output, dtype, check_error, base, prompts, as_json)


main = entry_point(cli)

if __name__ == "__main__":
    main()
