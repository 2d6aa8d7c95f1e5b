"""Continuation of DeepSpeed's checkpoints by another number of processes, through its universal checkpoints."""

from __future__ import annotations

import io
from argparse import Namespace
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from loraover.common.atomic_output import publish_directory, publish_text
from loraover.common.errors import ConfigError
from loraover.common.ranks import launched
from loraover.common.reporter import Reporter

FOLDER, LATEST = "universal", "latest_universal"


def convert_for_processes(checkpoint: Path, trainer: Any, report: Reporter) -> None:
    """Let a trainer continue from a checkpoint of DeepSpeed that another number of processes has saved.

    ZeRO cuts the optimizer's state into one piece for each process. Rank 0 joins the pieces with DeepSpeed's own
    converter, in the folder `universal` of the checkpoint, and DeepSpeed cuts the result anew.

    Args:
        checkpoint: The checkpoint.
        trainer: Trainer of transformers that has not begun.
        report: Receiver of progress.

    Raises:
        ConfigError: The optimizer's state is not that of Adam, the only one that the converter knows.

    Mutates:
        The trainer's settings of DeepSpeed.
    """
    pieces, ranks = sorted(checkpoint.glob("global_step*/*_optim_states.pt")), launched()
    if len(pieces) in (0, ranks.size):
        return
    if not trainer.args.optim.startswith("adamw_"):
        raise ConfigError(
            f"{checkpoint} was saved by {len(pieces)} process(es), here are {ranks.size}. DeepSpeed's converter, which "
            f"cuts the optimizer's state anew, knows that of Adam only, and training.optim is {trainer.args.optim}. "
            f"Continue the run in {len(pieces)} process(es)."
        )
    report.line(f"{checkpoint}: the optimizer's state of {len(pieces)} processes is cut for {ranks.size}")
    with ranks.first_then_others():
        ranks.write(_convert, pieces[0].parent, checkpoint)
    trainer.accelerator.state.deepspeed_plugin.hf_ds_config.config["checkpoint"] = {"load_universal": True}


def _convert(folder: Path, checkpoint: Path) -> None:
    """Write the universal checkpoint of a folder that DeepSpeed has saved; a former one is replaced."""
    from deepspeed.checkpoint import ds_to_universal

    with (
        publish_directory(checkpoint / FOLDER, replace=True) as draft,
        redirect_stdout(io.StringIO()),
        redirect_stderr(io.StringIO()),
    ):
        ds_to_universal.main(
            Namespace(
                input_folder=str(folder),
                output_folder=str(draft),
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
            )
        )
    publish_text(checkpoint / LATEST, FOLDER)
