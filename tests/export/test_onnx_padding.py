"""Batches padded on the left: wrong in the builder's graph, right in the mended one, and all else bit for bit."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from loraover_export.formats.onnx.kinds import decoder
from loraover_export.formats.onnx.kinds.decoder import accept_left_padding

from strategies import SEEDS
from support.onnx_export import export, tiny_base, tiny_lora
from support.onnx_graph import FEEDS, LENGTH, Feed, Graph, fp32_tolerance, torch_logits, worst_error
from support.speed import examples

pytestmark = pytest.mark.engine

LEFT = [name for name, feed in FEEDS.items() if feed.padding == "left"]
OTHERS = [name for name in FEEDS if name not in LEFT]


@dataclass(frozen=True)
class Graphs:
    """The graph as the builder wrote it, the same one mended, and PEFT's model."""

    raw: Graph
    mended: Graph
    model: Any


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    folder = tmp_path_factory.mktemp("padding")
    model = tiny_lora(tiny_base(folder / "base", "Llama"), folder / "adapter")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "accept_left_padding", lambda model: False)
        assert export(folder / "adapter", folder / "raw", "--mode", "merged", "--no-check") == 0
    shutil.copytree(folder / "raw", folder / "mended")
    file = folder / "mended" / "model.onnx"
    graph = onnx.load(file, load_external_data=False)
    assert accept_left_padding(graph)
    file.write_bytes(graph.SerializeToString())
    return Graphs(Graph(folder / "raw" / "model.onnx"), Graph(file), model)


def test_the_builders_graph_is_wrong_on_the_left(graphs: Graphs) -> None:
    """If it is not, a newer onnxruntime-genai needs no mending."""
    errors = worst_error(graphs.raw, graphs.model, LEFT)
    assert min(errors.values()) > 1000, errors
    assert max(worst_error(graphs.raw, graphs.model, OTHERS).values()) <= 1


def test_the_mended_graph_is_right_on_the_left(graphs: Graphs) -> None:
    errors = worst_error(graphs.mended, graphs.model, LEFT)
    assert max(errors.values()) <= 1, errors


@pytest.mark.parametrize("name", OTHERS)
def test_all_else_is_bit_for_bit_the_same(graphs: Graphs, name: str) -> None:
    assert torch.equal(graphs.mended.logits(FEEDS[name]), graphs.raw.logits(FEEDS[name]))


def test_the_cache_of_padded_rows_begins_with_their_first_tokens(graphs: Graphs) -> None:
    """So the next token's keys lie behind the last real ones, as GroupQueryAttention expects."""
    padded, plain = FEEDS["padded on the left"], FEEDS["batch"]
    found = graphs.mended.run(
        {"input_ids": padded.ids.numpy(), "attention_mask": padded.mask.numpy()}
        | graphs.mended.empty_cache(padded.rows, 32)
    )
    for row, pad in enumerate(padded.pads):
        ids = plain.ids[row : row + 1, pad:]
        alone = graphs.raw.run(
            {"input_ids": ids.numpy(), "attention_mask": np.ones_like(ids.numpy())} | graphs.raw.empty_cache(1, 32)
        )
        for output, value in alone.items():
            if output.startswith("present"):
                held = found[output][row : row + 1, :, : LENGTH - pad]
                np.testing.assert_allclose(held, value, rtol=0, atol=1e-5, err_msg=output)


@examples(25)
@given(
    pads=st.lists(st.integers(0, LENGTH - 1), min_size=1, max_size=5),
    prefill=st.integers(1, LENGTH),
    side=st.sampled_from(["left", "right"]),
    seed=SEEDS,
)
def test_any_padding(graphs: Graphs, pads: list[int], prefill: int, side: Any, seed: int) -> None:
    pads = [min(pad, prefill - 1) for pad in pads]
    steps = (prefill, *(1,) * (LENGTH - prefill))
    feed = Feed(len(pads), steps=steps, padding=side, pads=pads, seed=seed)
    expected = torch_logits(graphs.model, feed)
    error = float((graphs.mended.logits(feed) - expected).abs().max())
    assert error <= fp32_tolerance(expected)


def test_a_graph_of_another_attention_is_left_alone() -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["logits"])], "g", [value], [output])
    model = helper.make_model(graph)
    before = model.SerializeToString()
    assert not accept_left_padding(model)
    assert model.SerializeToString() == before
