"""Adapters of every kind that PEFT trains, with parameters that are not zero, and what they add to each weight."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from loraover.adapters.base_weights import open_base
from loraover.adapters.convert.kind import read_method
from loraover.adapters.convert.methods.base import Dense, Place
from loraover.adapters.convert.source import open_adapter
from loraover.checkpoint.base_model import resolve_base

from support.tiny_models import tiny_bart, tiny_gpt2, tiny_llama, tiny_t5

BOTH = ["q_proj", "down_proj", "fc2"]
DOUBLE, SINGLE = 1e-11, 3e-6
"""Largest error relative to the norm of delta_W, where PEFT computes in float64 and where it insists on float32."""


@dataclass(frozen=True)
class Source:
    """One adapter to convert.

    Args:
        kind: PEFT's name of its kind.
        options: Fields of its configuration.
        full: Whether its delta has full rank.
        error: Largest error of the conversion against PEFT, relative to the norm of delta_W.
        base: Name of the base model, of `BASES`.
        pruned: Whether ranks of an AdaLoRA are cut out of its file.
    """

    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    full: bool = False
    error: float = DOUBLE
    base: str = "prime"
    pruned: bool = False


BASES: dict[str, Callable[[], Any]] = {
    "prime": lambda: tiny_llama(hidden_size=34, num_attention_heads=1, num_key_value_heads=1, intermediate_size=53),
    "even": lambda: tiny_llama(hidden_size=32, intermediate_size=48),
    "bias": lambda: tiny_llama(hidden_size=32, intermediate_size=48, attention_bias=True),
    "tied": lambda: tiny_llama(tie_word_embeddings=True),
    "gpt2": tiny_gpt2,
    "t5": tiny_t5,
    "bart": tiny_bart,
}

SOURCES: dict[str, Source] = {
    "lora": Source("LORA", {"r": 5, "lora_alpha": 3}),
    "rslora with patterns": Source(
        "LORA", {"r": 4, "use_rslora": True, "rank_pattern": {"q_proj": 7}, "alpha_pattern": {"down_proj": 3}}
    ),
    "lora of an embedding": Source("LORA", {"r": 3, "target_modules": ["embed_tokens", "q_proj"]}),
    "lora on conv1d": Source("LORA", {"r": 3, "target_modules": ["c_attn"], "fan_in_fan_out": True}, base="gpt2"),
    "lora with trained tokens": Source("LORA", {"r": 2, "trainable_token_indices": [3, 61]}),
    "pissa": Source("LORA", {"r": 3, "lora_alpha": 6, "init_lora_weights": "pissa"}, error=SINGLE),
    "olora": Source("LORA", {"r": 3, "lora_alpha": 6, "init_lora_weights": "olora"}, error=SINGLE),
    "dora": Source("LORA", {"r": 3, "use_dora": True}, full=True),
    "adalora": Source("ADALORA", {"init_r": 6, "target_r": 3, "total_step": 10}),
    "adalora whose file is cut": Source("ADALORA", {"init_r": 6, "total_step": 10}, pruned=True),
    "adalora on conv1d": Source(
        "ADALORA",
        {"init_r": 6, "total_step": 10, "target_modules": ["c_attn"], "fan_in_fan_out": True},
        base="gpt2",
    ),
    "vera": Source("VERA", {"r": 5}),
    "vera from its seed": Source("VERA", {"r": 5, "save_projection": False, "projection_prng_key": 7}),
    "pvera": Source("PVERA", {"r": 5}),
    "pvera from its seed": Source("PVERA", {"r": 5, "save_projection": False}),
    "randlora": Source("RANDLORA", {"r": 3}, full=True),
    "unilora": Source("UNILORA", {"r": 3, "save_indices": True, "theta_d_length": 64}),
    "vblora": Source("VBLORA", {"r": 3, "num_vectors": 16, "vector_length": 4, "topk": 3}, base="even"),
    "vblora with the top k only": Source(
        "VBLORA",
        {"r": 3, "num_vectors": 16, "vector_length": 4, "topk": 3, "save_only_topk_weights": True},
        error=SINGLE,
        base="even",
    ),
    "vblora with the top 1 only": Source(
        "VBLORA",
        {"r": 3, "num_vectors": 16, "vector_length": 4, "topk": 1, "save_only_topk_weights": True},
        error=SINGLE,
        base="even",
    ),
    "loha": Source("LOHA", {"r": 3, "alpha": 7}, error=SINGLE),
    "loha with patterns": Source(
        "LOHA", {"r": 3, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 5}}, error=SINGLE
    ),
    "loha above full rank": Source("LOHA", {"r": 7}, error=SINGLE),
    "lokr": Source("LOKR", {"r": 2, "alpha": 3}, base="even"),
    "lokr of primes": Source("LOKR", {"r": 2}),
    "lokr in both": Source("LOKR", {"r": 1, "decompose_both": True, "decompose_factor": 6}, base="even"),
    "lokr of whole matrices": Source("LOKR", {"r": 64, "decompose_factor": 2}, base="even"),
    "hra": Source("HRA", {"r": 4}),
    "hra with Gram-Schmidt": Source("HRA", {"r": 4, "apply_GS": True}),
    "miss": Source("MISS", {"r": 5}),
    "miss mini": Source("MISS", {"r": 4, "mini_r": 4, "init_weights": "mini"}, base="even"),
    "miss bat": Source("MISS", {"r": 4, "init_weights": "bat"}, full=True, base="even"),
    "delora": Source("DELORA", {"r": 4}),
    "gralora": Source("GRALORA", {"r": 4, "gralora_k": 2}, base="even"),
    "gralora with a lora": Source("GRALORA", {"r": 4, "gralora_k": 2, "hybrid_r": 3}, base="even"),
    "deft": Source("DEFT", {"r": 3, "alpha": 2}, error=SINGLE),
    "deft of orthonormal columns": Source("DEFT", {"r": 3, "decomposition_method": "qr"}, error=SINGLE),
    "deft without R": Source("DEFT", {"r": 3, "para": True}, error=SINGLE),
    "peanut": Source("PEANUT", {"r": 3, "depth": 2, "act_fn": "tanh", "scaling": 0.5}),
    "osf": Source("OSF", {"effective_rank": 28}, error=SINGLE),
    "oft": Source("OFT", {"r": 0, "oft_block_size": 4}, full=True, base="even"),
    **{
        f"oft, {terms} terms": Source(
            "OFT", {"r": 0, "oft_block_size": 4, "num_cayley_neumann_terms": terms}, full=True, base="even"
        )
        for terms in (2, 3, 4)
    },
    "oft without Neumann": Source(
        "OFT", {"r": 0, "oft_block_size": 4, "use_cayley_neumann": False}, full=True, base="even"
    ),
    "oft shared and constrained": Source(
        "OFT",
        {"r": 0, "oft_block_size": 4, "block_share": True, "coft": True, "eps": 1e-2},
        full=True,
        error=SINGLE,
        base="even",
    ),
    "boft": Source("BOFT", {"boft_block_size": 4}, full=True, base="even"),
    "road 1": Source("ROAD", {"group_size": 8}, full=True, base="even"),
    "road 2": Source("ROAD", {"group_size": 8, "variant": "road_2"}, full=True, base="even"),
    "road 4": Source("ROAD", {"group_size": 8, "variant": "road_4"}, full=True, base="even"),
    "ia3": Source("IA3", {"feedforward_modules": ["down_proj"]}, full=True),
    "hira": Source("HIRA", {"r": 3}, full=True),
    "hira on conv1d": Source(
        "HIRA", {"r": 3, "target_modules": ["c_attn"], "fan_in_fan_out": True}, full=True, base="gpt2"
    ),
    "glora": Source("GLORA", {"r": 3}, full=True),
    "glora of columns": Source("GLORA", {"r": 3, "config_A_B": "vector"}, full=True),
    "c3a": Source("C3A", {"block_size": 8}, full=True, error=SINGLE, base="even"),
    "fourierft": Source("FOURIERFT", {"n_frequency": 600}, full=True, error=SINGLE),
    "shira": Source("SHIRA", {"r": 6}, full=True),
    "supertuning": Source("SUPERTUNING", {"sparsity": 0.5, "r": 2, "lora_alpha": 4}, full=True),
    "trained tokens": Source("TRAINABLE_TOKENS", {"token_indices": [5, 2, 63], "target_modules": ["embed_tokens"]}),
    "trained tokens of a tied model": Source(
        "TRAINABLE_TOKENS", {"token_indices": [5, 2], "target_modules": ["embed_tokens"]}, base="tied"
    ),
    "trained tokens of an encoder-decoder": Source(
        "TRAINABLE_TOKENS",
        {"token_indices": [5, 2], "target_modules": ["shared"], "task_type": "SEQ_2_SEQ_LM"},
        base="t5",
    ),
    "lora with trained tokens of an encoder-decoder": Source(
        "LORA", {"trainable_token_indices": [5, 2], "task_type": "SEQ_2_SEQ_LM"}, base="bart"
    ),
}
"""Adapters by name; every kind that is converted has at least one."""


def make_base(folder: Path, name: str) -> Path:
    """Write a base model; returns its folder."""
    BASES[name]().save_pretrained(folder)
    return folder


def load_base(folder: Path) -> Any:
    """The base model with its head."""
    config = AutoConfig.from_pretrained(folder)
    return (AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM).from_pretrained(folder)


def make_source(base: Path, folder: Path, source: Source) -> Path:
    """Write an adapter as training would leave it; returns its folder."""
    options = {"target_modules": BOTH, "task_type": "CAUSAL_LM"} | source.options
    config = PEFT_TYPE_TO_CONFIG_MAPPING[source.kind](**options)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        model = get_peft_model(load_base(base), config)
        fill(model, source.kind)
        if source.pruned:
            kept = [(name, e) for name, e in model.base_model.model.named_parameters() if "lora_E" in name]
            model.peft_config["default"].rank_pattern = {name: (e[:, 0] != 0).tolist() for name, e in kept}
        model.save_pretrained(folder)
    return folder


@torch.no_grad()
def fill(model: nn.Module, kind: str) -> None:
    """Move every trained parameter, and cut some ranks of an AdaLoRA."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn(parameter.shape))
        if kind == "ADALORA" and "lora_E" in name:
            parameter[::2] = 0


@torch.no_grad()
def peft_deltas(base: Path, folder: Path) -> dict[str, Tensor]:
    """Merged weights minus base weights, in float64 as far as PEFT can, by module; embeddings are transposed."""
    before = _weights(load_base(base))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = PeftModel.from_pretrained(load_base(base), folder)
        merged = _weights(model.double().merge_and_unload())
    deltas = {path: merged[path] - weight for path, weight in before.items()}
    return {path: delta for path, delta in deltas.items() if delta.any()}


@contextmanager
def places_of(folder: Path) -> Iterator[Iterator[Place]]:
    """The modules that an adapter changes, as the conversion reads them."""
    method, layout = read_method(folder)
    with (
        open_base(resolve_base([layout], None, option="--model", say=print)) as base,
        open_adapter(layout, base) as opened,
    ):
        yield method.places(opened)


def our_deltas(folder: Path, ranks: dict[str, int] | None = None) -> dict[str, Tensor]:
    """delta_W in float64 by module, as the conversion computes it before it is stored."""
    found = {}
    with places_of(folder) as places:
        for place in places:
            delta = place.delta()
            found[place.path] = delta.value if isinstance(delta, Dense) else delta.b @ delta.a
            if ranks is not None:
                ranks[place.path] = min(found[place.path].shape)
                if not isinstance(delta, Dense):
                    ranks[place.path] = min(ranks[place.path], len(delta.a))
    return found


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights in float64, shaped like delta_W, by module."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found[path] = module.weight.double()
        elif isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D":
            found[path] = module.weight.double().T
    return found
