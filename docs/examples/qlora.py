"""A base model in 4 bits (bitsandbytes' nf4): only A and B are trained, and they are in float32 anyway.

Usage: python docs/examples/qlora.py --output runs/qlora
"""

import argparse

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from loraover import LoraOverCallback, LoraOverConfig
from loraover.data.word_problems import split_word_problems

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="folder or hub name")
parser.add_argument("--output", default="runs/qlora")
parser.add_argument("--steps", type=int, default=100)
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.model)
rows, _ = split_word_problems(train=400, held_out=0, seed=0)
data = [tokenizer(row["prompt"] + row["completion"]) for row in rows]

nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
model = AutoModelForCausalLM.from_pretrained(options.model, quantization_config=nf4)
model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
trainer = Trainer(
    model,
    TrainingArguments(
        options.output,
        max_steps=options.steps,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        save_steps=0.5,  # of the run
        report_to="none",
    ),
    train_dataset=data,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    callbacks=[LoraOverCallback(LoraOverConfig())],
)
trainer.train()
model.save_pretrained(f"{options.output}/adapter")  # a plain LoRA
