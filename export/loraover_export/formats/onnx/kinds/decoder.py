"""Causal language models: one graph for prefill and decode, built for onnxruntime-genai.

The graph comes from onnxruntime-genai's model builder, which is run as its documented command.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime_genai as og
import torch
from onnx import ModelProto, NodeProto, helper, numpy_helper
from torch import Tensor, nn

from loraover.common.errors import ExportError
from loraover_export.formats.onnx.kinds.base import (
    ComparedTokens,
    GraphKind,
    GraphPlan,
    GraphRunner,
    GraphSession,
    greedy,
    has_provider,
)
from loraover_export.formats.onnx.swappable import adapter_file, lora_feed, open_inputs, write_marker_adapter
from loraover_export.requests import OnnxRequest

GRAPH_FILE, CONFIG_FILE = "model.onnx", "genai_config.json"

PREFIX = "loraover/padding"


class Decoder(GraphKind):
    """Llama, Mistral, Qwen, Gemma and the other decoders that onnxruntime-genai's builder supports."""

    graphs = (GRAPH_FILE,)

    def __init__(self) -> None:
        self._builder = BuilderProcess()

    def prepared(self) -> AbstractContextManager[object]:
        return self._builder

    def export(self, model: Any, tokenizer: Any, plan: GraphPlan, work: Path, out: Path) -> None:
        _check_widths(model)
        base = work / "model"
        model.save_pretrained(base)
        _list_sliding_layers(base / "config.json")
        tokenizer.save_pretrained(base)
        marker = None
        if plan.markers is not None:
            marker = work / "marker"
            write_marker_adapter(marker, plan.markers, plan.rank)
        excluded: list[str] = []
        build = partial(build_decoder, base, device=plan.device, adapter=marker, builder=self._builder)
        if plan.markers is not None and plan.precision == "int4":
            draft = work / "fp32"
            build(draft, precision="fp32")
            graph = onnx.load(draft / GRAPH_FILE, load_external_data=False)
            places = open_inputs(graph, draft / GRAPH_FILE, plan.markers).values()
            inputs = {place.input for place in places}  # the nodes that multiply by a LoRA matrix keep float32
            excluded = [node.name for node in graph.graph.node if inputs & set(node.input)]
        build(out, precision=plan.precision, full_precision_nodes=excluded)
        _finish(out, plan.device)

    def cases(self, rows: Tensor) -> list[ComparedTokens]:
        """Return the cases; only single rows have a past with several new tokens, as GroupQueryAttention demands."""
        return [
            *super().cases(rows),
            ComparedTokens(rows[:1], past=7),
            ComparedTokens(rows[:, :9], past=8),
            ComparedTokens(rows[:, :9], past=8, padding="left"),
            ComparedTokens(rows[:, :9], past=8, padding="right"),
        ]

    def reference(self, model: Any, case: ComparedTokens) -> Tensor:
        positions = (case.mask.cumsum(-1) - 1).clamp_min(0)
        output = model(input_ids=case.ids, attention_mask=case.mask, position_ids=positions, use_cache=False)
        logits: Tensor = output.logits[:, case.past :]
        return logits

    def runner(self, folder: Path, device: str, adapter: Path | None) -> GraphRunner:
        config = json.loads((folder / CONFIG_FILE).read_text())
        session = GraphSession(folder / GRAPH_FILE, device, adapter_file(adapter, self.graphs[0], self.graphs))
        head_size = config["model"]["decoder"]["head_size"]

        def run(case: ComparedTokens) -> Tensor:
            cache = session.empty_cache(case.batch, head_size)
            outputs: dict[str, Tensor] = {}
            for start, end in ((0, case.past), (case.past, case.ids.shape[1])):
                if start == end:
                    continue
                mask = case.mask[:, :end]
                positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, start:]
                feed = {"input_ids": case.ids[:, start:end], "attention_mask": mask, "position_ids": positions}
                outputs = session.run(feed | cache)
                cache = {name: outputs[name.replace("past_key_values", "present")] for name in cache}
            return outputs["logits"]

        return run

    def generate(self, folder: Path, prompt: Tensor, tokens: int, device: str, adapter: Path | None) -> Tensor:
        if lora_feed(folder / self.graphs[0], None):
            return self._generate_by_steps(folder, prompt, tokens, device, adapter)
        config = og.Config(str(folder))
        if not has_provider(device):
            config.clear_providers()
        model = og.Model(config)
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=prompt.shape[1] + tokens, do_sample=False, repetition_penalty=1.0)
        generator = og.Generator(model, parameters)
        if adapter is not None:
            adapters = og.Adapters(model)
            adapters.load(str(adapter_file(adapter, self.graphs[0], self.graphs)), adapter.name)
            generator.set_active_adapter(adapters, adapter.name)
        generator.append_tokens(prompt.numpy())
        while not generator.is_done():
            generator.generate_next_token()
        return torch.tensor(generator.get_sequence(0)[prompt.shape[1] :], dtype=torch.int64)

    def _generate_by_steps(
        self, folder: Path, prompt: Tensor, tokens: int, device: str, adapter: Path | None
    ) -> Tensor:
        """Decode without onnxruntime-genai, which cannot fill LoRA inputs that have no default."""
        ends = torch.tensor(json.loads((folder / CONFIG_FILE).read_text())["model"]["eos_token_id"])
        run, ids = self.runner(folder, device, adapter), prompt
        for _ in range(tokens):
            token = run(ComparedTokens(ids, past=ids.shape[1] - 1))[:, -1:].argmax(-1)
            if torch.isin(token, ends):
                break
            ids = torch.cat([ids, token], dim=1)
        return ids[0, prompt.shape[1] :]

    def generate_reference(self, model: Any, prompt: Tensor, tokens: int) -> tuple[Tensor, Tensor] | None:
        return greedy(model, prompt, tokens)


def _check_widths(model: Any) -> None:
    """Refuse models that the builder (onnxruntime-genai 0.18) would export wrongly, because of a layer's width.

    It treats every linear layer with as many rows as the vocabulary as the head.
    """
    head = model.get_output_embeddings()
    rows = model.config.vocab_size
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head and module.out_features == rows:
            raise ExportError(
                f"{name} has as many rows as the vocabulary, {rows}, so onnxruntime-genai's builder would mistake it "
                f"for the head; {OnnxRequest.named('cache', False)} exports a graph without a KV cache."
            )


def _list_sliding_layers(config_file: Path) -> None:
    """List the layers with a sliding window in a configuration that lists none.

    Mistral's window holds in every layer, and its configuration lists none. The builder (onnxruntime-genai 0.18) then
    leaves the window out of the graph without a message, which shows only in texts longer than the window.
    """
    config = json.loads(config_file.read_text())
    if config.get("sliding_window") and config.get("layer_types") is None:
        config["layer_types"] = ["sliding_attention"] * config["num_hidden_layers"]
        config_file.write_text(json.dumps(config))


def _finish(out: Path, device: str) -> None:
    """Let the graph take left padding, and set the runtime's log level and device."""
    graph = out / GRAPH_FILE
    model = onnx.load(graph, load_external_data=False)
    if accept_left_padding(model):
        graph.write_bytes(model.SerializeToString())
    config_file = out / CONFIG_FILE
    config = json.loads(config_file.read_text())
    session = config["model"]["decoder"]["session_options"]
    session["log_severity_level"] = 3
    if device == "cpu":
        session["provider_options"] = []
    config_file.write_text(json.dumps(config, indent=4) + "\n")


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
