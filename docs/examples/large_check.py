"""Fold and check an adapter of a Llama with the shapes of Llama-3.2-1B and random weights, of rank 16.

Usage: python docs/examples/large_check.py FOLDER [DEVICE [COMPUTE_DTYPE]]    (2.5 GB of disk and 4 GB of memory)
"""

import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from loraover import ConsoleReporter, LoraOverConfig, OverParameterization, write_checkpoint
from loraover.common.provenance import host_peak_bytes
from loraover_export import fold_checkpoint

folder, device, compute_dtype = Path(sys.argv[1]), *(sys.argv[2:] + ["auto", "bf16"][len(sys.argv) - 2 :])
config = LlamaConfig(
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    tie_word_embeddings=True,
    dtype=torch.bfloat16,
)
if not (folder / "base").exists():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    torch.set_default_dtype(torch.float32)

base = LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
model = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # PEFT starts it at zero; a trained one is not
            parameter.normal_(std=0.02)
model.save_pretrained(folder / "checkpoint")
write_checkpoint(folder / "checkpoint", OverParameterization(model, LoraOverConfig(seed=0)), step=0)
del base, model

start, cpu = time.perf_counter(), time.process_time()
certificate = fold_checkpoint(
    folder / "checkpoint",
    folder / "folded",
    dtype="bf16",
    check_error=True,
    device=device,
    compute_dtype=compute_dtype,
    force=True,
    report=ConsoleReporter(),
)
outputs = certificate.outputs
print(f"{certificate.verdict} in {time.perf_counter() - start:.0f} s: {outputs.tokens} tokens on {outputs.device}")
print(f"CPU time {time.process_time() - cpu:.1f} s, largest memory {host_peak_bytes() / 2**30:.1f} GiB")
print(f"largest logit error {outputs.error.max_logit:.3g}, allowed {outputs.bound:.3g}; ", end="")
print(f"the adapter moves logits by up to {outputs.adapter_effect:.3g}")
