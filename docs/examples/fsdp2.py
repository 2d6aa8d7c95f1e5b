"""FSDP2: A and B are sharded with the model; every process holds all cores, so a step gathers dL/dA and dL/dB.

Usage: torchrun --nproc-per-node 2 docs/examples/fsdp2.py --output runs/fsdp2
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import distributed
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from loraover import LoraOverConfig, OverParameterization, trainable_state_dict, write_checkpoint

parser = argparse.ArgumentParser()
parser.add_argument("--output", type=Path, default=Path("runs/fsdp2"))
parser.add_argument("--steps", type=int, default=20)
options = parser.parse_args()

distributed.init_process_group("gloo")
rank, processes = distributed.get_rank(), distributed.get_world_size()

torch.manual_seed(0)  # fully_shard takes each process's own slice: all must start from the same matrices
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
base = LlamaForCausalLM(LlamaConfig(vocab_size=100, pad_token_id=0, **sizes))  # yours, from_pretrained
model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
for layer in base.model.layers:
    fully_shard(layer)
fully_shard(model)
over = OverParameterization(model, LoraOverConfig())  # after fully_shard, which makes new parameters
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
over.attach(optimizer)

batch = torch.randint(100, (8, 16), generator=torch.Generator().manual_seed(0))
for step in range(options.steps):
    tokens = batch[rank::processes]  # each process its share
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if rank == 0:
        print(f"step {step + 1}: loss {loss.item():.4f} on rank 0")

over.finish()
adapter = trainable_state_dict(model)  # unsharded matrices; every process takes part
if rank == 0:
    model.save_pretrained(options.output, state_dict=adapter)  # already a plain LoRA
    write_checkpoint(options.output, over, step=options.steps)  # and its cores, for loraover export fold to prove it
distributed.destroy_process_group()
