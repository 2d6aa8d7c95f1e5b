"""Decoder graphs from onnxruntime-genai's model builder, which is run as its documented command, and their padding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

from loraover.common.errors import ExportError
from loraover_export.requests import OnnxRequest

GRAPH_FILE, CONFIG_FILE = "model.onnx", "genai_config.json"

PREFIX = "loraover/padding"


class BuilderProcess:
    """The builder in a separate process, which is started before its arguments are known.

    Its imports take longer than the build of a small model. As a context, it imports while the block prepares the
    model, and is ended with the block. Outside of a context, or for a second build, `run` starts a process.
    """

    def __init__(self) -> None:
        self._waiting: subprocess.Popen[str] | None = None

    def __enter__(self) -> BuilderProcess:
        self._waiting = _start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._waiting is not None:
            _end(self._waiting)

    def run(self, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Run the builder with the arguments of its command, and return its exit code and what it printed."""
        process, self._waiting = self._waiting or _start(), None
        try:
            out, err = process.communicate(json.dumps(arguments) + "\n")
        except BaseException:
            _end(process)
            raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def _start() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "loraover_export.formats.onnx.builder_process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=os.environ | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"},
    )


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def build_decoder(
    model: Path,
    out: Path,
    *,
    precision: str,
    device: str,
    adapter: Path | None = None,
    full_precision_nodes: Sequence[str] = (),
    builder: BuilderProcess,
) -> None:
    """Write one graph for prefill and decode with a KV cache, its genai_config.json and tokenizer files."""
    # A KV cache as short as the window fails at run time once a text outgrows it; norms of queries and keys within the
    # attention run on CUDA only, where the checks may not run (onnxruntime-genai 0.18, ONNX Runtime 1.32).
    options = ["windowed_kv_cache=false", "fuse_qk_norm_gqa=false"]
    if adapter is not None:
        options.append(f"adapter_path={adapter}")
    if full_precision_nodes:
        options.append(f"nodes_to_exclude={','.join(full_precision_nodes)}")
    places = ["-m", "none", "-i", str(model), "-o", str(out), "-c", str(out / ".cache")]
    # The builder's own float16 layout for the CPU fails in its first decoding step (onnxruntime-genai 0.18); ONNX
    # Runtime's CPU kernels run the one for CUDA.
    layout = "cuda" if precision == "fp16" else device
    settings = ["-p", precision, "-e", layout, "--extra_options", *options]
    done = builder.run([*places, *settings])
    if done.returncode == 0 and (out / GRAPH_FILE).is_file():
        return
    name = f"onnxruntime-genai {version('onnxruntime-genai')}"
    if "is not currently supported" in done.stderr:
        raise ExportError(
            f"{name} has no decoder graph for {architecture(model)}; {OnnxRequest.named('cache', False)} exports one "
            "without a KV cache."
        )
    reason = next(reversed((done.stderr or done.stdout).strip().splitlines()), f"exit code {done.returncode}")[:600]
    raise ExportError(f"{name} could not build a {precision} graph of {architecture(model)}: {reason}")


def architecture(model: Path) -> str:
    """Return the model class that a folder's config.json names."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    return str((config.architectures or [type(config).__name__])[0])


def accept_left_padding(model: ModelProto) -> bool:
    """Make a graph roll each row's tokens to the left at its inputs, and back to the right at its outputs.

    GroupQueryAttention counts the ones of the attention mask and assumes that they stand for the first tokens of a
    row, so a row padded on the left gets wrong logits without a message. The tokens' order within a row is kept,
    positions count real tokens, and the KV cache holds them without gaps; a single new token is not rolled.

    Returns:
        Whether the graph needed the change.

    Source: ONNX Runtime 1.32, contrib operator GroupQueryAttention, input seqlens_k.
    """
    graph = model.graph
    if not any(node.op_type == "GroupQueryAttention" for node in graph.node):
        return False
    rolled = f"{PREFIX}/input_ids"
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name == "input_ids":
                node.input[i] = rolled
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
