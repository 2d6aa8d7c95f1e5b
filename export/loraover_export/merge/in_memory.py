"""The merge of an adapter into a model in memory: every delta_W added to the base model's weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from loraover.adapters.numerics.delta import Delta, read_deltas
from loraover.adapters.numerics.matrix_certificate import MatrixCertificate
from loraover.checkpoint.base_modules import load_others, target_module
from loraover.checkpoint.peft_adapter import AdapterDir
from loraover.common.threads import workers
from loraover_export.merge.arithmetic import certify_merge, merge_rows, out_by_in, row_blocks


@torch.no_grad()
def merge(model: Any, adapter: AdapterDir, deltas: Iterable[Delta] | None = None) -> list[MatrixCertificate]:
    """Replace each adapted weight by W + delta_W, computed in float64 and rounded once to the weights' dtype.

    A weight that other modules share (an embedding tied to the head) is copied first, and the model's
    configuration then states that they are no longer tied.

    Args:
        model: The base model, a transformers PreTrainedModel; it is changed.
        adapter: Adapter with the deltas and other trained parameters.
        deltas: The adapter's deltas, if they have been read already; None reads them.

    Returns:
        One certificate for each module: the error of the written weight against float64, and its bound, which is the
        product's bound, u64 |W + delta_W| for the sum, and one rounding.

    Raises:
        CheckpointError: The adapter belongs to another base model.
        FoldError: A weight beyond the range of its dtype.
    """
    tied = _is_tied(model)
    with adapter.open() as exact:
        load_others(model, exact)
    holders = Counter(id(module._parameters.get("weight")) for module in model.modules())
    with workers() as threads:
        merges = []
        for delta in read_deltas(adapter) if deltas is None else deltas:
            module = target_module(model, adapter, delta.module)
            weight = _own_weight(module, shared=holders[id(module.weight)] > 1)
            merges.append(threads.start(_add, out_by_in(module, weight), delta))
        certificates = [merge.result() for merge in merges]
    if tied and not _is_tied(model):
        model.config.tie_word_embeddings = False
    return certificates


def _add(weight: Tensor, delta: Delta) -> MatrixCertificate:
    """Add delta_W to a weight (out, in)."""
    m, n = weight.shape
    return certify_merge(delta, (m, n), [merge_rows(weight, delta, rows) for rows in row_blocks(weight, delta)])


def _own_weight(module: Any, *, shared: bool) -> nn.Parameter:
    if shared:
        module.weight = nn.Parameter(module.weight.clone(), requires_grad=False)
    weight: nn.Parameter = module.weight
    return weight


def _is_tied(model: Any) -> bool:
    """Whether head and embedding share their weight."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight
