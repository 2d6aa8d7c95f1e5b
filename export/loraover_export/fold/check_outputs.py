"""Outputs of the folded adapter, as PEFT loads it from its files, against the unfolded model."""

from __future__ import annotations

from functools import partial
from itertools import combinations
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loraover.adapters.logits.deviation import RunningDeviation, largest_of
from loraover.adapters.logits.prompts import logits_of, read_prompts, tokens_at_once, walked
from loraover.checkpoint.checkpoint import Checkpoint
from loraover.checkpoint.peft_adapter import read_adapter_dir, saved_labels
from loraover.models.device import choose_compute
from loraover.models.load import ModelSource, load_config, load_model
from loraover.models.memory import Needs, fit_base, memory_explained
from loraover.reference.reference_model import sharing_weights
from loraover.reference.unfolded_model import Sampled, multiplications, unfolded
from loraover_export.fold.certificate import OutputCertificate
from loraover_export.fold.twins import FOLDED, TWINS, FoldedAndTwins
from loraover_export.requests import FoldRequest

CORES_AT_MOST = 8.0
"""Cores may take so many times the base model's multiplications; where they take more, tokens are sampled."""

TYPICAL_TOKENS = 256
"""Tokens in one forward pass for which cores are counted; the products of neighbours are made once for all of them."""


def check_outputs(request: FoldRequest, checkpoint: Checkpoint, folded: Path, source: ModelSource) -> OutputCertificate:
    """Run the unfolded model and the folded adapter on the same prompts, and compare every logit.

    The unfolded model applies cores to activations and never forms A or B. The noise floor is the largest deviation
    between *twins* of the folded adapter, measured in the same run. A twin has each element of the exact matrices
    rounded at random to one of its two neighbours in the storage type, and its rank dimension permuted, so that sums
    run in another order. Twins are compared with one another only, so that an error of the fold does not count as
    noise.

    All models share the base weights and are run on a few prompts of one length after another, so the memory depends
    neither on the number of prompts nor, where a model can leave logits out, on their length.

    If cores take more than CORES_AT_MOST times the multiplications of the base model, by count, they are applied at
    evenly spaced tokens of every layer, and the folded A and B at the others. Logits of all tokens are compared.

    Args:
        request: The arguments of the fold.
        checkpoint: The checkpoint that was folded.
        folded: Folder of the written adapter.
        source: The base model.

    Raises:
        CheckpointError: The base model is not the one that was trained.
        ConfigError: A device that is not there, or memory that does not suffice; the message says what would fit.
        DataError: No usable prompt in the file.
    """
    place, _ = choose_compute(request.device, request.compute_dtype)
    where = {"device": str(place), "compute_dtype": request.compute_dtype}
    work, needs = "the check of the outputs", partial(_needs, checkpoint, source, place)
    limit, say = request.max_memory_gib, request.report.line
    source = fit_base(work, source, needs=needs(), say=say, max_memory_gib=limit, **where)
    with memory_explained(work, needs=needs, **where):
        return _check_outputs(request, checkpoint, folded, source, str(place))


def _check_outputs(
    request: FoldRequest, checkpoint: Checkpoint, folded: Path, source: ModelSource, device: str
) -> OutputCertificate:
    report, compute_dtype = request.report, request.compute_dtype
    task, labels = checkpoint.config.task_type, saved_labels(checkpoint.shapes)
    at_once = tokens_at_once(load_config(source), torch.device(device), task)
    prompts = read_prompts(source, request.prompts, at_once=at_once)
    report.line(f"loading the base model from {source.origin} to {device}, {compute_dtype}")
    base = load_model(source, dtype=compute_dtype, task_type=task, num_labels=labels, device=device)
    sampled = _sampled(base, checkpoint, folded)
    with unfolded(sharing_weights(base), checkpoint, sampled=sampled) as reference:
        report.line(f"loading the folded adapter with PEFT, and {TWINS} random roundings of it for the noise floor")
        others = checkpoint.others.values()
        adapters = FoldedAndTwins(sharing_weights(base, but=others), checkpoint, folded, request.dtype, report)
        compared = _Compared()
        with walked(prompts, base, "the unfolded model, the folded adapter and the roundings", report) as steps:
            for ids, positions in steps:
                compared.add(base, reference, adapters, ids, positions)
    return OutputCertificate(
        base=source.origin,
        device=device,
        compute_dtype=compute_dtype,
        prompts=sum(len(batch) for batch in prompts.batches),
        tokens=prompts.tokens,
        compared_tokens=sum(n if sampled is None else sampled.count(n) for n in map(torch.numel, prompts.batches)),
        prompt_source=prompts.source,
        error=compared.error.result(),
        noise=largest_of([noise.result() for noise in compared.noises]),
        twins=TWINS,
        adapter_effect=compared.effect.result().max_logit,
    )


def _sampled(base: nn.Module, checkpoint: Checkpoint, folded: Path) -> Sampled | None:
    """Return the tokens to apply cores at, where cores take too long at all of them; None means all."""
    cores = multiplications(checkpoint, TYPICAL_TOKENS) / TYPICAL_TOKENS
    tables = (module for module in base.modules() if not isinstance(module, nn.Embedding))
    dense = sum(p.numel() for module in tables for p in module.parameters(recurse=False) if p.ndim > 1)
    share = CORES_AT_MOST * dense / cores if cores else 1.0
    return None if share >= 1 else Sampled(share, read_adapter_dir(folded))


def _needs(checkpoint: Checkpoint, source: ModelSource, place: torch.device) -> Needs:
    """Estimate what a check needs: the base model, the folded adapter with its twins and cores, and a prompt."""
    shapes = checkpoint.shapes
    adapter = sum(prod(shapes[key]) for key in checkpoint.matrices)
    at_once = tokens_at_once(load_config(source), place)
    copies = 2 + TWINS + 2  # the folded one in PEFT and kept; cores are hardly more numbers, but in float64
    return Needs.of_model(source, adapters=copies * adapter, tokens=at_once, logits=4)


class _Compared:
    """Deviations for the certificate, over all pieces so far."""

    def __init__(self) -> None:
        self.effect, self.error = RunningDeviation(), RunningDeviation()
        self.noises = [RunningDeviation() for _ in combinations(range(TWINS), 2)]

    def add(self, base: Any, unfolded: Any, adapters: FoldedAndTwins, ids: Tensor, positions: Tensor | None) -> None:
        """Run every model on one piece; the twins' logits are the most that is held at once."""
        reference = logits_of(unfolded, ids, positions)
        self.effect.add(reference, logits_of(base, ids, positions))
        self.error.add(reference, logits_of(adapters.active(FOLDED), ids, positions))
        del reference
        twins = [logits_of(adapters.active(name), ids, positions) for name in adapters.twins]
        for noise, (one, other) in zip(self.noises, combinations(twins, 2), strict=True):
            noise.add(one, other)
