"""DistributedDataParallel: a step sends gradients of A and B, not of the cores; each process makes the same cores.

Usage: torchrun --nproc-per-node 2 docs/examples/ddp.py --output runs/ddp
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from loraover import LoraOverConfig, OverParameterization, write_checkpoint

parser = argparse.ArgumentParser()
parser.add_argument("--output", type=Path, default=Path("runs/ddp"))
parser.add_argument("--steps", type=int, default=20)
options = parser.parse_args()

distributed.init_process_group("gloo")
rank, processes = distributed.get_rank(), distributed.get_world_size()

sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
base = LlamaForCausalLM(LlamaConfig(vocab_size=100, pad_token_id=0, **sizes))  # yours, from_pretrained
lora = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
model = DistributedDataParallel(lora)
over = OverParameterization(model, LoraOverConfig())  # after DDP, which writes rank 0's matrices into every process
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
if rank == 0:
    lora.save_pretrained(options.output)  # already a plain LoRA
    write_checkpoint(options.output, over, step=options.steps)  # and its cores, for loraover export fold to prove it
distributed.destroy_process_group()
