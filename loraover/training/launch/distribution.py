"""Settings of the Trainer with which the processes of a launcher train one run together."""

from __future__ import annotations

import io
import json
import os
from argparse import Namespace
from contextlib import redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any

from loraover.common.atomic_output import publish_directory, publish_text
from loraover.common.errors import ConfigError
from loraover.common.ranks import launched
from loraover.common.reporter import Reporter
from loraover.training.method_table import METHODS
from loraover.training.recipe import Recipe

PREPARATION_S = 86400
"""Seconds in which processes may wait for one that prepares data, before training begins."""

TIMEOUT_S = 600
"""Seconds in training after which a process that does not answer counts as lost; the Trainer's own default is 1800."""

DISTRIBUTIONS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "zero2": {"zero_optimization": {"stage": 2}},
    "zero3": {"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}},
    "fsdp2": {"state_dict_type": "FULL_STATE_DICT"},
}
"""Our settings of each way to spread a run, by the key `distributed.engine`, beside DeepSpeed's usual ones."""

DEEPSPEED = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
"""Settings of DeepSpeed that LoRA-Over needs, or that the Trainer fills in."""

SWITCHES = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")
"""Variables by which `accelerate launch` asks for DeepSpeed or FSDP, and the Trainer's settings do so too."""

LAUNCHED_WITH = [name for name in SWITCHES if os.environ.get(name) == "true"]
"""Variables that were set when this process began."""

CUTS_WEIGHTS = ("zero3", "fsdp2")
"""Distributions in which a process holds only its part of the weights."""


def check_processes(recipe: Recipe, *, starts: bool = True) -> None:
    """Check that the processes of a launcher can train a recipe."""
    spread, size = recipe.distributed.engine, launched().size
    if LAUNCHED_WITH:
        raise ConfigError(
            f"accelerate's configuration sets {LAUNCHED_WITH[0]}, which the recipe decides: set distributed.engine, "
            "and take a configuration of accelerate with distributed_type MULTI_GPU."
        )
    if starts and spread != "ddp" and "RANK" not in os.environ:
        raise ConfigError(
            f"distributed.engine is {spread}, which needs a launcher; start the run with torchrun --nproc-per-node N "
            "-m loraover.cli, followed by the words of this command."
        )
    if not starts:
        size = recipe.distributed.processes or 1
    if recipe.method in METHODS and (spread != "ddp" or size > 1) and (why := METHODS[recipe.method].one_process):
        raise ConfigError(f"method {recipe.method} trains in one process, since {why}. Start it without a launcher.")
    if recipe.method in METHODS and spread != "ddp":
        raise ConfigError(
            f"method {recipe.method} changes weights or their states itself, but distributed.engine {spread} shards "
            "them over processes; use ddp."
        )
    if spread in CUTS_WEIGHTS and recipe.method == "full":
        raise ConfigError(
            f"method full trains weights that distributed.engine {spread} would shard over processes; use ddp or zero2."
        )
    if spread in CUTS_WEIGHTS and recipe.evaluation.exact_match:
        raise ConfigError(
            f"evaluation.exact_match generates answers, but distributed.engine {spread} cannot generate with sharded "
            "weights; leave it out, and evaluate the trained adapter afterwards."
        )


def accumulation(recipe: Recipe) -> int:
    """Return the micro-batches that this process accumulates, so that a step is that of the recipe's processes."""
    here, asked = launched().size, recipe.distributed.processes or 1
    in_a_step = recipe.training.gradient_accumulation_steps * asked
    if in_a_step % here:
        raise ConfigError(
            f"a step of this run has {in_a_step} micro-batches ({asked} process(es), gradient_accumulation_steps "
            f"{recipe.training.gradient_accumulation_steps}), which {here} processes cannot share evenly. Start it "
            f"in a number of processes that divides {in_a_step}."
        )
    return in_a_step // here


def distribution_options(recipe: Recipe) -> dict[str, Any]:
    """Return the fields of transformers' TrainingArguments that spread a recipe's run; none for one process."""
    import torch

    for name in SWITCHES:
        os.environ.pop(name, None)  # another run in this process has left it
    if "RANK" not in os.environ:
        return {}
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # by which another run in this process would cut the weights of this one
    options: dict[str, Any] = {"ddp_timeout": PREPARATION_S}
    has_accelerator = torch.accelerator.is_available()
    if not has_accelerator:
        options["ddp_backend"] = "gloo"
    if torch.cuda.is_available() or not has_accelerator:  # of other accelerators, Accelerate knows the backend
        launched().start_group("cpu:gloo,cuda:nccl" if has_accelerator else "gloo", PREPARATION_S)
    spread = recipe.distributed.engine
    config = recipe.distributed.config
    if isinstance(config, str):
        file = config
        try:
            config = json.loads(Path(file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"distributed.config: {file} cannot be read as JSON: {error}") from error
        if not isinstance(config, dict):
            raise ConfigError(f"distributed.config: {file} holds {type(config).__name__}, expected an object.")
    settings = DISTRIBUTIONS[spread] | (config or {})
    if spread.startswith("zero"):
        if not has_accelerator:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
            import deepspeed

            # else it would compile C++ for messages in shared memory
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        stage = DISTRIBUTIONS[spread]["zero_optimization"] | settings.get("zero_optimization", {})
        options["deepspeed"] = DEEPSPEED | settings | {"zero_optimization": stage}
    elif spread == "fsdp2":
        options |= {"fsdp": True, "fsdp_config": settings}
    return options


def end_preparation(recipe: Recipe) -> None:
    """Let a process that does not answer from now on count as lost after `training.ddp_timeout` seconds."""
    from torch.distributed import distributed_c10d

    ranks = launched()
    if ranks.size > 1:
        given = (recipe.training.model_extra or {}).get("ddp_timeout")
        ranks.patience_s = float(TIMEOUT_S if given is None else given)
        distributed_c10d._set_pg_timeout(timedelta(seconds=ranks.patience_s))


UNIVERSAL, LATEST = "universal", "latest_universal"


def convert_for_processes(checkpoint: Path, trainer: Any, report: Reporter) -> None:
    """Let a trainer continue from a checkpoint of DeepSpeed that another number of processes has saved.

    ZeRO cuts the optimizer's state into one piece for each process. Rank 0 joins the pieces with DeepSpeed's own
    converter, in the folder `universal` of the checkpoint, and DeepSpeed cuts the result anew.
    """
    pieces, ranks = sorted(checkpoint.glob("global_step*/*_optim_states.pt")), launched()
    if len(pieces) in (0, ranks.size):
        return
    if not trainer.args.optim.startswith("adamw_"):
        raise ConfigError(
            f"{checkpoint} was saved by {len(pieces)} process(es), but this run has {ranks.size}. DeepSpeed's "
            f"converter can reshard only the state of Adam, but training.optim is {trainer.args.optim}. "
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
        publish_directory(checkpoint / UNIVERSAL, replace=True) as draft,
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
    publish_text(checkpoint / LATEST, UNIVERSAL)
