"""Adapters of fused experts as ordinary pairs: both of PEFT's layouts, against PEFT's own deltas."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loraover.checkpoint.exact_tensors import adapter_of, on_base, read_source
from loraover.checkpoint.expert_stacks import find_expert_weights
from loraover.common.errors import CheckpointError
from loraover_export.numerics.delta import read_deltas

from support.tiny_experts import EXPERTS, expert_lora, flip, peft_deltas, tiny_moe

SQUARE = {"moe_intermediate_size": 32}
"""gate_up_proj of each expert is 64 x 64."""


@pytest.mark.parametrize("version", ["0.21.2", "0.18.1", None])
@pytest.mark.parametrize("sizes", [{}, SQUARE], ids=["oblong", "square"])
def test_deltas_are_pefts_in_both_layouts(tmp_path: Path, sizes: dict[str, int], version: str | None) -> None:
    base = find_expert_weights(tiny_moe(**sizes))
    deltas = peft_deltas(expert_lora(tiny_moe(**sizes), tmp_path / "adapter"))
    if version != "0.21.2":
        flip(tmp_path / "adapter", version)
    if sizes and version is None:
        with pytest.raises(CheckpointError, match=r"square, \(64, 64\).*does not record the version of PEFT"):
            on_base(read_source(tmp_path / "adapter"), base)
        return
    source = on_base(read_source(tmp_path / "adapter"), base)
    assert on_base(source, base) == source
    found = {delta.module: delta.product().value for delta in read_deltas(source)}
    assert len(deltas) == 2 * 2 * EXPERTS
    for path, delta in deltas.items():
        torch.testing.assert_close(found[path], delta.double(), rtol=1e-5, atol=1e-6)
    assert found.keys() - deltas.keys() == {f"model.layers.{i}.self_attn.{m}_proj" for i in range(2) for m in "qv"}
