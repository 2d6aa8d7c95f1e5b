"""Outputs of the folded adapter, as PEFT loads it, against those of the unfolded model, and on a quantised base."""

from __future__ import annotations

from itertools import combinations
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loraover.adapters.numerics.tensor_rounding import STORAGE_DTYPES, round_randomly
from loraover.adapters.prompts import logits_of, read_prompts, tokens_at_once, walked
from loraover.adapters.verdict import RunningDeviation, largest_of
from loraover.checkpoint.checkpoint import Checkpoint
from loraover.checkpoint.peft_adapter import read_adapter_dir, saved_labels, site_key
from loraover.common.errors import CheckpointError
from loraover.common.reporter import SILENT, Reporter
from loraover.models.device import choose_compute
from loraover.models.load import ModelSource, load_config, load_model
from loraover.models.memory import Needs, fit_base, memory_explained
from loraover.overparam.sites import Site, find_sites, lora_layers
from loraover.reference import Sampled, multiplications, reference_model, sharing_weights, unfolded
from loraover_export.fold.report import OutputCertificate, TrainedBase
from loraover_export.requests import FoldRequest

CORES_AT_MOST = 8.0
"""Largest ratio of the cores' multiplications to the base model's; above it, only some tokens are run with cores."""

TYPICAL_TOKENS = 256
"""Tokens of one forward pass for which multiplications are counted; products of neighbouring cores are made once."""

FOLDED = "folded"
TWINS = 3


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
    """
    place, _ = choose_compute(request.device, request.compute_dtype)
    report, device, compute_dtype = request.report, str(place), request.compute_dtype
    where, work = {"device": device, "compute_dtype": compute_dtype}, "the check of the outputs"
    task, labels = checkpoint.config.task_type, saved_labels(checkpoint.shapes)
    numbers = sum(prod(checkpoint.shapes[key]) for key in checkpoint.matrices)
    copies = 2 + TWINS + 2  # the folded one in PEFT and kept; cores are hardly more numbers, but in float64
    at_once = tokens_at_once(load_config(source), place)
    needs = Needs.of_model(source, adapters=copies * numbers, tokens=at_once, logits=4)
    source = fit_base(work, source, needs=needs, say=report.line, max_memory_gib=request.max_memory_gib, **where)
    with memory_explained(work, needs=lambda: needs, **where):
        prompts = read_prompts(source, request.prompts, at_once=tokens_at_once(load_config(source), place, task))
        report.line(f"loading the base model from {source.origin} to {device}, {compute_dtype}")
        base = load_model(source, dtype=compute_dtype, task_type=task, num_labels=labels, device=device)
        sampled = _sampled(base, checkpoint, folded)
        with unfolded(sharing_weights(base), checkpoint, sampled=sampled) as reference:
            report.line(f"loading the folded adapter with PEFT, and {TWINS} random roundings of it for the noise floor")
            others = checkpoint.others.values()
            adapters = FoldedAndTwins(sharing_weights(base, but=others), checkpoint, folded, request.dtype, report)
            effect, error = RunningDeviation(), RunningDeviation()
            noises = [RunningDeviation() for _ in combinations(range(TWINS), 2)]
            with walked(prompts, base, "the unfolded model, the folded adapter and the roundings", report) as steps:
                for ids, positions in steps:
                    expected = logits_of(reference, ids, positions)
                    effect.add(expected, logits_of(base, ids, positions))
                    error.add(expected, logits_of(adapters.active(FOLDED), ids, positions))
                    del expected  # the twins' logits are the most that is held at once
                    twins = [logits_of(adapters.active(name), ids, positions) for name in adapters.twins]
                    for noise, (one, other) in zip(noises, combinations(twins, 2), strict=True):
                        noise.add(one, other)
                    del twins, one, other
    return OutputCertificate(
        base=source.origin,
        device=device,
        compute_dtype=compute_dtype,
        prompts=sum(len(batch) for batch in prompts.batches),
        tokens=prompts.tokens,
        compared_tokens=sum(n if sampled is None else sampled.count(n) for n in map(torch.numel, prompts.batches)),
        prompt_source=prompts.source,
        error=error.result(),
        noise=largest_of([noise.result() for noise in noises]),
        twins=TWINS,
        adapter_effect=effect.result().max_logit,
    )


def _sampled(base: nn.Module, checkpoint: Checkpoint, folded: Path) -> Sampled | None:
    """Return the positions at which to apply cores, where applying them at all would take too long; None means all."""
    cores = multiplications(checkpoint, TYPICAL_TOKENS) / TYPICAL_TOKENS
    tables = (module for module in base.modules() if not isinstance(module, nn.Embedding))
    dense = sum(p.numel() for module in tables for p in module.parameters(recurse=False) if p.ndim > 1)
    share = CORES_AT_MOST * dense / cores if cores else 1.0
    return None if share >= 1 else Sampled(share, read_adapter_dir(folded))


def compare_bases(request: FoldRequest, folded: Path, source: ModelSource, quantization: str) -> TrainedBase:
    """Run a plain adapter on the full base model and on the quantised one, and compare every logit."""
    adapter, compute_dtype = read_adapter_dir(folded), request.compute_dtype
    place, _ = choose_compute(request.device, compute_dtype)
    device, at_once = str(place), tokens_at_once(load_config(source), place)
    prompts = read_prompts(source, request.prompts, at_once=at_once)
    from peft import PeftModel

    request.report.line(f"loading the base model in full precision and as {quantization} to {device}")
    full = load_model(source, dtype=compute_dtype, task_type=adapter.config.task_type, device=device)
    small = load_model(source, dtype=compute_dtype, device=device, quantization=quantization)
    small = PeftModel.from_pretrained(small, str(folded)).eval()
    difference, bases = RunningDeviation(), RunningDeviation()
    with reference_model(full, adapter) as over_full, walked(prompts, full, "both bases", request.report) as steps:
        for ids, positions in steps:
            difference.add(logits_of(over_full, ids, positions), logits_of(small, ids, positions))
            with small.disable_adapter():
                bases.add(logits_of(full, ids, positions), logits_of(small, ids, positions))
    return TrainedBase(
        quantization=quantization, served=source.origin, difference=difference.result(), bases=bases.result()
    )


class FoldedAndTwins:
    """Base model with the folded adapter and its twins, of which one is active at a time.

    A twin has each element of the exact matrices rounded at random to one of its two neighbours, and its rank dimension
    permuted, so that sums run in another order. It shares all else with the folded adapter. Neighbours are those in the
    storage type, or in the compute dtype if that is coarser: a check cannot see finer than it computes.

    Args:
        base: The plain base model, which becomes part of the PEFT model.
        checkpoint: The checkpoint, which holds the exact matrices.
        folded: Folder of the written adapter.
        dtype: Data type that it is stored in.

    Raises:
        CheckpointError: PEFT has made a matrix that the checkpoint does not hold.
    """

    def __init__(
        self,
        base: Any,
        checkpoint: Checkpoint,
        folded: Path,
        dtype: str,
        report: Reporter = SILENT,
    ) -> None:
        from peft import PeftModel

        computed: torch.dtype = base.dtype
        coarser = max(STORAGE_DTYPES[dtype], computed, key=lambda kind: torch.finfo(kind).eps)
        self._model = PeftModel.from_pretrained(base, str(folded), torch_device=str(base.device))
        if computed == torch.float64:  # PEFT keeps adapters in float32; their numbers are exact in either
            for layer in lora_layers(self._model).values():
                layer.double()
        for parameter in filter(torch.is_floating_point, self._model.parameters()):  # those of a quantised base are not
            parameter.requires_grad_(True)
        self._sites = list(find_sites(self._model).values())
        self._model.requires_grad_(False).eval()
        self.twins = [f"twin{i}" for i in range(TWINS)]
        self._matrices = {FOLDED: [site.values.clone() for site in self._sites]}
        self._matrices |= _round_twins(self._sites, self.twins, checkpoint, coarser, report)

    @torch.no_grad()
    def active(self, name: str) -> Any:
        """Return the model with the matrices of FOLDED, or of one of `twins`."""
        for site, matrix in zip(self._sites, self._matrices[name], strict=True):
            site.values.copy_(matrix)
        return self._model


def _round_twins(
    sites: list[Site], names: list[str], checkpoint: Checkpoint, dtype: torch.dtype, report: Reporter
) -> dict[str, list[Tensor]]:
    """Equally good roundings of the exact matrices, by the twins' names and in the order of the sites."""
    generators = {name: torch.Generator().manual_seed(seed) for seed, name in enumerate(names)}
    orders: dict[tuple[str, str], Tensor] = {}
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    with checkpoint.open() as source, report.task("rounding matrices for the noise floor", len(sites)) as done:
        for count, site in enumerate(sites, 1):
            key = site_key(site.path)
            if key not in checkpoint.matrices:
                raise CheckpointError(
                    f"{checkpoint.tensors_path}: lacks {site.path}, which PEFT made from adapter_config.json."
                )
            exact, rank_dim = source.tensor(key).value, 0 if site.matrix == "A" else 1
            for name, generator in generators.items():
                rounded = round_randomly(exact, dtype, generator)
                order = torch.randperm(rounded.shape[rank_dim], generator=generator)
                order = orders.setdefault((name, site.module), order)
                found[name].append(rounded.index_select(rank_dim, order).to(site.parameter))
            done(count)
    return found
