"""Seq2SeqTrainer with a T5: the same callback.

Usage: python docs/examples/seq2seq.py --output runs/seq2seq
"""

import argparse

from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from loraover import LoraOverCallback, LoraOverConfig
from loraover.data.word_problems import split_word_problems

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="google-t5/t5-small", help="folder or hub name")
parser.add_argument("--output", default="runs/seq2seq")
parser.add_argument("--steps", type=int, default=100)
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.model)
rows, _ = split_word_problems(train=400, held_out=0, seed=0)
data = [tokenizer(row["prompt"], text_target=row["completion"]) for row in rows]

model = AutoModelForSeq2SeqLM.from_pretrained(options.model)
model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="SEQ_2_SEQ_LM"))
trainer = Seq2SeqTrainer(
    model,
    Seq2SeqTrainingArguments(
        options.output,
        max_steps=options.steps,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        save_steps=0.5,  # of the run
        report_to="none",
    ),
    train_dataset=data,
    data_collator=DataCollatorForSeq2Seq(tokenizer, model),
    callbacks=[LoraOverCallback(LoraOverConfig())],
)
trainer.train()
model.save_pretrained(f"{options.output}/adapter")  # a plain LoRA
