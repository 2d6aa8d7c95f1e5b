"""False alarms and misses of a check by a reference, on the noise of recorded engines.

The answers are those that `benchmarks.verify_noise` recorded, of which the eight likeliest tokens are known at each
position, and sets of questions are drawn as `support.recorded_noise` says. Here a set has as many questions, and each
question as many positions, as a reference has by default, and the server gives 5 or 20 logprobs. For what is missed,
the adapter's effect is RATIO times the base model's noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import numpy as np
from rich.table import Table

from loraover_serve.verify.power import NUMBERS
from loraover_serve.verify.request import RecordRequest

from benchmarks.shown import table_of
from support.recorded_noise import NOISE, Recorded

TOPS = (5, 20)
RATIO, FAULT = 10.0, 5
"""Effect of the adapter over noise, and the fault of its scaling in percent, of which one set in 100 may be missed."""
MISSED = 0.01
RUNS, WRONG_RUNS, BATCH = 40_000, 500, 500
QUESTIONS, POSITIONS = NUMBERS[0], RecordRequest.new_tokens


def measure() -> Iterator[Table]:
    """Yield the table."""
    heads = ("engine", "logprobs", "right: differs", "right: passes", f"{FAULT} % off: missed", "smallest fault")
    table = table_of(f"Checks by {QUESTIONS} questions with {POSITIONS} positions each", *heads)
    for engine in engines():
        for top in TOPS:
            table.add_row(*row(engine, top))
    table.caption = (
        f"Right: {RUNS:,} sets with the adapter as it was recorded; 0 of them is at most 1 in {RUNS // 3:,} (95 % "
        "confidence). A set passes if the server's number format was declared. Missed: sets with a scaling that is "
        f"{FAULT} % too small or too large, whichever is worse, that do not differ, where the adapter's effect is "
        f"{RATIO:g} times the noise; {WRONG_RUNS:,} sets each. Smallest fault: that of which at most 1 in 100 sets is "
        "missed then."
    )
    yield table


ENGINES = ("vllm-bf16", "torch-fp8", "mlx-int4")
"""Recorded engines, one of each format of weights that servers have; mlx-int4 rounds groups of weights as AWQ does."""


def engines() -> list[Recorded]:
    """The recorded engines."""
    return [Recorded(NOISE / f"{name}.npz") for name in ENGINES]


def row(engine: Recorded, top: int) -> tuple[str, ...]:
    """The cells of one engine with so many logprobs."""
    asked, draw = engine.cut(POSITIONS, top), np.random.default_rng(0)
    right = [asked.judged("adapter", draw, BATCH, QUESTIONS, repeats=False) for _ in range(RUNS // BATCH)]
    differs = np.concatenate([each.differs for each in right])
    narrow = np.concatenate([each.narrow for each in right])
    seen = next(percent for percent in count(FAULT) if missed(asked, percent) <= MISSED)
    return (
        engine.name,
        str(top),
        f"{np.sum(differs)}",
        f"{np.mean(~differs & narrow):.1%}",
        f"{missed(asked, FAULT):.1%}",
        f"{seen} %",
    )


def missed(asked: Recorded, percent: int) -> float:
    """Share of sets in which the worse of the two faults of the scaling is not found."""
    found = []
    for factor in (1 - percent / 100, 1 + percent / 100):
        faulty, draw = asked.served(RATIO, factor), np.random.default_rng(1)
        runs = [faulty.judged("adapter", draw, BATCH, QUESTIONS, repeats=False) for _ in range(WRONG_RUNS // BATCH)]
        found.append(1 - float(np.mean(np.concatenate([each.differs for each in runs]))))
    return max(found)
