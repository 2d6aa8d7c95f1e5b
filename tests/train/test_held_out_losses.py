"""The loss of each held-out example, against NumPy's float64 log-softmax."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from loraover.training.run.measure import example_losses, token_loss

from support.tiny_models import tiny_llama, with_lora

VOCABULARY = 11
LABELS = torch.tensor([[-100, 3, 4, 5], [-100, -100, 7, -100]])
INPUTS = torch.tensor([[1, 3, 4, 5], [1, 2, 7, 0]])


class Model(nn.Module):
    """A stand-in whose logits are rows of a table.

    If it is causal, it returns no logits where it is given labels, as under TRL 1.9; if not, it needs them.
    """

    def __init__(self, *, is_encoder_decoder: bool) -> None:
        super().__init__()
        self.config = SimpleNamespace(is_encoder_decoder=is_encoder_decoder)
        self.table = torch.randn(8, VOCABULARY, generator=torch.Generator().manual_seed(0))

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        wants_labels = self.config.is_encoder_decoder
        return SimpleNamespace(logits=self.table[input_ids] if wants_labels == (labels is not None) else None)


@pytest.mark.parametrize("is_encoder_decoder", [False, True], ids=["causal", "encoder-decoder"])
def test_losses_of_examples_are_those_of_their_labelled_tokens(is_encoder_decoder: bool) -> None:
    model = Model(is_encoder_decoder=is_encoder_decoder).train()
    found = example_losses(model, [{"input_ids": INPUTS, "labels": LABELS}])
    shift = 0 if is_encoder_decoder else 1
    logits = model.table.double().numpy()[INPUTS.numpy()]
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for i, one in enumerate(found):
        places = [t for t, label in enumerate(LABELS[i]) if label != -100]
        nats = -sum(logs[i, t - shift, LABELS[i, t]] for t in places)
        assert one.tokens == len(places)
        assert one.nats == pytest.approx(nats, rel=1e-6)
    assert token_loss(found) == pytest.approx(sum(one.nats for one in found) / 4)
    assert model.training


@pytest.mark.parametrize("kind", ["plain", "adapted"])
def test_logits_of_prompts_are_not_computed(kind: str) -> None:
    model: Any = tiny_llama() if kind == "plain" else with_lora(tiny_llama())
    ids = torch.randint(1, 32, (3, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    for row, start in enumerate((7, 9, 11)):
        labels[row, :start] = -100
    sizes = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: sizes.append(output.shape[1]))
    found = example_losses(model, [{"input_ids": ids, "labels": labels}])
    assert sizes == [6]  # the places before tokens 7 to 11, and the last
    logs = torch.log_softmax(model.eval()(input_ids=ids).logits.double(), -1)
    for row, one in enumerate(found):
        places = range(int((labels[row] != -100).nonzero()[0]), 12)
        assert one.nats == pytest.approx(-sum(float(logs[row, t - 1, ids[row, t]]) for t in places), rel=1e-5)
