"""TRL's DPOTrainer: a quarter of the matrices get cores, chosen in rounds by gradients that training computes anyway.

Usage: python docs/examples/dpo.py --output runs/dpo

`schedule="static"` and `score="loss_impact"` run the model on training batches. A batch of preferences holds no labels,
so they need the trainer's loss: `callback.loss = loraover.trainer_loss(trainer)`.
"""

import argparse

import torch
from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from loraover import LoraOverCallback, LoraOverConfig
from loraover.data.word_problems import split_word_problems

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="folder or hub name")
parser.add_argument("--output", default="runs/dpo")
parser.add_argument("--steps", type=int, default=100)
options = parser.parse_args()

rows, _ = split_word_problems(train=400, held_out=0, seed=0)
answers = [row["completion"] for row in rows]
pairs = [
    {"prompt": row["prompt"], "chosen": right, "rejected": wrong}
    for row, right, wrong in zip(rows, answers, answers[1:] + answers[:1], strict=True)
]
trainer = DPOTrainer(
    options.model,
    args=DPOConfig(
        options.output,
        max_steps=options.steps,
        per_device_train_batch_size=4,
        learning_rate=5e-5,
        save_steps=0.5,  # of the run
        bf16=torch.accelerator.is_available(),  # which is TRL's default on a CPU too, where it fails
        report_to="none",
    ),
    train_dataset=Dataset.from_list(pairs),
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    callbacks=[LoraOverCallback(LoraOverConfig(schedule="dynamic", budget={"fraction": 0.25}, rounds=2))],
)
trainer.train()
trainer.model.save_pretrained(f"{options.output}/adapter")  # a plain LoRA
