"""Arguments of the verbs that read adapters by their deltas, checked before any file is read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from loraover.adapters.uniform.request_fields import (
    base_model,
    check_faults,
    given_adapter,
    logits_device,
    logits_dtype,
    plain_adapter,
    prompts,
    replaces,
    stored_dtype,
)
from loraover.common.request import AnyName, AnyNumbers, AnyPath, AnyPaths, Request, option


@dataclass(frozen=True)
class CombineRequest(Request):
    """Write the weighted sum of SOURCES as one plain LoRA adapter, exactly.

    SOURCES are LoRA-Over checkpoints, folded adapters or plain PEFT LoRAs of one base model. The ranks are
    concatenated; where the adapters share directions, the sum has a smaller rank and is written with it.

    Exit code 1: a written matrix failed its check, and nothing was written.
    """

    verb = "loraover export combine"
    examples = (
        "loraover export combine maths code -o both",
        "loraover export combine maths code -o both --weights 0.7,0.3 --dtype bf16",
    )

    sources: AnyPaths = given_adapter(
        "LoRA-Over checkpoints, folded adapters or plain PEFT LoRAs of one base model", metavar="SOURCES..."
    )
    output: AnyPath = option("New folder for the adapter, its certificate and a model card.", short="-o")
    weights: AnyNumbers | None = option(
        "Weight of each adapter, with commas between them, such as 0.7,0.3; 0 leaves it out.",
        default=None,
        default_text="1 for each",
        metavar="NUMBERS",
        has_commas=True,
    )
    dtype: str = stored_dtype()
    force: bool = replaces("certified adapter")

    def faults(self) -> Iterator[str]:
        if len(self.each_weight) != len(self.sources):
            yield (
                f"{self.named('weights')} has {len(self.each_weight)} numbers for {len(self.sources)} adapters; give "
                "one for each."
            )
        for weight in self.each_weight:
            if not math.isfinite(weight):
                yield f"{self.named('weights')}: {weight} cannot be used; give finite numbers."

    @property
    def each_weight(self) -> tuple[float, ...]:
        """Weights of the adapters, in the order of the sources."""
        return (1.0,) * len(self.sources) if self.weights is None else self.weights


@dataclass(frozen=True)
class ShrinkRequest(Request):
    """Write SOURCE with a smaller rank: the best approximation of each module, with its error.

    SOURCE is a LoRA-Over checkpoint, a folded adapter or any plain PEFT LoRA. What a module loses is the part of its
    delta that its smallest singular values make up, and no adapter of that rank loses less.

    Exit code 1: a written matrix failed its check, and nothing was written.
    """

    verb = "loraover export shrink"
    examples = (
        "loraover export shrink folded -o smaller --rank 16",
        "loraover export shrink folded -o smaller --energy 0.99 --dtype bf16",
    )

    source: AnyPath = plain_adapter()
    output: AnyPath = option("New folder for the adapter, its certificate and a model card.", short="-o")
    rank: int | None = option("Rank to keep in every module; smaller ones are kept as they are.", default=None, least=1)
    energy: float | None = option(
        "Share of the squared Frobenius norm that every module keeps at least, such as 0.99; the rank is the smallest "
        "that keeps it in all modules.",
        default=None,
    )
    dtype: str = stored_dtype()
    force: bool = replaces("certified adapter")

    def faults(self) -> Iterator[str]:
        rank, energy = self.named("rank"), self.named("energy")
        if (self.rank is None) == (self.energy is None):
            yield f"give either {rank} or {energy}, which say how much to keep."
        elif self.energy is not None and not 0 < self.energy < 1:
            yield f"{energy} is {self.energy}, expected a share between 0 and 1, such as 0.99."

    def asked(self) -> dict[str, str]:
        """Return what was asked for, by the names of the arguments."""
        return {"energy": repr(self.energy)} if self.rank is None else {"rank": str(self.rank)}


@dataclass(frozen=True)
class DiffRequest(Request):
    """Compare the adapters FIRST and SECOND module by module: norms, differences and principal angles.

    Both are LoRA-Over checkpoints, folded adapters or plain PEFT LoRAs of one base model. A and B are not unique, so
    their products are compared, and never formed.
    """

    verb = "loraover export diff"
    examples = (
        "loraover export diff run-1 run-2",
        "loraover export diff folded smaller --logits --prompts prompts.txt",
    )
    json_help = "Print the comparison as JSON, with every module and angle."

    first: AnyPath = plain_adapter()
    second: AnyPath = given_adapter("The other adapter")
    logits: bool = option("Also run both adapters on the base model and compare their logits.", default=False)
    model: AnyName | None = base_model(" for the comparison of logits")
    prompts: AnyPath | None = prompts()
    device: str = logits_device()
    compute_dtype: str = logits_dtype()

    def faults(self) -> Iterator[str]:
        yield from check_faults(self, "logits", "model", "prompts", "device", "compute_dtype")
