"""Record what engines answer for many adapters of several families of models, from which limits of verify are derived.

    cd tests && ../.venv/bin/python -m benchmarks.families --work DIR [--only FAMILY] [--engine ENGINE]

Tiny models of four families are trained here on text of GSM8K until their logits are peaked; SmolLM2-135M is real. Each
has twenty adapters: of seven ranks, on the attention or on all linear layers, trained as LoRA, rsLoRA, LoHa (converted)
or LoRA-Over (folded), and scaled to effects from 0.05 to 5 nats. Engines with quantised weights are compared with
PyTorch on the same weights. What is kept stands in `tests/serve/noise/families/FAMILY-ENGINE.npz`, as
`benchmarks.verify_noise` has it with one more axis, for adapters. A file that exists is not made again.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from loraover import LoraOverConfig, OverParameterization, write_checkpoint
from loraover.common.errors import LoraOverError
from loraover.models.load import ModelSource, load_model, load_tokenizer, resolve_model
from loraover_export import convert_adapter, fold_checkpoint
from loraover_serve.judge.limits import ADAPTER, BASE

from benchmarks.verify_noise import (
    MODEL,
    SERVED,
    Subject,
    in_llamacpp,
    in_mlx,
    in_nf4,
    in_onnx,
    in_openvino,
    in_torch,
    in_vllm,
    likeliest,
)
from support.plain_adapter import tiny_decoder
from support.real_data import data_folder
from support.recorded_noise import NOISE

OUTPUT = NOISE / "families"
REAL = "SmolLM2"
VOCABULARY = 1024
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
PHI3 = {"original_max_position_embeddings": 256}
EXPERTS = {"norm_topk_prob": True, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
FAMILIES: dict[str, dict[str, Any]] = {REAL: {}, "Qwen2": {}, "Gemma": {}, "Phi3": PHI3, "Qwen3Moe": EXPERTS}
"""Fields of the configuration of each family."""

ENGINES: dict[str, Callable[..., Any]] = {
    "onnx-fp32": partial(in_onnx, "fp32"),
    "vllm-bf16": partial(in_vllm, "bfloat16"),
    "vllm-fp16": partial(in_vllm, "float16"),
    "torch-fp8": partial(in_torch, "fp8"),
    "llamacpp-q8": partial(in_llamacpp, "Q8_0"),
    "llamacpp-q4": partial(in_llamacpp, "Q4_0"),
    "llamacpp-q4-1": partial(in_llamacpp, "Q4_1"),
    "mlx-int4": in_mlx,
    "onnx-int4": partial(in_onnx, "int4"),
    "openvino-int4": in_openvino,
    "torch-nf4": in_nf4,
}
FLOATS = ("onnx-fp32", "vllm-bf16", "vllm-fp16", "torch-fp8")
"""Engines that are compared with the base model's own weights."""

ADAPTERS = 20
RANKS = (1, 2, 4, 8, 16, 32, 64)
KINDS = ("lora", "lora-over", "rslora", "loha", "lora")
EFFECTS = np.geomspace(0.05, 5.0, ADAPTERS)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj")
LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj", "gate_up_proj")
PROMPTS, PROMPT_TOKENS, STEPS, KEPT = 32, 16, 4, 4
TRAINING_STEPS, BATCH, LENGTH, RATE = 400, 16, 64, 3e-3
ADAPTER_STEPS, SMALL_BATCH, LARGEST = 20, 4, 30.0


@dataclass(frozen=True)
class Kind:
    """How an adapter is trained.

    Args:
        number: Its place among the twenty, by which text and seed are chosen.
        method: One of KINDS.
        effect: RMS change of the likeliest tokens' logprobs, in nats.
    """

    number: int
    method: str
    rank: int
    targets: tuple[str, ...]
    effect: float

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"a{self.number}"

    @classmethod
    def all(cls) -> list[Kind]:
        """The twenty, of which the place of the effect is not that of the rank."""
        effects = np.random.default_rng(0).permutation(EFFECTS)
        return [
            cls(n, KINDS[n % 5], RANKS[n % 7], LINEAR if n % 2 else ATTENTION, float(effect))
            for n, effect in enumerate(effects)
        ]


def problems() -> list[str]:
    """Questions and answers of GSM8K's training rows."""
    with gzip.open(data_folder() / "gsm8k" / "train.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [f"{row['question']}\n{row['answer']}" for row in rows]


def make_base(family: str, folder: Path, texts: Sequence[str]) -> ModelSource:
    """The real model, or a tiny one that is trained on texts, with a tokenizer of their words."""
    if family == REAL:
        return resolve_model(MODEL)
    if not (folder / "config.json").exists():
        make_tokenizer(texts).save_pretrained(folder)
        model = tiny_decoder(family, **(SIZES | FAMILIES[family]))
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
        loss = train(model, optimizer, batches(folder, texts, 0), TRAINING_STEPS)
        click.echo(f"{family}: loss {loss:.2f} of {math.log(VOCABULARY):.2f} by chance")
        model.save_pretrained(folder)
    return resolve_model(str(folder))


def make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    from tokenizers import ByteLevelBPETokenizer

    made = ByteLevelBPETokenizer()
    made.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=made._tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def batches(base: Path | str, texts: Sequence[str], first: int, size: int = BATCH) -> Iterator[Tensor]:
    """Token ids (size, LENGTH) of texts, from the first on."""
    tokenizer = load_tokenizer(resolve_model(str(base)))
    left: list[int] = []
    for number in count(first):
        left += [*tokenizer(texts[number % len(texts)]).input_ids, tokenizer.eos_token_id]
        if len(left) >= size * LENGTH:
            yield torch.tensor(left[: size * LENGTH]).reshape(size, LENGTH)
            left = []


def train(model: Any, optimizer: torch.optim.Optimizer, given: Iterator[Tensor], steps: int) -> float:
    """Take steps of next-token prediction, and return the last loss."""
    model.train()
    for _, ids in zip(range(steps), given, strict=False):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
    model.eval()
    return float(loss)


def make_adapter(kind: Kind, source: ModelSource, folder: Path, texts: Sequence[str], asked: Tensor) -> None:
    """Train an adapter, scale it to its effect, and write it as a plain LoRA in `folder`."""
    torch.manual_seed(kind.number)
    base = load_model(source)
    targets = sorted({name.split(".")[-1] for name, _ in base.named_modules()} & {*kind.targets})
    if kind.method == "loha":
        config: Any = LoHaConfig(r=min(kind.rank, 8), alpha=16, target_modules=targets, task_type="CAUSAL_LM")
    else:
        config = LoraConfig(
            r=kind.rank,
            lora_alpha=16,
            target_modules=targets,
            use_rslora=kind.method == "rslora",
            task_type="CAUSAL_LM",
        )
    model = get_peft_model(base, config)
    over = OverParameterization(model, LoraOverConfig(seed=kind.number)) if kind.method == "lora-over" else None
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    if over is not None:
        over.attach(optimizer)
    given = batches(source.location, texts, 1000 + 100 * kind.number, SMALL_BATCH)
    train(model, optimizer, given, ADAPTER_STEPS)
    factor = scale_to(kind.effect, model, asked)
    setattr(config, "alpha" if kind.method == "loha" else "lora_alpha", 16 * factor)
    raw = folder.with_name(f"{folder.name}-trained")
    model.save_pretrained(raw)
    if over is not None:
        write_checkpoint(raw, over, step=ADAPTER_STEPS)
        fold_checkpoint(raw, folder)
    elif kind.method == "loha":
        convert_adapter(raw, folder, model=source.location)
    else:
        raw.rename(folder)


@torch.no_grad()
def scale_to(effect: float, model: Any, asked: Tensor) -> float:
    """Multiply the adapter's scaling by up to LARGEST until it has an effect; returns the factor."""

    def logprobs() -> Tensor:
        found: Tensor = model(input_ids=asked).logits[:, -STEPS:].log_softmax(-1)
        return found

    with model.disable_adapter():
        before = logprobs()
    likely = before.topk(KEPT).indices
    layers = [module for module in model.modules() if isinstance(getattr(module, "scaling", None), dict)]
    known = [dict(layer.scaling) for layer in layers]
    low, high = 1e-3, LARGEST
    for _ in range(16):
        factor = math.sqrt(low * high)
        for layer, scaling in zip(layers, known, strict=True):
            layer.scaling.update({name: factor * value for name, value in scaling.items()})
        found = (logprobs() - before).gather(-1, likely).square().mean().sqrt()
        low, high = (factor, high) if found < effect else (low, factor)
    return factor


def record(
    engine: str,
    source: ModelSource,
    folder: Path,
    names: Sequence[str],
    asked: Sequence[tuple[int, ...]],
    output: Path,
) -> None:
    """Ask an engine for the base model and for each adapter, and keep its answers."""
    found: list[dict[str, Any]] = []
    with ENGINES[engine](source, folder, names) as answer:
        for name in names:
            weights = None if engine in FLOATS else folder / SERVED[engine]
            subject = Subject(source, folder / name, asked, weights, steps=STEPS, kept=KEPT)
            arms = {BASE: BASE, ADAPTER: name}
            found.append(subject.kept({arm: likeliest(answer(each, subject.models)) for arm, each in arms.items()}))
    output.parent.mkdir(parents=True, exist_ok=True)
    stacked: dict[str, Any] = {key: np.stack([each[key] for each in found]) for key in found[0]}
    np.savez_compressed(output, **stacked)


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder for models, adapters and graphs.")
@click.option("--only", type=click.Choice(list(FAMILIES)), multiple=True, help="Family; all by default.")
@click.option("--engine", type=click.Choice(list(ENGINES)), multiple=True, help="Engine; all by default.")
def main(work: Path, only: Sequence[str], engine: Sequence[str]) -> None:
    """Train models and adapters, and record engines."""
    texts = problems()
    for family in only or FAMILIES:
        folder = work / family
        folder.mkdir(parents=True, exist_ok=True)
        source = make_base(family, folder / "model", texts)
        tokenizer = load_tokenizer(source)
        asked = [tuple(tokenizer(text).input_ids[:PROMPT_TOKENS]) for text in texts[-PROMPTS:]]
        kinds = Kind.all()
        for kind in kinds:
            if not (folder / kind.name).exists():
                make_adapter(kind, source, folder / kind.name, texts, torch.tensor(asked))
                click.echo(f"{family}: {kind}")
        for name in engine or ENGINES:
            output = OUTPUT / f"{family}-{name}.npz"
            if not output.exists():
                try:
                    record(name, source, folder, [kind.name for kind in kinds], asked, output)
                except LoraOverError as error:
                    click.echo(f"{family} on {name}: not recorded: {error}")
                else:
                    click.echo(f"wrote {output}")


if __name__ == "__main__":
    main()
