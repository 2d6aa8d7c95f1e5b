"""TRL's SFTTrainer, which adds the LoRA to the model itself; the callback finds it.

Usage: python docs/examples/sft.py --output runs/sft
"""

import argparse

import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from loraover import LoraOverCallback, LoraOverConfig
from loraover.data.word_problems import split_word_problems

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="folder or hub name")
parser.add_argument("--output", default="runs/sft")
parser.add_argument("--steps", type=int, default=100)
options = parser.parse_args()

rows, _ = split_word_problems(train=400, held_out=0, seed=0)
trainer = SFTTrainer(
    options.model,
    SFTConfig(
        options.output,
        max_steps=options.steps,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        save_steps=0.5,  # of the run
        bf16=torch.accelerator.is_available(),  # which is TRL's default on a CPU too, where it fails
        report_to="none",
    ),
    train_dataset=Dataset.from_list(rows),
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    callbacks=[LoraOverCallback(LoraOverConfig())],
)
trainer.train()
trainer.model.save_pretrained(f"{options.output}/adapter")  # a plain LoRA
