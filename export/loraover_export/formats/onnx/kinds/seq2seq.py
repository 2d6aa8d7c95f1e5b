"""Encoder-decoder models: one graph for the encoder and the cross-attention's cache, one for a decoding step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loraover_export.formats.onnx.kinds.base import ComparedTokens, GraphKind, GraphPlan, GraphRunner, greedy
from loraover_export.formats.onnx.session import GraphSession
from loraover_export.formats.onnx.swappable import adapter_file
from loraover_export.formats.onnx.torch_graph import add_branches, export_torch, set_precision

KEY_VALUE = ("key", "value")


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
