"""What each mechanism sends and holds for large models, in Markdown: python docs/predict_traffic.py. Nothing is loaded.

The formulas are held to counted bytes by tests/train/test_traffic.py, with two and four processes of a tiny model. The
table's figures, of machines that were not there, are predicted.
"""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

MECHANISMS = {"ddp": "DDP", "zero1": "ZeRO 1, 2", "zero3": "ZeRO 3", "fsdp2": "FSDP2"}
"""Rows of the table. With one micro-batch a step, ZeRO 2 sends and holds what ZeRO 1 does."""
CUTS_WEIGHTS = ("zero3", "fsdp2")
ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER = "all-reduce", "all-gather", "reduce-scatter"
RUNS = {"8B": 8, "70B": 64}
"""Number of GPUs of each size of `predict_sizes.py`."""
GB, CARD_GB, ROOM = 10**9, 80, 0.9


class Model(NamedTuple):
    """Numbers of a model.

    Args:
        layers: Numbers of the base model in its layers.
        rest: Numbers of the base model elsewhere: embedding, head and last norm.
        matrices: Numbers of A and B, which lie in the layers.
        cores: Numbers of the cores; 0 for plain LoRA.
    """

    layers: int
    rest: int
    matrices: int
    cores: int = 0


def messages(mechanism: str, model: Model, *, width: int, checkpointing: bool) -> dict[str, int]:
    """Return the bytes of the tensors in the messages of one step of one micro-batch, by the kind of message.

    Args:
        mechanism: Key of `MECHANISMS`, or zero2.
        model: Numbers of the model.
        width: Bytes of a weight in a message, and of a gradient under ZeRO or FSDP2; DDP sends float32.
        checkpointing: Whether activations are computed again in the backward pass.
    """
    own = width * model.matrices
    found = dict.fromkeys((ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER), 0)
    if mechanism == "ddp":
        found[ALL_REDUCE] = 4 * model.matrices
    elif mechanism not in CUTS_WEIGHTS:
        found[ALL_REDUCE] = found[ALL_GATHER] = own
    else:
        again = checkpointing and mechanism == "zero3"  # FSDP2 keeps a layer from its recomputation to its backward
        passes, rest_passes = (3, 2) if again else (2, 1)
        found[ALL_GATHER] = width * (passes * (model.layers + model.matrices) + rest_passes * model.rest)
        found[REDUCE_SCATTER] = own
    if model.cores and mechanism != "ddp":  # every process pulls back the whole gradients, in float32
        found[ALL_GATHER if mechanism == "fsdp2" else ALL_REDUCE] += 4 * model.matrices
    return found


def sent(found: dict[str, int], processes: int) -> int:
    """Return the bytes that each process sends for these messages, if they go round in a ring.

    Args:
        found: What `messages` returns.
        processes: Number of processes.
    """
    share = (processes - 1) / processes
    return round(share * (2 * found[ALL_REDUCE] + found[ALL_GATHER] + found[REDUCE_SCATTER]))


def held(mechanism: str, model: Model, *, width: int, processes: int) -> int:
    """Return the bytes that each process holds from one step to the next: weights, trained numbers and moments.

    Args:
        mechanism: Key of `MECHANISMS`, or zero2.
        model: Numbers of the model.
        width: Bytes of a weight, and under ZeRO of a number of A and B, which has a copy in float32.
        processes: Number of processes.
    """
    matrices, weights = model.matrices, width * (model.layers + model.rest)
    moments = 0 if model.cores else 8 * matrices  # matrices with cores have none, but in ZeRO's flat parameter
    cores = (4 + 8) * model.cores
    if mechanism == "ddp":
        return weights + 4 * matrices + moments + cores
    if mechanism == "fsdp2":
        return (weights + 4 * matrices + moments) // processes + cores
    whole, cut = weights + width * matrices, (4 + 8) * matrices
    return (whole + cut) // processes + cores if mechanism == "zero3" else whole + cut // processes + cores


def table_rows(size: str, lora: Model, over: Model) -> Iterator[str]:
    """Yield a row for each mechanism: bfloat16, gradient checkpointing, one micro-batch a step.

    Args:
        size: Key of `RUNS`.
        lora: Numbers of plain LoRA.
        over: Numbers of LoRA-Over.
    """
    processes = RUNS[size]
    for mechanism, title in MECHANISMS.items():
        cells = []
        for model in (lora, over):
            each = messages(mechanism, model, width=2, checkpointing=True)
            cells.append((sent(each, processes) / GB, held(mechanism, model, width=2, processes=processes) / GB))
        (plain_sent, plain_held), (over_sent, over_held) = cells
        fits = "" if over_held < ROOM * CARD_GB else f", more than a card of {CARD_GB} GB"
        yield (
            f"| {size} on {processes}, {title} | {plain_sent:.2f} GB | {over_sent:.2f} GB "
            f"| {over_sent - plain_sent:.2f} GB | {plain_held:.2f} GB | {over_held:.2f} GB{fits} |"
        )


def models(size: str) -> tuple[Model, Model]:
    """Return the numbers of plain LoRA and of LoRA-Over (mpo, all matrices) of a size, r = 16."""
    sizes: Any = runpy.run_path(str(Path(__file__).with_name("predict_sizes.py")))
    shape = sizes["LLAMA"] | sizes["SHAPES"][size]
    plan = sizes["plan_of"](size, "lora-over", None)
    rest = (2 * shape["vocab_size"] + 1) * shape["hidden_size"]
    lora = Model(plan.weights // 2 - rest, rest, plan.adapter // 4)
    return lora, lora._replace(cores=plan.cores // 4)


def main() -> None:
    """Print the table."""
    print("| model, GPUs, mechanism | LoRA sends | LoRA-Over sends | more | LoRA holds | LoRA-Over holds |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for size in RUNS:
        print("\n".join(table_rows(size, *models(size))))


if __name__ == "__main__":
    main()
