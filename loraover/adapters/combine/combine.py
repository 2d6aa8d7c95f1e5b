"""Adapters made from the factors of others as one plain LoRA: weighted sums, and smaller ranks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from loraover.adapters.combine.requests import CombineRequest, ShrinkRequest
from loraover.adapters.combine.sources import Sources, check_plain, deltas_of, read_sources
from loraover.adapters.numerics.delta import Delta, read_delta, scale
from loraover.adapters.numerics.low_rank import concatenate, decompose, factor_noise, rank_of_energy, singular_values
from loraover.adapters.uniform.certificate import LoraCertificate
from loraover.adapters.uniform.write_lora import Approximation, write_lora
from loraover.checkpoint.exact_tensors import Exact
from loraover.checkpoint.peft_adapter import ExactAdapter
from loraover.common.errors import ExportError
from loraover.common.threads import workers
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

        def combined(module: str) -> Approximation:
            found = zip(deltas_of(opened, module), weights, strict=True)
            return add_deltas([(delta, weight) for delta, weight in found if delta is not None])

        work = [partial(combined, module) for module in adapters.modules]
        return write_lora(work, len(work), target, request.report)


def add_deltas(weighted: Sequence[tuple[Delta, float]]) -> Approximation:
    """Return the sum of weighted deltas of one module, with its numerical rank if that is below the sum of the ranks.

    That is the smallest rank whose error is within the bound of rounding, which is then part of the sum's bound.
    """
    scaled = [(delta, scale(delta.b.arrays(), weight).tensors()) for delta, weight in weighted]
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


@verb(ShrinkRequest)
def shrink_adapter(request: ShrinkRequest) -> LoraCertificate:
    """Write an adapter with a smaller rank, whose every delta is the best approximation of the original delta.

    The singular values of scaling * B @ A come from its factors, without forming it. The error of a module is the root
    of the sum of squares of the singular values that are left out (Eckart and Young), and no adapter of that rank has a
    smaller one. The certificate states it for each module, with a bound of the arithmetic's error. An adapter has one
    rank, so that with `energy` all modules but one keep more than that share.

    Returns:
        The certificate, which the output holds too. If its verdict is "failed", nothing was written.

    Raises:
        ConfigError: Neither `rank` nor `energy`, both, or one out of range.
        CheckpointError: An adapter that cannot be trusted, or that holds NaN.
        ExportError: An adapter that has no larger rank, is more than A and B, or does nothing.
        FoldError: An element beyond the range of `dtype`.
        OutputError: An output that cannot be written, or that exists and may not be replaced.
    """
    adapter = read_sources([request.source])
    check_plain(adapter)
    target = adapter.output(request, "LoRA adapter of a smaller rank", asked=request.asked(), sources=[request.source])
    target.check()
    with adapter.opened() as (opened,):
        rank = _rank_to_keep(request, adapter, opened)

        def shrunk(module: str) -> Approximation:
            delta = read_delta(opened, module)
            if delta.rank <= rank:
                return Approximation.exact(delta)
            svd = decompose(delta.b.value.double(), delta.a.value.double())
            least, noise = svd.truncate(rank), factor_noise(delta.b, delta.a)
            return Approximation(least.delta(module, delta.embedding), svd.norm, least.error, least.bound + noise)

        work = [partial(shrunk, module) for module in adapter.modules]
        return write_lora(work, len(work), target, request.report)


def _rank_to_keep(request: ShrinkRequest, adapter: Sources, opened: ExactAdapter) -> int:
    largest = adapter.adapters[0].rank
    if request.rank is not None:
        if request.rank >= largest:
            raise ExportError(
                f"{request.source}: its rank is {largest}, so there is nothing to shrink to {request.rank}."
            )
        return request.rank
    share, modules = request.energy or 1.0, adapter.modules

    def needed(module: str) -> int:
        delta = read_delta(opened, module)
        return rank_of_energy(singular_values(delta.b.value.double(), delta.a.value.double()), share)

    ranks: list[int] = []
    with workers() as threads, request.report.task("reading singular values", len(modules)) as done:
        for rank in threads.map(needed, modules):
            ranks.append(rank)
            done(len(ranks))
    if max(ranks) >= largest:
        raise ExportError(
            f"{request.source}: {modules[ranks.index(max(ranks))]} needs all of its rank, {largest}, to keep {share} "
            f"of its squared norm; ask for a smaller {request.named('energy')}, or for a {request.named('rank')}."
        )
    return max(ranks)
