"""torch.compile and gradient checkpointing: both see an ordinary LoRA.

Usage: python docs/examples/compile.py --output runs/compile
"""

import argparse

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraover import LoraOverConfig, OverParameterization, write_checkpoint
from loraover.data.word_problems import split_word_problems

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="folder or hub name")
parser.add_argument("--output", default="runs/compile")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--backend", default="inductor", help="backend of torch.compile")
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.model)
rows, _ = split_word_problems(train=options.steps * 4, held_out=0, seed=0)
texts = [row["prompt"] + row["completion"] for row in rows]
inputs = tokenizer(texts, padding="max_length", truncation=True, max_length=64, return_tensors="pt")  # one shape
labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)

model = AutoModelForCausalLM.from_pretrained(options.model)
model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
compiled = torch.compile(model.train(), backend=options.backend)
over = OverParameterization(compiled, LoraOverConfig())
over.attach(optimizer := torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3))

for step in range(options.steps):
    part = slice(4 * step, 4 * step + 4)
    tokens, mask = inputs["input_ids"][part], inputs["attention_mask"][part]
    loss = compiled(input_ids=tokens, attention_mask=mask, labels=labels[part]).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1}: loss {loss.item():.4f}")

over.finish()
model.save_pretrained(options.output)  # a plain LoRA
write_checkpoint(options.output, over, step=options.steps)  # and its cores, for `loraover export fold`
