"""The Hugging Face Trainer: one callback trains through cores, a second one lets a killed run resume.

Usage: python docs/examples/trainer.py --output runs/trainer
"""

import argparse

from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    set_seed,
)

from loraover import LoraOverCallback, LoraOverConfig, SealCheckpoints, last_whole_checkpoint
from loraover.data.word_problems import split_word_problems

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="folder or hub name")
parser.add_argument("--output", default="runs/trainer")
parser.add_argument("--steps", type=int, default=100)
options = parser.parse_args()

set_seed(0)  # before A is drawn: a run that is killed before its first checkpoint restarts with the same A
tokenizer = AutoTokenizer.from_pretrained(options.model)
rows, _ = split_word_problems(train=400, held_out=0, seed=0)
data = [tokenizer(row["prompt"] + row["completion"]) for row in rows]

model = AutoModelForCausalLM.from_pretrained(options.model)
model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
trainer = Trainer(
    model,
    TrainingArguments(
        options.output,
        max_steps=options.steps,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        save_steps=0.2,  # of the run
        report_to="none",
    ),
    train_dataset=data,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    callbacks=[LoraOverCallback(LoraOverConfig()), SealCheckpoints()],
)
trainer.train(resume_from_checkpoint=last_whole_checkpoint(options.output))
model.save_pretrained(f"{options.output}/adapter")  # a plain LoRA
