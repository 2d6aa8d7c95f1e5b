"""The folded adapter, as PEFT loads it from its files, and equally good roundings of it, in one PEFT model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loraover.checkpoint.checkpoint import Checkpoint
from loraover.checkpoint.exact_tensors import open_exact
from loraover.common.errors import CheckpointError
from loraover.overparam.sites import Site, find_sites, lora_layers
from loraover.reporting.reporter import SILENT, Reporter
from loraover_export.numerics.rounding import STORAGE_DTYPES, round_randomly

FOLDED = "default"
"""PEFT's name of the folded adapter."""


class FoldedAndTwins:
    """One base model with the folded adapter and its twins, of which one is active at a time.

    A twin has each element of the exact matrices rounded at random to one of its two neighbours, and its rank dimension
    permuted, so that sums run in another order. It shares all else with the folded adapter. Neighbours are those in the
    storage type, or in the compute dtype if that is coarser: a check cannot see finer than it computes.

    Args:
        base: the plain base model, which becomes part of the PEFT model.
        checkpoint: the checkpoint, which holds the exact matrices.
        folded: folder of the written adapter.
        dtype: data type that it is stored in.
        twins: number of twins.
        report: receiver of progress.

    Raises:
        CheckpointError: PEFT has made a matrix that the checkpoint does not hold.
    """

    def __init__(
        self,
        base: Any,
        checkpoint: Checkpoint,
        folded: Path,
        dtype: str,
        twins: int,
        report: Reporter = SILENT,
    ) -> None:
        from peft import PeftModel
        from peft.utils import ModulesToSaveWrapper

        computed: torch.dtype = base.dtype
        stored = STORAGE_DTYPES[dtype]
        self._model = PeftModel.from_pretrained(base, str(folded), adapter_name=FOLDED, torch_device=str(base.device))
        self.twins = [f"twin{i}" for i in range(twins)]
        for name in self.twins:
            self._model.add_adapter(name, _twin_config(self._model.peft_config[FOLDED]))
        if computed == torch.float64:  # PEFT keeps adapters in float32; their numbers are exact in either
            for layer in lora_layers(self._model).values():
                layer.double()
        _fill_twins(self._model, self.twins, checkpoint, max(stored, computed, key=_epsilon), report)
        self._saved = [module for module in self._model.modules() if isinstance(module, ModulesToSaveWrapper)]
        self._model.eval()

    def active(self, name: str) -> Any:
        """Return the model with one adapter switched on: FOLDED, or one of `twins`."""
        self._model.base_model.set_adapter(name, inference_mode=True)
        for module in self._saved:
            module.set_adapter(FOLDED, inference_mode=True)
        return self._model


def _twin_config(folded: Any) -> Any:
    """Return the folded adapter's configuration without biases and saved modules, which PEFT gives to one adapter."""
    config = copy.deepcopy(folded)
    config.bias = "none"
    config.modules_to_save = None
    return config


def _epsilon(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


@torch.no_grad()
def _fill_twins(
    model: nn.Module, names: list[str], checkpoint: Checkpoint, dtype: torch.dtype, report: Reporter
) -> None:
    """Overwrite added adapters with equally good roundings of the exact matrices."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(names))]
    orders: dict[tuple[str, str], Tensor] = {}
    sites = list(zip(*(_matrices(model, name) for name in names), strict=True))
    with open_exact(checkpoint) as source, report.task("rounding matrices for the noise floor", len(sites)) as done:
        for count, twins in enumerate(sites, 1):
            key = checkpoint.adapter.sites.get(twins[0].path)
            if key is None:
                raise CheckpointError(
                    f"{checkpoint.adapter.tensors_path}: lacks {twins[0].path}, which PEFT made from "
                    "adapter_config.json."
                )
            exact = source.tensor(key).value
            for site, name, generator in zip(twins, names, generators, strict=True):
                rounded = round_randomly(exact, dtype, generator)
                rank_dim = 0 if site.matrix == "A" else 1
                order = torch.randperm(rounded.shape[rank_dim], generator=generator)
                order = orders.setdefault((name, site.module), order)
                site.parameter.copy_(rounded.index_select(rank_dim, order))
            done(count)
    for layer in lora_layers(model).values():
        for name in names:
            if layer.lora_bias.get(name):
                layer.lora_B[name].bias.copy_(layer.lora_B[FOLDED].bias)


def _matrices(model: nn.Module, name: str) -> Iterator[Site]:
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for site in find_sites(model).values():
        if site.adapter == name:
            yield site
