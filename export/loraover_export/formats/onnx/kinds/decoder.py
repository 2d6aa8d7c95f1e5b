"""Causal language models: one graph for prefill and decode, built for onnxruntime-genai."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import onnxruntime_genai as og
import torch
from torch import Tensor, nn

from loraover.common.errors import ExportError
from loraover_export.formats.onnx import genai
from loraover_export.formats.onnx.genai import accept_left_padding
from loraover_export.formats.onnx.kinds.base import ComparedTokens, GraphKind, GraphPlan, GraphRunner, greedy
from loraover_export.formats.onnx.session import GraphSession, has_provider
from loraover_export.formats.onnx.swappable import adapter_file, lora_feed, open_inputs, write_marker_adapter
from loraover_export.requests import OnnxRequest


class Decoder(GraphKind):
    """Llama, Mistral, Qwen, Gemma and the other decoders that onnxruntime-genai's builder supports."""

    graphs = (genai.GRAPH_FILE,)

    def __init__(self) -> None:
        self._builder = genai.BuilderProcess()

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
        build = partial(genai.build_decoder, base, device=plan.device, adapter=marker, builder=self._builder)
        if plan.markers is not None and plan.precision == "int4":
            draft = work / "fp32"
            build(draft, precision="fp32")
            excluded = _lora_nodes(draft / genai.GRAPH_FILE, plan.markers)
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
        config = json.loads((folder / genai.CONFIG_FILE).read_text())
        session = GraphSession(folder / genai.GRAPH_FILE, device, adapter_file(adapter, self.graphs[0], self.graphs))
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
        ends = torch.tensor(json.loads((folder / genai.CONFIG_FILE).read_text())["model"]["eos_token_id"])
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
    graph = out / genai.GRAPH_FILE
    model = onnx.load(graph, load_external_data=False)
    if accept_left_padding(model):
        graph.write_bytes(model.SerializeToString())
    config_file = out / genai.CONFIG_FILE
    config = json.loads(config_file.read_text())
    session = config["model"]["decoder"]["session_options"]
    session["log_severity_level"] = 3
    if device == "cpu":
        session["provider_options"] = []
    config_file.write_text(json.dumps(config, indent=4) + "\n")


def _lora_nodes(graph: Path, markers: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the nodes that multiply by a LoRA matrix."""
    model = onnx.load(graph, load_external_data=False)
    inputs = {place.input for place in open_inputs(model, graph, markers).values()}
    return [node.name for node in model.graph.node if inputs & set(node.input)]
