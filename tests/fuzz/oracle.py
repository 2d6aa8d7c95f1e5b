"""What PEFT computes in float64: the effect of each module, and the logits of the model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn

from support.tiny_experts import peft_deltas
from support.tiny_models import VOCABULARY

Effects = dict[str, Tensor]
"""Change of each module: columns of delta_W, then the change of the output for an input of zeros, by path."""

AUTO = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "FEATURE_EXTRACTION": "AutoModel",
}
IN_SINGLE = frozenset({"C3A", "DEFT", "FOURIERFT", "LOHA", "OFT", "OSF", "VBLORA"})
"""Kinds parts of which PEFT computes in float32 whatever the model's data type is."""


def load_plain(base: Path, task: str | None) -> Any:
    """Return a base model in the data type that it is stored in, with the same head each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        auto = getattr(transformers, AUTO[task or "CAUSAL_LM"])
        # the fused experts of PyTorch have no float64
        return auto.from_pretrained(base, dtype="auto", experts_implementation="eager").eval()


def load_adapted(base: Path, adapter: Path, task: str | None) -> Any:
    """Return the model as PEFT loads it, in float64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(load_plain(base, task), str(adapter)).double().eval()


def single(kind: str, options: dict[str, Any]) -> float:
    """Return the relative error of PEFT's own arithmetic for a kind."""
    started = isinstance(options.get("init_lora_weights"), str)
    return 3e-6 if kind in IN_SINGLE or started else 1e-11


@torch.no_grad()
def effects(model: Any, plain: Any) -> Effects:
    """Return the effect of each linear layer and embedding of a base model, forward minus forward."""
    core = model.get_base_model() if isinstance(model, PeftModel) else model
    found = {}
    for path, module in plain.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) or type(module).__name__ == "Conv1D":
            found[path] = outputs(core.get_submodule(path), module) - outputs(module, module)
    if isinstance(model, PeftModel):
        found |= {path: delta.double() for path, delta in peft_deltas(model).items()}
    return {path: effect for path, effect in found.items() if effect.any()}


def outputs(module: nn.Module, plain: Any) -> Tensor:
    """Return W and the bias of a module (out_features, in_features + 1) from its forward."""
    if isinstance(plain, nn.Embedding):
        rows: Tensor = module(torch.arange(plain.num_embeddings)[None])[0]
        return rows.T
    n = plain.weight.shape[0 if type(plain).__name__ == "Conv1D" else 1]
    inputs = torch.cat([torch.eye(n), torch.zeros(1, n)]).double()
    found: Tensor = module(inputs[None])[0]
    return torch.cat([found[:-1] - found[-1], found[-1:]]).T


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Return the outputs for a prompt in which each token of the vocabulary stands once."""
    ids = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(0))[None]
    core = model.get_base_model() if isinstance(model, PeftModel) else model
    second = {"decoder_input_ids": ids.flip(1)} if core.config.is_encoder_decoder else {}
    found: Tensor = model(input_ids=ids, **second)[0]
    return found.double()
