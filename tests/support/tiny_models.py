"""Random models of a few thousand parameters, and LoRA adapters on them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from loraover.callbacks.step_norm import factors

from support.devices import DEVICE

VOCABULARY = 64


class TinyNet(nn.Module):
    """Three linear layers; two of the A and two of the B matrices of their LoRA share a shape."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return hidden


def tiny_net(seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    """TinyNet with a LoRA on every layer, on `DEVICE`; `options` as in `with_lora`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = TinyNet()
    options = {"target_modules": ["first", "second", "third"]} | options
    return with_lora(net, seed=seed, **options).to(DEVICE, dtype)


def net_batch(seed: int = 0, rows: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Inputs (rows, 6) and targets (rows, 5) of TinyNet."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(rows, size, generator=generator, dtype=torch.float64).to(dtype) for size in (6, 5))
    return x, y


def batch_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean squared error on a batch of `net_batch`."""
    x, y = batch
    loss: Tensor = (model(x) - y).square().mean()
    return loss


def net_loss(model: nn.Module, seed: int = 0, rows: int = 4) -> Any:
    """Mean squared error on `net_batch`."""
    parameter = next(model.parameters())
    x, y = (tensor.to(parameter.device) for tensor in net_batch(seed, rows, parameter.dtype))
    return batch_loss(model, (x, y))


def tiny_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """Two layers, hidden size 32, 4 heads of which 2 hold keys and values."""
    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return _seeded(LlamaForCausalLM, LlamaConfig(**(config | changes)), seed)


def tiny_gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """Its linear layers are Conv1D, with transposed weights."""
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    return _seeded(GPT2LMHeadModel, config, seed)


def tiny_neox(seed: int = 0) -> GPTNeoXForCausalLM:
    """Its layers lie below gpt_neox, and its head is embed_out."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return _seeded(GPTNeoXForCausalLM, GPTNeoXConfig(vocab_size=VOCABULARY, **sizes), seed)


def tiny_bart(seed: int = 0) -> BartForConditionalGeneration:
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = BartConfig(vocab_size=VOCABULARY, dropout=0.0, **sizes, **heads)
    return _seeded(BartForConditionalGeneration, config, seed)


def tiny_t5(seed: int = 0) -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return _seeded(T5ForConditionalGeneration, config, seed)


def tiny_bert(seed: int = 0, num_labels: int = 2) -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        num_labels=num_labels,
    )
    return _seeded(BertForSequenceClassification, config, seed)


def saved(model: Any, folder: Path) -> Any:
    """Save a base model, so that PEFT names the folder in adapters; returns the model."""
    model.save_pretrained(folder)
    model.name_or_path = str(folder)
    return model


def with_lora(
    model: nn.Module, *, draw_b: bool = True, seed: int = 0, adapter: str = "default", **options: Any
) -> PeftModel:
    """The model with a LoRA adapter of rank 4 on all of its linear layers.

    Args:
        draw_b: Fill B, and A of an embedding, with non-zero draws, so that the adapter changes the model's function.
        adapter: PEFT's name of it.
        options: Other fields of LoraConfig.
    """
    chosen = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | options
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, LoraConfig(**chosen), adapter_name=adapter)
    if draw_b:
        fill_b(wrapped, seed)
    return wrapped


@torch.no_grad()
def fill_b(model: nn.Module, seed: int = 0) -> None:
    """Non-zero draws in every LoRA matrix that is zero: B at the start, and A of an embedding."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name and not parameter.any():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def hooks(model: Any) -> int:
    """Number of hooks that are called when modules of a model are."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def lora_matrices(model: nn.Module) -> dict[str, Tensor]:
    """Copies of every A and B, by parameter name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def update_norm(model: nn.Module) -> float:
    """Frobenius norm of scaling * B A over all adapted modules; 0 for a fresh LoRA."""
    return math.sqrt(sum(found.square() for found in factors(model).values()))


def token_ids(seed: int = 0, batch: int = 4, length: int = 8) -> Tensor:
    """Random tokens, none of them special."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def _seeded(kind: Any, config: Any, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(config).eval()
