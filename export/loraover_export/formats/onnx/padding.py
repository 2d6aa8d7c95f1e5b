"""Left padding for decoder graphs, which by themselves take batches padded on the right only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

PREFIX = "loraover/padding"


def accept_left_padding(model: ModelProto) -> bool:
    """Make a graph roll each row's tokens to the left at its inputs, and back to the right at its outputs.

    GroupQueryAttention counts the ones of the attention mask and assumes that they stand for the first tokens of a
    row, so a row padded on the left gets wrong logits without a message. The tokens' order within a row is kept,
    positions count real tokens, and the KV cache holds them without gaps; a single new token is not rolled.

    Args:
        model: A graph of onnxruntime-genai's builder; it is changed.

    Returns:
        Whether the graph needed the change.

    Source: ONNX Runtime 1.32, contrib operator GroupQueryAttention, input seqlens_k.
    """
    graph = model.graph
    if not any(node.op_type == "GroupQueryAttention" for node in graph.node):
        return False
    rolled = f"{PREFIX}/input_ids"
    for node in graph.node:
        _rename(node.input, "input_ids", rolled)
    head = next(node for node in graph.node if "logits" in node.output)
    hidden = head.input[0]
    head.input[0] = f"{PREFIX}/hidden"
    first, last = _rolling(hidden)
    for node in reversed(first):
        graph.node.insert(0, node)
    position = next(i for i, node in enumerate(graph.node) if node is head or node.name == head.name)
    for node in reversed(last):
        graph.node.insert(position, node)
    return True


def _rolling(hidden: str) -> tuple[list[NodeProto], list[NodeProto]]:
    """Return the nodes at the start, which roll `input_ids` (batch, tokens), and those before the head."""
    made: list[NodeProto] = []

    def add(op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        name = f"{PREFIX}/{output}"
        made.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def constant(output: str, value: Any) -> str:
        return add("Constant", (), output, value=numpy_helper.from_array(np.array(value, dtype=np.int64)))

    zero, one, axis, end = constant("0", 0), constant("1", 1), constant("[1]", [1]), constant("[end]", [2**62])
    tokens = add("Shape", ["input_ids"], "tokens", start=1, end=2)
    last_tokens = add("Neg", [tokens], "-tokens")
    mask = add("Slice", ["attention_mask", last_tokens, end, axis], "mask")
    seen = add("CumSum", [mask, one], "seen")
    leading = add("Equal", [seen, zero], "is_leading")
    count = add("ReduceSum", [add("Cast", [leading], "leading", to=7), axis], "count", keepdims=1)
    order = add("Range", [zero, add("Squeeze", [tokens], "tokens_scalar"), one], "order")
    to_left = add("Mod", [add("Add", [order, count], "order+count"), tokens], "to_left")
    add("GatherElements", ["input_ids", to_left], "input_ids", axis=1)
    first, made = made, []
    to_right = add("Mod", [add("Sub", [order, count], "order-count"), tokens], "to_right")
    index = add("Unsqueeze", [to_right, constant("[-1]", [-1])], "index")
    add("GatherND", [hidden, index], "hidden", batch_dims=1)
    return first, made


def _rename(names: Any, old: str, new: str) -> None:
    for i, name in enumerate(names):
        if name == old:
            names[i] = new
