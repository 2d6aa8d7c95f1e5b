"""Your own training loop, with checkpoints from which a killed run continues with the same losses, bit for bit.

Usage: python docs/examples/plain_loop.py --output runs/plain-loop    (the same command resumes it)

Only safetensors and JSON are written, no pickle.
"""

import argparse
import json
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraover import (
    Budget,
    LoraOverConfig,
    OverParameterization,
    last_whole_checkpoint,
    read_checkpoint,
    restore,
    seal,
    write_checkpoint,
)
from loraover.data.word_problems import split_word_problems

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="folder or hub name")
parser.add_argument("--output", type=Path, default=Path("runs/plain-loop"))
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--save-every", type=int, default=20)
options = parser.parse_args()


def batch(tokenizer, rows):
    inputs = tokenizer([row["prompt"] + row["completion"] for row in rows], padding=True, return_tensors="pt")
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def save(folder):
    model.save_pretrained(folder)
    write_checkpoint(folder, over, step=len(losses))
    state = optimizer.state_dict()  # of plain matrices only: LoRA-Over's files hold that of the cores
    tensors = {f"{index}.{key}": value for index, entry in state["state"].items() for key, value in entry.items()}
    save_file(tensors | {"random": torch.get_rng_state()}, folder / "state.safetensors")
    (folder / "state.json").write_text(json.dumps({"param_groups": state["param_groups"], "losses": losses}))
    seal(folder)  # marks the checkpoint as complete


def load(folder):
    restore(over, read_checkpoint(folder))
    tensors, state = load_file(folder / "state.safetensors"), json.loads((folder / "state.json").read_text())
    torch.set_rng_state(tensors.pop("random"))
    losses.extend(state.pop("losses"))
    entries = {}
    for name, value in tensors.items():
        index, key = name.split(".")
        entries.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": entries, **state})


torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(options.model)
rows, _ = split_word_problems(train=options.steps * 8, held_out=0, seed=0)
base = AutoModelForCausalLM.from_pretrained(options.model)
lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
checkpoint = last_whole_checkpoint(options.output)
if checkpoint is None:
    model = get_peft_model(base, lora)
else:
    model = PeftModel.from_pretrained(base, checkpoint, is_trainable=True)
model.train()

losses = []
config = LoraOverConfig(schedule="dynamic", budget=Budget(fraction=0.5), start=0.3, end=0.6)
over = OverParameterization(model, config, steps=options.steps, inject=checkpoint is None)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
if checkpoint is not None:
    load(checkpoint)
over.attach(optimizer)

for step in range(len(losses), options.steps):
    loss = 0.0
    for micro in range(2):  # gradients add up over two batches of four
        start = 8 * step + 4 * micro
        part = model(**batch(tokenizer, rows[start : start + 4])).loss / 2
        part.backward()
        loss += part.item()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss)
    print(f"step {step + 1}: loss {loss:.4f}")
    if (step + 1) % options.save_every == 0:
        save(options.output / f"checkpoint-{step + 1}")

over.finish()
model.save_pretrained(options.output / "adapter")  # a plain LoRA
