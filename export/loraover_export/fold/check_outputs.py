"""Outputs of the folded adapter, as PEFT loads it from its files, against the unfolded model."""

from __future__ import annotations

from functools import partial
from itertools import combinations
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loraover.checkpoint.checkpoint import Checkpoint
from loraover.checkpoint.peft_adapter import read_adapter_dir, saved_labels
from loraover.common.reporter import SILENT, Reporter
from loraover.models.device import choose_compute
from loraover.models.load import ModelSource, load_config, load_model
from loraover.models.memory import Needs, fit_base, memory_explained
from loraover.reference.reference_model import sharing_weights
from loraover.reference.unfolded_model import Sampled, multiplications, unfolded
from loraover_export.fold.certificate import OutputCertificate
from loraover_export.fold.twins import FOLDED, FoldedAndTwins
from loraover_export.logits.deviation import RunningDeviation, largest_of
from loraover_export.logits.pieces import logits_of, pieces, tokens_at_once
from loraover_export.logits.prompts import read_prompts

TWINS = 3
CORES_AT_MOST = 8.0
"""Cores may take so many times the base model's multiplications; where they take more, tokens are sampled."""

TYPICAL_TOKENS = 256
"""Tokens in one forward pass for which cores are counted; the products of neighbours are made once for all of them."""


def check_outputs(
    checkpoint: Checkpoint,
    folded: Path,
    dtype: str,
    source: ModelSource,
    prompts_file: Path | None,
    report: Reporter = SILENT,
    *,
    device: str = "cpu",
    compute_dtype: str = "fp32",
    max_memory_gib: float | None = None,
) -> OutputCertificate:
    """Run the unfolded model and the folded adapter on the same prompts, and compare every logit.

    The unfolded model applies cores to activations and never forms A or B. The noise floor is the largest deviation
    between *twins* of the folded adapter, measured in the same run. A twin has each element of the exact matrices
    rounded at random to one of its two neighbours in `dtype`, and its rank dimension permuted, so that sums run in
    another order. Twins are compared with one another only, so that an error of the fold does not count as noise.

    All models share the base weights and are run on a few prompts of one length after another, so the memory depends
    neither on the number of prompts nor, where a model can leave logits out, on their length.

    If cores take more than CORES_AT_MOST times the multiplications of the base model, by count, they are applied at
    evenly spaced tokens of every layer, and the folded A and B at the others. Logits of all tokens are compared.

    Args:
        checkpoint: The checkpoint that was folded.
        folded: Folder of the written adapter.
        dtype: Data type that it is stored in.
        source: The base model.
        prompts_file: Text file with one prompt a line; None means a built-in set.
        report: Receiver of progress.
        device: Device to run on: cpu, cuda, mps, auto, or one GPU such as cuda:1.
        compute_dtype: Data type to run in: fp32, bf16, fp16 or fp64.
        max_memory_gib: Largest size of the base model's weights in memory; larger ones stay in their files.

    Raises:
        CheckpointError: The base model is not the one that was trained.
        ConfigError: A device that is not there, or memory that does not suffice; the message says what would fit.
        DataError: No usable prompt in the file.
    """
    place, _ = choose_compute(device, compute_dtype)
    where, needs = {"device": str(place), "compute_dtype": compute_dtype}, partial(_needs, checkpoint, source, place)
    work = "the check of the outputs"
    source = fit_base(work, source, needs=needs(), say=report.line, max_memory_gib=max_memory_gib, **where)
    with memory_explained(work, needs=needs, **where):
        return _check_outputs(checkpoint, folded, dtype, source, prompts_file, report, **where)


def _check_outputs(
    checkpoint: Checkpoint,
    folded: Path,
    dtype: str,
    source: ModelSource,
    prompts_file: Path | None,
    report: Reporter,
    device: str,
    compute_dtype: str,
) -> OutputCertificate:
    task, labels = checkpoint.config.task_type, saved_labels(checkpoint.shapes)
    at_once = tokens_at_once(load_config(source), torch.device(device), task)
    prompts = read_prompts(source, prompts_file, at_once=at_once)
    report.line(f"loading the base model from {source.origin} to {device}, {compute_dtype}")
    base = load_model(source, dtype=compute_dtype, task_type=task, num_labels=labels, device=device)
    sampled = _sampled(base, checkpoint, folded)
    with unfolded(sharing_weights(base), checkpoint, sampled=sampled) as reference:
        report.line(f"loading the folded adapter with PEFT, and {TWINS} random roundings of it for the noise floor")
        others = checkpoint.others.values()
        adapters = FoldedAndTwins(sharing_weights(base, but=others), checkpoint, folded, dtype, TWINS, report)
        compared, tokens = _Compared(), sum(batch.numel() for batch in prompts.batches)
        done = seen = 0
        label = f"running the unfolded model, the folded adapter and the roundings on {prompts.source}, tokens"
        with report.task(label, tokens) as advance:
            for ids in prompts.batches:
                seen += ids.numel() if sampled is None else sampled.count(ids.numel())
                for positions in pieces(base, ids):
                    compared.add(base, reference, adapters, ids.to(base.device), positions)
                    done += ids.numel() if positions is None else len(positions)
                    advance(done)
    return OutputCertificate(
        base=source.origin,
        device=device,
        compute_dtype=compute_dtype,
        prompts=sum(len(batch) for batch in prompts.batches),
        tokens=tokens,
        compared_tokens=seen,
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
