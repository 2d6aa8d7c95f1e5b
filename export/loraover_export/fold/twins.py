"""The folded adapter, as PEFT loads it from its files, and equally good roundings of it, in one PEFT model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraover.adapters.numerics.rounding import STORAGE_DTYPES, round_randomly
from loraover.checkpoint.checkpoint import Checkpoint
from loraover.checkpoint.peft_adapter import site_key
from loraover.common.errors import CheckpointError
from loraover.common.reporter import SILENT, Reporter
from loraover.overparam.sites import Site, find_sites, lora_layers

FOLDED = "folded"
TWINS = 3


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
        report: Receiver of progress.

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
