"""The command `loraover-export fold`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="New folder for the adapter.")
@click.option(
    "--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", show_default=True, help="Storage type."
)
@click.option("--check-error", is_flag=True, help="Compare outputs with the unfolded model too.")
@click.option("--base", help="Base model, folder or hub name, instead of the one that the checkpoint names.")
@click.option("--prompts", type=click.Path(path_type=Path), help="Text file with one prompt a line, for --check-error.")
@click.option("--force", is_flag=True, help="Replace a folded adapter at the output, whole or not at all.")
@click.option("--json", "as_json", is_flag=True, help="Print the certificate as JSON.")
def fold(
    checkpoint: Path,
    output: Path,
    dtype: str,
    check_error: bool,
    base: str | None,
    prompts: Path | None,
    force: bool,
    as_json: bool,
) -> int:
    """Contract CHECKPOINT's cores into a plain PEFT adapter and certify every matrix.

    CHECKPOINT is a LoRA-Over checkpoint or a Trainer's checkpoint-N. Exit code 1: the check failed, and no adapter
    was left behind. Exit code 3: the adapter was written, but --check-error is inconclusive, since the adapter moves
    no logit by twice the error that is allowed.
    """
    from loraover_export.fold.run import run_fold

    return run_fold(checkpoint, output, dtype, check_error, base, prompts, as_json, force)
