"""Models that torch.onnx traces: encoder-decoders, and models with one graph from tokens to scores and no cache.

LoRA branches can become inputs of their graphs. An encoder-decoder has one graph for the encoder and the
cross-attention's cache, and one for a decoding step. Classifiers, models of vectors, and language models with
--no-cache have one graph.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from loraover.common.errors import ConfigError, ExportError
from loraover.common.request import as_written
from loraover.models.load import ModelSource
from loraover_export.formats.onnx.kinds.base import (
    ComparedTokens,
    GraphKind,
    GraphPlan,
    GraphRunner,
    GraphSession,
    greedy,
)
from loraover_export.formats.onnx.swappable import adapter_file

OPSET = 20

KEY_VALUE = ("key", "value")
TYPES = "token_type_ids"


class LoraBranch(nn.Module):
    """A layer W x + B(A(x)) whose A (in_features, r) and B (r, out_features) are stored as the graph multiplies."""

    def __init__(self, base_layer: nn.Module, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Parameter(a.mT.contiguous())
        self.lora_B = nn.Parameter(b.mT.contiguous())

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, whose dtype T5 reads."""
        return self.base_layer.get_parameter("weight")

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.base_layer(x) + (x @ self.lora_A) @ self.lora_B
        return output


def set_precision(model: nn.Module, precision: str) -> None:
    """Cast a model to the precision of its graph."""
    if precision == "int4":
        raise ExportError(f"int4 exists for decoder graphs only; {type(model).__name__} takes fp32 or fp16.")
    if precision == "fp16":
        model.half()


def add_branches(model: nn.Module, markers: Mapping[str, Tensor]) -> None:
    """Replace every adapted layer of `model` by one with a LoRA branch that holds the markers."""
    for name, a in markers.items():
        module, _, matrix = name.rpartition(".")
        if matrix == "lora_A":
            layer = model.get_submodule(module)
            dtype = next(layer.parameters()).dtype
            branch = LoraBranch(layer, a.to(dtype), markers[f"{module}.lora_B"].to(dtype))
            model.set_submodule(module, branch)


def export_torch(
    module: nn.Module,
    inputs: Sequence[tuple[str, Tensor, Mapping[int, str]]],
    outputs: Sequence[str],
    graph: Path,
) -> None:
    """Export a module whose arguments and results are plain tensors, as a graph with its weights beside it.

    The free dimensions of an example must be at least 2, and those that may differ must differ.
    """
    from torch.onnx import OnnxExporterError

    names, examples, free = zip(*inputs, strict=True)
    dims: dict[str, Any] = {}
    shapes = tuple({i: dims.setdefault(d, torch.export.Dim(d)) for i, d in dim.items()} for dim in free)
    is_variadic = bool(module.forward.__code__.co_flags & 0x04)  # torch.export treats *arguments as one tuple
    for noisy in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        with redirect_stdout(StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module.eval(),
                examples,
                dynamo=True,
                input_names=list(names),
                output_names=list(outputs),
                dynamic_shapes=(shapes,) if is_variadic else shapes,
                opset_version=OPSET,
                verbose=False,
            )
    except (OnnxExporterError, RuntimeError, ValueError, TypeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ExportError(f"torch.onnx.export cannot trace {type(module).__name__}: {first}") from error
    assert program is not None
    program.save(graph, external_data=True)


class Stateless(GraphKind):
    """BERT and similar models with a head over the sequence or each token, and language models that score texts.

    Models that tell the two texts of a pair apart by the types of their tokens have a third input for these.
    """

    graphs = ("model.onnx",)
    output: ClassVar = "logits"

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
        traced = self.without_head(model)
        if _tells_types(traced):
            inputs.append((TYPES, 1 - mask, free))
        names = [name for name, *_ in inputs]
        export_torch(_Output(traced, names, self.output), inputs, [self.output], out / self.graphs[0])

    def without_head(self, model: Any) -> Any:
        """Return the part of a model that the graph holds; here the entire model."""
        return model

    def cases(self, rows: Tensor) -> list[ComparedTokens]:
        return [ComparedTokens(rows[:1, :1]), *super().cases(rows)]

    def reference(self, model: Any, case: ComparedTokens) -> Tensor:
        found: Tensor = getattr(model(input_ids=case.ids, attention_mask=case.mask), self.output)
        return found

    def runner(self, folder: Path, device: str, adapter: Path | None) -> GraphRunner:
        (graph,) = self.graphs
        session = GraphSession(folder / graph, device, adapter_file(adapter, graph, self.graphs))

        def run(case: ComparedTokens) -> Tensor:
            types = torch.zeros_like(case.ids)  # as models have it that get none
            return session.run({"input_ids": case.ids, "attention_mask": case.mask, TYPES: types})[self.output]

        return run


@final
class HiddenStates(Stateless):
    """Models of vectors: the last hidden state of each token, which whoever runs the graph pools."""

    output = "last_hidden_state"
    compared_as = "states"

    def without_head(self, model: Any) -> Any:
        return model.base_model

    def reference(self, model: Any, case: ComparedTokens) -> Tensor:
        found = model(input_ids=case.ids, attention_mask=case.mask, output_hidden_states=True).hidden_states[-1]
        assert isinstance(found, Tensor)
        return found


def _tells_types(model: Any) -> bool:
    """Whether a model has an input that tells the two texts of a pair apart, as BERT has."""
    has_types = getattr(model.config, "type_vocab_size", 0) or 0
    return has_types > 1 and TYPES in inspect.signature(model.forward).parameters


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


class _Output(nn.Module):
    """Module from the named inputs of a model to one of its outputs."""

    def __init__(self, model: Any, names: Sequence[str], output: str) -> None:
        super().__init__()
        self.model, self.names, self.output = model, names, output

    def forward(self, *inputs: Tensor) -> Tensor:
        found: Tensor = getattr(self.model(**dict(zip(self.names, inputs, strict=True))), self.output)
        return found


class Seq2Seq(GraphKind):
    """T5 and the models that have its layers.

    Encoder graph: input_ids, attention_mask -> cross.N.key, cross.N.value.
    Decoder graph: decoder_input_ids, attention_mask (the encoder's), cross.N.*, past_key_values.N.* -> logits,
    present.N.*.
    """

    graphs = ("encoder.onnx", "decoder.onnx")

    def export(self, model: Any, tokenizer: Any, plan: GraphPlan, work: Path, out: Path) -> None:
        set_precision(model, plan.precision)
        model.config.save_pretrained(out)
        model.generation_config.save_pretrained(out)
        tokenizer.save_pretrained(out)
        model.set_attn_implementation("eager")  # torch cannot trace T5's views with sdpa
        if plan.markers is not None:
            add_branches(model, plan.markers)
        free = {0: "batch", 1: "sequence"}
        ids = torch.ones((2, 5), dtype=torch.int64)
        mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
        layers = model.config.num_decoder_layers
        cross = _names("cross", layers)
        encoder = _Encoder(model, layers)
        export_torch(encoder, [("input_ids", ids, free), ("attention_mask", mask, free)], cross, out / self.graphs[0])
        with torch.no_grad():
            keys = encoder(ids, mask)
        past = torch.zeros_like(keys[0][:, :, :3])
        inputs = [
            ("decoder_input_ids", torch.ones((2, 4), dtype=torch.int64), {0: "batch", 1: "new"}),
            ("attention_mask", mask, free),
            *((name, key, {0: "batch", 2: "sequence"}) for name, key in zip(cross, keys, strict=True)),
            *((name, past.clone(), {0: "batch", 2: "past"}) for name in _names("past_key_values", layers)),
        ]
        outputs = ["logits", *_names("present", layers)]
        export_torch(_Decoder(model, layers), inputs, outputs, out / self.graphs[1])

    def cases(self, rows: Tensor) -> list[ComparedTokens]:
        """Encoder and decoder get the same tokens; the mask is for the encoder, and `past` for the decoder."""
        return [*super().cases(rows), ComparedTokens(rows, past=5), ComparedTokens(rows[:, :9], past=8)]

    def compared(self, case: ComparedTokens, logits: Tensor) -> Tensor:
        return logits.reshape(-1, logits.shape[-1])  # the decoder's tokens are never padded

    def reference(self, model: Any, case: ComparedTokens) -> Tensor:
        output = model(input_ids=case.ids, attention_mask=case.mask, decoder_input_ids=case.ids, use_cache=False)
        logits: Tensor = output.logits[:, case.past :]
        return logits

    def runner(self, folder: Path, device: str, adapter: Path | None) -> GraphRunner:
        encoder, decoder = self._sessions(folder, device, adapter)

        def run(case: ComparedTokens) -> Tensor:
            cross = encoder.run({"input_ids": case.ids, "attention_mask": case.mask})
            cache = decoder.empty_cache(case.batch)
            outputs: dict[str, Tensor] = {}
            for ids in (case.ids[:, : case.past], case.ids[:, case.past :]):
                if ids.shape[1]:
                    feed = {"decoder_input_ids": ids, "attention_mask": case.mask}
                    outputs = decoder.run(feed | cross | cache)
                    cache = {name: outputs[name.replace("past_key_values", "present")] for name in cache}
            return outputs["logits"]

        return run

    def generate_reference(self, model: Any, prompt: Tensor, tokens: int) -> tuple[Tensor, Tensor] | None:
        return greedy(model, prompt, tokens)

    def generate(self, folder: Path, prompt: Tensor, tokens: int, device: str, adapter: Path | None) -> Tensor:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder)
        encoder, decoder = self._sessions(folder, device, adapter)
        mask = torch.ones_like(prompt)
        cross = encoder.run({"input_ids": prompt, "attention_mask": mask})
        cache = decoder.empty_cache(1)
        ids = torch.tensor([[config.decoder_start_token_id]])
        chosen: list[int] = []
        while len(chosen) < tokens:
            outputs = decoder.run({"decoder_input_ids": ids, "attention_mask": mask} | cross | cache)
            cache = {name: outputs[name.replace("past_key_values", "present")] for name in cache}
            token = int(outputs["logits"][0, -1].argmax())
            if token == config.eos_token_id:
                break
            chosen.append(token)
            ids = torch.tensor([[token]])
        return torch.tensor(chosen, dtype=torch.int64)

    def _sessions(self, folder: Path, device: str, adapter: Path | None) -> tuple[GraphSession, GraphSession]:
        encoder, decoder = (
            GraphSession(folder / graph, device, adapter_file(adapter, graph, self.graphs)) for graph in self.graphs
        )
        return encoder, decoder


def _names(kind: str, layers: int) -> list[str]:
    return [f"{kind}.{layer}.{part}" for layer in range(layers) for part in KEY_VALUE]


class _Encoder(nn.Module):
    """Module from tokens to the keys and values that each decoder layer attends to, (batch, heads, sequence, head)."""

    def __init__(self, model: Any, layers: int) -> None:
        super().__init__()
        self.model, self.layers = model, layers

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        hidden = self.model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        cross = []
        for block in self.model.get_decoder().block:
            attention = block.layer[1].EncDecAttention
            for projection in (attention.k, attention.v):
                heads = projection(hidden).unflatten(-1, (attention.n_heads, attention.key_value_proj_dim))
                cross.append(heads.transpose(1, 2))
        return tuple(cross)


class _Decoder(nn.Module):
    """Module from new tokens and both caches to logits and the longer cache."""

    def __init__(self, model: Any, layers: int) -> None:
        super().__init__()
        self.model, self.layers = model, layers

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        from transformers.cache_utils import DynamicCache, EncoderDecoderCache

        decoder_input_ids, attention_mask, *caches = tensors
        cross, own = caches[: 2 * self.layers], caches[2 * self.layers :]
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        for layer in range(self.layers):
            cache.self_attention_cache.update(own[2 * layer], own[2 * layer + 1], layer)
            cache.cross_attention_cache.update(cross[2 * layer], cross[2 * layer + 1], layer)
            cache.is_updated[layer] = True
        hidden = cross[0].new_zeros((attention_mask.shape[0], attention_mask.shape[1], self.model.config.d_model))
        output = self.model(
            encoder_outputs=(hidden,),
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            past_key_values=cache,
            use_cache=True,
        )
        grown = output.past_key_values.self_attention_cache
        present = [part for layer in grown.layers for part in (layer.keys, layer.values)]
        return output.logits, *present
