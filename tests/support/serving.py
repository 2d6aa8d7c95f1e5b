"""A vLLM server on a real model, with several adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from loraover import LoraOverConfig, OverParameterization, write_checkpoint
from loraover.common.command_line import run
from loraover.models.load import ModelSource, load_model, load_tokenizer, resolve_model
from loraover_export.cli import cli
from loraover_serve.vllm.client import VllmServer
from loraover_serve.vllm.server import VllmServerConfig

from support.agreement import PROMPTS
from support.vllm_command import vllm_command
from support.vllm_loading import FEW_BLOCKS, load_adapter, serving_loader, unload_adapter

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
B_SCALE = 0.05  # standard deviation of B: an effect on logprobs several times the noise of bfloat16, and still words


@dataclass(frozen=True)
class Served:
    """A running server and its adapters."""

    client: VllmServer
    source: ModelSource
    adapters: Mapping[str, Path]
    sources: Mapping[str, Path]
    guest: Path
    prompts: list[list[int]]

    def base(self) -> Any:
        return load_model(self.source, dtype="bf16")

    @contextmanager
    def loaded(self, name: str, folder: Path) -> Iterator[None]:
        """Serve one more adapter for the length of the block."""
        load_adapter(self.client, name, folder)
        try:
            yield
        finally:
            unload_adapter(self.client, name)


@contextmanager
def serving(folder: Path) -> Iterator[Served]:
    """Make the adapters in `folder` and serve them."""
    vllm_command()  # skips the tests before anything is made
    source = resolve_model(MODEL)
    adapters = {"vanilla": vanilla(source, folder / "vanilla"), "folded": folded(source, folder / "folded")}
    sources = adapters | {"folded": folder / "checkpoint"}
    guest = embeddings(source, folder / "embeddings")
    tokenizer = load_tokenizer(source)
    config = VllmServerConfig(
        model=source.location,
        adapters=adapters,
        max_lora_rank=16,
        max_loras=2,
        options=("--dtype", "bfloat16", "--max-model-len", "512", "--enforce-eager", *FEW_BLOCKS),
    )
    with serving_loader(config, folder / "vllm.log") as client:
        yield Served(client, source, adapters, sources, guest, [tokenizer(text).input_ids for text in PROMPTS])


def vanilla(source: ModelSource, folder: Path) -> Path:
    """A plain PEFT LoRA of rank 8 on every linear layer, in bfloat16."""
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = get_peft_model(load_model(source, dtype="bf16"), config, autocast_adapter_dtype=False)
    draw_b(model, seed=2)
    model.save_pretrained(folder)
    return folder


def folded(source: ModelSource, folder: Path) -> Path:
    """A LoRA-Over checkpoint with ranks 8 and 4 and rsLoRA's scaling, written for vLLM in bfloat16."""
    config = LoraConfig(
        r=8,
        lora_alpha=8,
        use_rslora=True,
        rank_pattern={"down_proj": 4},
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = get_peft_model(load_model(source, dtype="bf16"), config)
    draw_b(model, seed=4)
    checkpoint = folder.with_name("checkpoint")
    model.save_pretrained(checkpoint)
    write_checkpoint(checkpoint, OverParameterization(model, LoraOverConfig(seed=5)), step=0)
    assert run(cli, ["vllm", str(checkpoint), "-o", str(folder)]) == 0
    return folder


def embeddings(source: ModelSource, folder: Path) -> Path:
    """An adapter of the embedding and of the output head, whose weights the model ties, written for vLLM."""
    config = LoraConfig(r=8, lora_alpha=32, target_modules=["embed_tokens", "lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(load_model(source, dtype="bf16"), config)
    draw_b(model, seed=6)
    plain = folder.with_name("plain embeddings")
    model.save_pretrained(plain)
    assert run(cli, ["vllm", str(plain), "-o", str(folder)]) == 0
    return folder


@torch.no_grad()
def draw_b(model: Any, seed: int) -> None:
    """Fill B, and both matrices of an embedding, with non-zero draws."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding" in name:
            parameter.copy_(B_SCALE * torch.randn(parameter.shape, generator=generator))
