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
from loraover_export.numerics.rounding import STORAGE_DTYPES, round_randomly

FOLDED = "default"
"""PEFT's name of the folded adapter."""


class FoldedAndTwins:
    """One base model with the folded adapter and its twins, of which one is active at a time.

    A twin has each element of the exact matrices rounded at random to one of its two neighbours in the storage type,
    and its rank dimension permuted, so that sums run in another order. It shares all else with the folded adapter.

    Args:
        base: the plain base model, which becomes part of the PEFT model.
        checkpoint: the checkpoint, which holds the exact matrices.
        folded: folder of the written adapter.
        dtype: data type that it is stored in.
        twins: number of twins.

    Raises:
        CheckpointError: PEFT has made a matrix that the checkpoint does not hold.
    """

    def __init__(self, base: nn.Module, checkpoint: Checkpoint, folded: Path, dtype: str, twins: int) -> None:
        from peft import PeftModel
        from peft.utils import ModulesToSaveWrapper

        self._model = PeftModel.from_pretrained(base, str(folded), adapter_name=FOLDED)
        self.twins = [f"twin{i}" for i in range(twins)]
        for seed, name in enumerate(self.twins):
            self._model.add_adapter(name, _twin_config(self._model.peft_config[FOLDED]))
            _fill_twin(self._model, name, checkpoint, dtype, seed)
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


@torch.no_grad()
def _fill_twin(model: nn.Module, name: str, checkpoint: Checkpoint, dtype: str, seed: int) -> None:
    """Overwrite an added adapter with an equally good rounding of the exact matrices."""
    generator = torch.Generator().manual_seed(seed)
    orders: dict[str, Tensor] = {}
    with open_exact(checkpoint) as source:
        for site in _matrices(model, name):
            key = checkpoint.adapter.sites.get(site.path)
            if key is None:
                raise CheckpointError(
                    f"{checkpoint.adapter.tensors_path}: lacks {site.path}, which PEFT made from adapter_config.json."
                )
            rounded = round_randomly(source.tensor(key).value, STORAGE_DTYPES[dtype], generator)
            rank_dim = 0 if site.matrix == "A" else 1
            order = orders.setdefault(site.module, torch.randperm(rounded.shape[rank_dim], generator=generator))
            site.parameter.copy_(rounded.index_select(rank_dim, order))
    for layer in lora_layers(model).values():
        if layer.lora_bias.get(name):
            layer.lora_B[name].bias.copy_(layer.lora_B[FOLDED].bias)


def _matrices(model: nn.Module, name: str) -> Iterator[Site]:
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for site in find_sites(model).values():
        if site.adapter == name:
            yield site
