"""Size of a reference for vocabularies of models with 7 billion parameters.

The real recorder runs with its defaults. The models have 32 layers, random weights of few numbers, logits that spread
like a trained model's, and the texts of real tokens: those of Mistral's vocabularies, which mistral-common has in
vLLM's environment.
"""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
import torch
from peft import LoraConfig, get_peft_model
from rich.table import Table
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from loraover_serve.verify.recorder import record_adapter

from benchmarks.shown import table_of
from support.plain_adapter import tiny_decoder
from support.vllm_command import vllm_command

VOCABULARIES = (32_000, 128_256, 151_936)
LAYERS = 32
SPREAD, STRENGTH = 3.0, 0.008
"""Standard deviation of the random models' logits, and of the random B of their adapters."""


def measure() -> Iterator[Table]:
    """Yield the table."""
    heads = ("vocabulary", "questions", "positions", "faults", "effect, nats", "kB")
    table = table_of(f"adapter_reference.json.gz of models with {LAYERS} layers", *heads, words=0)
    with tempfile.TemporaryDirectory(prefix="loraover-size-") as scratch:
        folder = Path(scratch)
        texts = token_texts()
        for size in VOCABULARIES:
            adapter = save_model(folder / str(size), texts[size])
            found = record_adapter(adapter, model=str(adapter.parent))
            counts = f"{size:,}", str(found.questions), str(found.positions), str(found.variants)
            table.add_row(*counts, f"{found.effect:.2f}", f"{found.size_bytes / 1000:.0f}")
    yield table


def token_texts() -> dict[int, list[str]]:
    """Texts of real tokens, by the size of the vocabulary."""
    (folder,) = Path(vllm_command()).parents[1].glob("lib/*/site-packages/mistral_common/data")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model.v1"))
    small = [pieces.id_to_piece(i).replace("\u2581", " ") for i in range(pieces.get_piece_size())]
    large = json.loads((folder / "tekken_240911.json").read_text(encoding="utf-8"))["vocab"]
    decoded = [base64.b64decode(each["token_bytes"]).decode(errors="replace") for each in large]
    known = {*decoded}
    both = [*decoded, *(text for text in small if text not in known)]
    return {size: unique((small if size <= len(small) else both)[:size]) for size in VOCABULARIES}


def unique(texts: list[str]) -> list[str]:
    """The texts, where one that was there before has its number, as the bytes of a vocabulary have."""
    seen: set[str] = set()
    found = []
    for index, text in enumerate(texts):
        found.append(f"<{index}>" if text in seen or not text else text)
        seen.add(found[-1])
    return found


def save_model(folder: Path, texts: list[str]) -> Path:
    """Write a random model with a tokenizer of these texts, and an adapter, whose folder is returned."""
    model = tiny_decoder("Llama", vocab_size=len(texts), num_hidden_layers=LAYERS, tie_word_embeddings=False)
    with torch.no_grad():
        head = model.lm_head.weight
        head.copy_(torch.randn(head.shape) * SPREAD / head.shape[1] ** 0.5)
    model.save_pretrained(folder)
    backend = Tokenizer(models.Unigram([(text, -1.0) for text in texts], unk_id=0))
    backend.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=texts[0], eos_token=texts[2]).save_pretrained(folder)
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape) * STRENGTH)
    adapted.save_pretrained(folder / "adapter")
    return folder / "adapter"
