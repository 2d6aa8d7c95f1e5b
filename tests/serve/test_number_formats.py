"""Models in coarser number formats."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from loraover_serve.comparison.rounding import FORMATS, rounding

from support.tiny_experts import tiny_moe

IDS = torch.arange(3, 13)[None]


@pytest.mark.parametrize("name", FORMATS)
@torch.inference_mode()
def test_a_mixture_of_experts_is_rounded_and_is_itself_again(name: str) -> None:
    """Its router returns several tensors, of which one holds whole numbers."""
    model = tiny_moe()
    exact = model(IDS).logits
    with rounding(model, FORMATS[name]):
        assert 0 < (model(IDS).logits - exact).abs().max() < 1
    assert torch.equal(model(IDS).logits, exact)


@torch.inference_mode()
def test_each_tensor_of_numbers_is_rounded() -> None:
    class Router(nn.Linear):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
            found = super().forward(x)
            return found, found.argmax(-1)

    torch.manual_seed(0)
    router, given = Router(8, 4), torch.randn(16, 8)
    with rounding(router, FORMATS["bf16"]):
        scores, chosen = router(given)
    assert torch.equal(scores, scores.bfloat16().float())
    assert not torch.equal(scores, router(given)[0])
    assert chosen.dtype == torch.int64
