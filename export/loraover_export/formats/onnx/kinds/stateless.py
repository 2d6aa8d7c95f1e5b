"""Models with one graph from tokens to scores and no cache: classifiers, and language models with --no-cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loraover.common.errors import ConfigError
from loraover.common.request import as_written
from loraover.models.load import ModelSource
from loraover_export.formats.onnx.kinds.base import ComparedTokens, GraphKind, GraphPlan, GraphRunner
from loraover_export.formats.onnx.session import GraphSession
from loraover_export.formats.onnx.swappable import adapter_file
from loraover_export.formats.onnx.torch_graph import add_branches, export_torch, set_precision


class Stateless(GraphKind):
    """BERT and similar models with a head over the sequence or each token, and language models that score texts."""

    graphs = ("model.onnx",)

    def export(self, model: Any, tokenizer: Any, plan: GraphPlan, work: Path, out: Path) -> None:
        set_precision(model, plan.precision)
        model.config.save_pretrained(out)
        tokenizer.save_pretrained(out)
        if plan.markers is not None:
            add_branches(model, plan.markers)
        free = {0: "batch", 1: "sequence"}
        ids = torch.ones((2, 5), dtype=torch.int64)
        mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])  # with all ones, it would be left out of the graph
        inputs = [("input_ids", ids, free), ("attention_mask", mask, free)]
        export_torch(_Scores(model), inputs, ["logits"], out / self.graphs[0])

    def cases(self, rows: Tensor) -> list[ComparedTokens]:
        return [ComparedTokens(rows[:1, :1]), *super().cases(rows)]

    def reference(self, model: Any, case: ComparedTokens) -> Tensor:
        logits: Tensor = model(input_ids=case.ids, attention_mask=case.mask).logits
        return logits

    def runner(self, folder: Path, device: str, adapter: Path | None) -> GraphRunner:
        (graph,) = self.graphs
        session = GraphSession(folder / graph, device, adapter_file(adapter, graph, self.graphs))
        return lambda case: session.run({"input_ids": case.ids, "attention_mask": case.mask})["logits"]


@torch.no_grad()
def check_takes_rows(model: Any, base: ModelSource) -> None:
    """Check that a classifier takes several rows of tokens at once, as its graph does.

    Many decoders score the last token of each row, which they find by the padding token. Those that score the first
    one, such as BERT, need no padding token.
    """
    if model.config.get_text_config().pad_token_id is not None:
        return
    try:
        model(input_ids=torch.zeros((2, 2), dtype=torch.int64))
    except ValueError as error:
        raise ConfigError(
            f"{base.origin}: its config.json has no pad_token_id, and {type(model).__name__} finds the last token of "
            "each row by it. Set pad_token_id in a copy of the model's folder to the token that you pad texts with, "
            f"and name the copy with {as_written('model')}."
        ) from error


class _Scores(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits
