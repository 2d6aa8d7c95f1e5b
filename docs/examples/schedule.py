"""A dynamic schedule: half of the matrices get cores, in three rounds; the choices and their scores are printed.

Usage: python docs/examples/schedule.py --output runs/schedule
"""

import argparse

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraover import Budget, LoraOverConfig, OverParameterization, write_checkpoint
from loraover.data.word_problems import word_problems

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="folder or hub name")
parser.add_argument("--output", default="runs/schedule")
parser.add_argument("--steps", type=int, default=60)
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.model)
model = AutoModelForCausalLM.from_pretrained(options.model)
model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
config = LoraOverConfig(schedule="dynamic", score="fisher", budget=Budget(fraction=0.5), rounds=3, start=0.2, end=0.6)
model.train()
over = OverParameterization(model, config, steps=options.steps)
over.attach(optimizer := torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3))

problems = word_problems(seed=0)
for _ in range(options.steps):
    row = next(problems)
    inputs = tokenizer(row["prompt"] + row["completion"], return_tensors="pt")
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()

for found in over.schedule.rounds:
    print(f"after step {found.step}: {len(found.chosen)} matrices, {found.added} parameters more")
    for name in sorted(found.chosen, key=found.scores.__getitem__, reverse=True)[:3]:
        print(f"    {found.scores[name]:.2e}  {name}")

over.finish()
model.save_pretrained(options.output)  # a plain LoRA
write_checkpoint(options.output, over, step=options.steps)  # and its cores, for `loraover inspect` to show
