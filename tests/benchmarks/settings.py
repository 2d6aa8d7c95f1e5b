"""What `benchmarks.training` trains, and by which arms; apart from it, since nothing has to be imported for that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

PLAIN, NAIVE = "LoRA", "naive autograd"
EIGEN: dict[str, dict[str, str]] = {"eigen": {}, "eigen, long side measured": {"long": "calibration"}}
"""Options of eigen: the default, and those of the study."""


@dataclass(frozen=True)
class Setting:
    """What is trained.

    Args:
        model: Hub name of the base model, which is trained in float32; or a size of `SIZES`, whose random weights are
            in bfloat16, as are the products, with gradient checkpointing.
        batch: Rows of a batch.
        length: Tokens of a row.
        rank: Rank of the LoRA, on all linear layers.
        turns: How often each arm takes a step: in every round, in every second one, and so on.
        rounds: Number of rounds.
        square: Size of the matrices whose product gives the rate of the machine.
    """

    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    batch: int = 4
    length: int = 64
    rank: int = 8
    turns: Mapping[str, int] = field(default_factory=lambda: {PLAIN: 1, "mpo": 1, **dict.fromkeys(EIGEN, 2), NAIVE: 5})
    rounds: int = 60
    square: int = 2048


SMOL = Setting()
