"""Comparison of answers of several adapters at once with those of each adapter alone, and with PyTorch's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from pydantic import Field

from loraover.common.strict_json import StrictModel
from loraover_serve.engines.base import engine_errors
from loraover_serve.engines.sample import Sample, TokenRequest
from loraover_serve.parity.judge.outputs import Distance, Outputs, Reference, agrees, distance_of, equal_share
from loraover_serve.parity.samples import MIXED, SWITCHING, Measurement


class Together(StrictModel):
    """Answers of one adapter to requests that ran in turn, or in one batch, with those of other adapters."""

    engine: str
    concurrency: int
    arm: str = Field(description="Switching for adapters in turn, mixed for several adapters in one batch")
    adapter: str = Field(description="Name of the adapter's arm")
    prompts: int = Field(description="Number of prompts")
    alone_equal: float = Field(description="Share of prompts that the adapter alone answers with the same tokens")
    distance: Distance = Field(description="Distance of the answers from the adapter's in PyTorch")
    agree: bool = Field(description="Whether that distance is within the noise floor, that of the vanilla adapter")


def compare_together(
    run: Measurement,
    requests: Sequence[TokenRequest],
    adapter_of: Callable[[str, int], str],
    alone: Mapping[tuple[str, int], Sample],
    references: Mapping[str, Reference],
    floor: Outputs,
) -> list[Together]:
    """Compare the answers of "switching" and "mixed" with those of each adapter alone and with PyTorch's.

    Args:
        run: The samples.
        requests: The requests of the run.
        adapter_of: Function that gives the adapter which answered a request of an arm.
        alone: Answers of each adapter alone, by its name and the index of the request; only these are compared.
        references: Models in PyTorch, by the names of the adapters.
        floor: Comparison of the run's other arms, with the noise floor.

    Raises:
        EngineError: A prompt that PyTorch cannot run a model on.
    """
    found = []
    for name, reference in references.items():
        with engine_errors("PyTorch"), reference() as model:
            for arm in (SWITCHING, MIXED):
                firsts = {s.request: s for s in reversed(run.samples) if s.arm == arm}
                mine = [i for i in sorted(firsts) if adapter_of(arm, i) == name and (name, i) in alone]
                if not mine:
                    continue
                samples = [firsts[i] for i in mine]
                distance = distance_of(f"{name} in PyTorch", model, requests, samples)
                found.append(
                    Together(
                        engine=run.engine,
                        concurrency=run.concurrency,
                        arm=arm,
                        adapter=name,
                        prompts=len(mine),
                        alone_equal=equal_share(samples, [alone[name, i] for i in mine]),
                        distance=distance,
                        agree=agrees(distance, floor.vanilla),
                    )
                )
    return found
