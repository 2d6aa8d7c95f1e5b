"""An adapter of a smaller rank: the best approximation of every delta, with its error."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from loraover.adapters.combine.requests import ShrinkRequest
from loraover.adapters.combine.sources import Sources, check_plain, read_sources
from loraover.adapters.numerics.delta import read_delta
from loraover.adapters.numerics.low_rank import decompose, factor_noise, rank_of_energy, singular_values
from loraover.adapters.uniform.certificate import LoraCertificate
from loraover.adapters.uniform.write_lora import Approximation, Work, write_lora
from loraover.checkpoint.peft_adapter import ExactAdapter
from loraover.common.errors import ExportError
from loraover.common.reporter import Reporter
from loraover.common.threads import workers
from loraover.sources.verb import verb


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
        kept = _rank(request, adapter, opened)
        work: list[Work] = [partial(_shrunk, opened, kept, module) for module in adapter.modules]
        return write_lora(work, len(work), target, request.report)


def _rank(request: ShrinkRequest, adapter: Sources, opened: ExactAdapter) -> int:
    """Return the rank to keep, which is smaller than that of some module."""
    largest = adapter.adapters[0].rank
    if request.rank is not None:
        if request.rank >= largest:
            raise ExportError(
                f"{request.source}: its rank is {largest}, so there is nothing to shrink to {request.rank}."
            )
        return request.rank
    share = request.energy or 1.0
    found = [rank_of_energy(values, share) for values in _spectra(adapter, opened, request.report)]
    if max(found) >= largest:
        module = adapter.modules[found.index(max(found))]
        raise ExportError(
            f"{request.source}: {module} needs all of its rank, {largest}, to keep {share} of its squared norm; ask "
            f"for a smaller {request.named('energy')}, or for a {request.named('rank')}."
        )
    return max(found)


def _spectra(adapter: Sources, opened: ExactAdapter, report: Reporter) -> Iterator[torch.Tensor]:
    def spectrum(module: str) -> torch.Tensor:
        delta = read_delta(opened, module)
        return singular_values(delta.b.value.double(), delta.a.value.double())

    with workers() as threads, report.task("reading singular values", len(adapter.modules)) as done:
        for k, values in enumerate(threads.map(spectrum, adapter.modules), 1):
            yield values
            done(k)


def _shrunk(opened: ExactAdapter, rank: int, module: str) -> Approximation:
    delta = read_delta(opened, module)
    if delta.rank <= rank:
        return Approximation.exact(delta)
    svd = decompose(delta.b.value.double(), delta.a.value.double())
    least, noise = svd.truncate(rank), factor_noise(delta.b, delta.a)
    return Approximation(least.delta(module, delta.embedding), svd.norm, least.error, least.bound + noise)
