"""The merge of an adapter: every delta_W added to the base model's weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from loraover.checkpoint.checkpoint import Checkpoint
from loraover.checkpoint.exact_tensors import Exact, adapter_of, open_exact
from loraover.checkpoint.peft_adapter import AdapterDir
from loraover.checkpoint.unfolded_model import load_others, target_module
from loraover_export.numerics.delta import U64, Delta, read_deltas
from loraover_export.numerics.matrix_certificate import MatrixCertificate, certify
from loraover_export.numerics.rounding import round_nearest


@torch.no_grad()
def merge(
    model: Any, source: Checkpoint | AdapterDir, deltas: Iterable[Delta] | None = None
) -> list[MatrixCertificate]:
    """Replace each adapted weight by W + delta_W, computed in float64 and rounded once to the weights' dtype.

    A weight that other modules share (an embedding tied to the head) is copied first, and the model's
    configuration then states that they are no longer tied.

    Args:
        model: the base model, a transformers PreTrainedModel; it is changed.
        source: adapter or checkpoint with the deltas and other trained parameters.
        deltas: the source's deltas, if they have been read already; None reads them.

    Returns:
        One certificate for each module: the error of the written weight against float64, and its bound, which is the
        product's bound, u64 |W + delta_W| for the sum, and one rounding.

    Raises:
        CheckpointError: the adapter belongs to another base model.
        FoldError: a weight beyond the range of its dtype.
    """
    adapter = adapter_of(source)
    certificates = []
    tied = _is_tied(model)
    with open_exact(source) as exact:
        load_others(model, adapter, exact.plain)
    holders = Counter(id(module._parameters.get("weight")) for module in model.modules())
    for delta in read_deltas(source) if deltas is None else deltas:
        module = target_module(model, delta.module, delta.a.value.shape[1], delta.b.value.shape[0], adapter)
        weight = _own_weight(module, shared=holders[id(module.weight)] > 1)
        merged = _merged(weight, module, delta)
        rounded = round_nearest(merged.value, weight.dtype)
        certificates.append(certify(f"{delta.module}.weight", rounded, merged))
        weight.copy_(rounded)
    if tied and not _is_tied(model):
        model.config.tie_word_embeddings = False
    return certificates


def _merged(weight: nn.Parameter, module: nn.Module, delta: Delta) -> Exact:
    """Return W + delta_W as the weight is stored: (out, in) in Linear, (in, out) in Conv1D and embeddings."""
    product = delta.product()
    transposed = not isinstance(module, nn.Linear)
    change, bound = (t.mT if transposed else t for t in (product.value, product.bound))
    value = weight.double() + change
    return Exact(value, bound + U64 * value.abs(), product.site)


def _own_weight(module: Any, *, shared: bool) -> nn.Parameter:
    if shared:
        module.weight = nn.Parameter(module.weight.clone(), requires_grad=False)
    weight: nn.Parameter = module.weight
    return weight


def _is_tied(model: Any) -> bool:
    """Whether head and embedding share their weight."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight
