"""The arguments of the judgement of a file of rollouts, checked before anything starts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from loraover.common.request import AnyPath, Request, argument, option

MOST = 1_000_000
"""Largest window, number of processes, scaling, and noise in nats."""
WINDOW = 8
"""Number of steps that are judged together at most, unless told otherwise."""


@dataclass(frozen=True)
class RolloutFileRequest(Request):
    """Judge from FILE, step by step, whether an engine sampled from the policy that was trained; name the likely fault.

    FILE has one JSON object a line for each sampled token, in the order of the steps, with the keys step, prompt_id,
    position, e, a and b, and where they are known row, token, earlier, candidates and engine_prompt_id. The arrays of a
    training loop fill it; docs/rollouts.md shows where some loops have them.

    Exit code 0: as trained at the end, and no step differs; 1: a step differs; 3: inconclusive, since it is too early,
    noise hides the scale, or a step cannot be judged; 2: unusable request or file.
    """

    verb = "loraover judge-rollouts"
    examples = (
        "loraover judge-rollouts rollouts.jsonl",
        "loraover judge-rollouts rollouts.jsonl --scaling 2 -o judged",
    )

    file: AnyPath = argument("JSON Lines with a row for each sampled token.", metavar="FILE")
    window: int = option("Largest number of steps that are judged together.", default=WINDOW, least=1, most=MOST)
    noise: float | None = option(
        "RMS difference of the engine's logprobs from the trainer's where the adapter is zero, in nats.",
        default=None,
        default_text="learned from the steps where it is",
        least=0,
        most=MOST,
    )
    scaling: float | None = option(
        "Factor of B @ A in training, such as alpha / r, so that an engine which leaves it out is named.",
        default=None,
        above=0,
        most=MOST,
    )
    ranks: int = option(
        "Number of the trainer's processes, so that a sum over them in place of a mean is named.",
        default=1,
        least=1,
        most=MOST,
    )
    output: AnyPath | None = option(
        "New folder for rollouts.json, rollouts.html and its figures.", default=None, short="-o"
    )

    def faults(self) -> Iterator[str]:
        if self.ranks > 1 and self.scaling is None:
            yield f"{self.named('ranks')} needs {self.named('scaling')}, which is missing."

    @property
    def loads_models(self) -> bool:
        return False
