"""The weighted sum of adapters as one plain LoRA, by concatenated ranks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from loraover.adapters.combine.requests import CombineRequest
from loraover.adapters.combine.sources import Sources, check_plain, deltas_of, read_sources
from loraover.adapters.numerics.delta import Delta, scale
from loraover.adapters.numerics.low_rank import concatenate, decompose, factor_noise
from loraover.adapters.uniform.certificate import LoraCertificate
from loraover.adapters.uniform.write_lora import Approximation, write_lora
from loraover.checkpoint.exact_tensors import Exact
from loraover.checkpoint.peft_adapter import ExactAdapter
from loraover.common.errors import ExportError
from loraover.sources.verb import verb

ZERO = (
    "the sum of the deltas is zero to rounding in every module, so the adapter would do nothing: the adapters are "
    "untrained, or their weights cancel; train the adapters, or change {weights}."
)


@verb(CombineRequest)
def combine_adapters(request: CombineRequest) -> LoraCertificate:
    """Write the weighted sum of adapters of one base model as one plain LoRA.

    The delta of each module is the sum of weight * scaling * B @ A over the adapters, exactly: their ranks are
    concatenated, and the weights multiply B; an adapter of weight 0 is left out. Where adapters share directions, such
    as two that began with the same A, the rank of the sum is smaller; it is then written with that rank. What this
    drops is rounding, and the certificate bounds it. A single adapter keeps its A and B. Base weights that a file holds
    beside A and B are taken over.

    Returns:
        The certificate, which the output holds too. If its verdict is "failed", nothing was written.

    Raises:
        ConfigError: Weights that cannot be used.
        CheckpointError: An adapter that cannot be trusted, or that holds NaN.
        ExportError: Adapters of different base models, adapters that are more than A and B, or a sum of zero.
        FoldError: An element beyond the range of `dtype`.
        OutputError: An output that cannot be written, or that exists and may not be replaced.
    """
    adapters = read_sources(request.sources)
    check_plain(adapters)
    weighted = [(a, weight) for a, weight in zip(adapters.adapters, request.each_weight, strict=True) if weight]
    if not weighted:
        raise ExportError(ZERO.format(weights=request.named("weights")))
    adapters, weights = Sources(tuple(a for a, _ in weighted)), [weight for _, weight in weighted]
    target = adapters.output(
        request,
        "Sum of LoRA adapters" if len(request.sources) > 1 else "LoRA adapter",
        asked={"weights": ",".join(map(str, request.each_weight))},
        sources=request.sources,
        if_zero=ZERO.format(weights=request.named("weights")),
    )
    with adapters.opened() as opened:
        work = [partial(_combined, opened, weights, module) for module in adapters.modules]
        return write_lora(work, len(work), target, request.report)


def _combined(opened: Sequence[ExactAdapter], weights: Sequence[float], module: str) -> Approximation:
    found = zip(deltas_of(opened, module), weights, strict=True)
    return add_deltas([(delta, weight) for delta, weight in found if delta is not None])


def add_deltas(weighted: Sequence[tuple[Delta, float]]) -> Approximation:
    """Return the sum of weighted deltas of one module.

    Its rank is the sum of their ranks, or the numerical rank of the sum where that is smaller: the smallest rank whose
    error is within the bound of rounding, which is then part of the sum's bound. It is 0 where the deltas cancel.
    """
    scaled = [(delta, scale(delta.b, weight)) for delta, weight in weighted]
    first = scaled[0][0]
    if len(scaled) == 1:
        return Approximation.exact(Delta(first.module, first.embedding, first.a, scaled[0][1]))
    b, a = concatenate([(b.value.double(), delta.a.value.double()) for delta, b in scaled])
    bound_b, bound_a = concatenate([(b.bound.double(), delta.a.bound.double()) for delta, b in scaled])
    whole = Delta(first.module, first.embedding, Exact(a, bound_a, None), Exact(b, bound_b, None))
    noise, svd = factor_noise(whole.b, whole.a), decompose(b, a)
    rank = svd.numerical_rank(noise)
    if rank == whole.rank:
        return Approximation(whole, svd.norm, arithmetic_bound=noise)
    least = svd.truncate(rank)
    fewer = least.delta(first.module, first.embedding)
    return Approximation(fewer, svd.norm, arithmetic_bound=least.error + least.bound + noise)
