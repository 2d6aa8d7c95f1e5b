"""Repairs of vLLM's faults in the process that calls them; a release without the fault is left as it is."""

from __future__ import annotations

import time
from functools import cache, partial
from pathlib import Path
from typing import Any

import vllm
from vllm.lora.request import LoRARequest

from loraover_serve.plugin.front import logger
from loraover_serve.plugin.parts import KNOWN, is_known, missing
from loraover_serve.plugin.service import is_whole

AGAIN_S, POLL_S = 60.0, 0.1
"""Seconds that a load waits while a prepared adapter is made again, and seconds between two looks at it."""


@cache
def mend(prepared: Path) -> None:
    """Repair the faults of a known release of vLLM; of an unknown one, warn, and say which parts it lacks.

    Args:
        prepared: Folder of prepared adapters.
    """
    if is_known(vllm.__version__):
        tell_apart()
        spare_base_rows()
        wait_for_files(prepared)
        return
    lacks = missing(Path(vllm.__file__).parents[1])
    found = (
        f"it lacks {'; '.join(lacks)}"
        if lacks
        else "it has all parts that the plug-in needs, but they were never run with it"
    )
    logger.warning(
        "vLLM %s is not one of %s, so its faults are not fixed: do not unload an adapter that is still answering, "
        "since loading it again may crash the server. Its private parts: %s.",
        vllm.__version__,
        ", ".join(KNOWN),
        found,
    )


def tell_apart() -> None:
    """Let vLLM compare adapters by name and id.

    vLLM compares `LoRARequest`s by their names, and collects those of a batch in a set (read in 0.32 and 0.33:
    `make_lora_inputs` of vllm/v1/worker/gpu_input_batch.py, `get_activate_loras` of vllm/v1/worker/gpu/lora_utils.py).
    If a name is loaded again beside a request that still runs, the batch has two ids under one name, and the set has
    one of them. The other is not activated, so that looking it up raises KeyError, which ends the server (seen in
    0.32).
    """
    if LoRARequest("name", 1, "path") != LoRARequest("name", 2, "path"):
        return

    def is_equal(one: LoRARequest, other: object) -> bool:
        if not isinstance(other, LoRARequest):
            return False
        return bool((one.lora_name, one.lora_int_id) == (other.lora_name, other.lora_int_id))

    LoRARequest.__eq__ = is_equal
    LoRARequest.__hash__ = lambda one: hash((one.lora_name, one.lora_int_id))


def spare_base_rows() -> None:
    """Let vLLM add nothing to the base model's rows on a CPU.

    A row of the base model has the index -1, by which vLLM 0.32 for CPUs finds the last adapter. The inputs of such
    rows are set to zero, so that zeros are added to them, as vLLM 0.33 does.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    import torch
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    row = torch.zeros(1, 1)
    lora_ops.bgmv_expand(torch.ones(1, 1), torch.ones(1, 1, 1), row, torch.tensor([-1]))
    if not row.any():
        return

    def expand(stock: Any, inputs: Any, weights: Any, output: Any, indices: Any, *more: Any, **named: Any) -> None:
        stock(inputs.masked_fill((indices == -1).unsqueeze(-1), 0), weights, output, indices, *more, **named)

    for name in ("bgmv_expand", "bgmv_expand_slice"):
        mended = partial(expand, getattr(lora_ops, name))
        setattr(lora_ops, name, mended)
        setattr(punica_cpu, name, mended)


def wait_for_files(prepared: Path) -> None:
    """Let a load wait while files of a prepared adapter are missing; the server's first process prepares it again.

    vLLM reads an adapter again within a step of its engine, and a failure there ends the server.
    """
    from vllm.lora.worker_manager import WorkerLoRAManager

    load = WorkerLoRAManager._load_adapter

    def load_whole(manager: WorkerLoRAManager, lora_request: LoRARequest) -> Any:
        folder, given_up = Path(lora_request.lora_path), time.monotonic() + AGAIN_S
        if prepared in folder.parents and not is_whole(folder):
            logger.warning("files of %s are missing; it is loaded when they have been prepared again", folder)
            while not is_whole(folder) and time.monotonic() < given_up:
                time.sleep(POLL_S)
        return load(manager, lora_request)

    WorkerLoRAManager._load_adapter = load_whole
