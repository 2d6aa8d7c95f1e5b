"""Lightning's Trainer: attach the optimizer in `configure_optimizers`.

Usage: python docs/examples/lightning_trainer.py --output runs/lightning
"""

import argparse

import torch
from lightning import LightningModule, Trainer
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

from loraover import LoraOverConfig, OverParameterization, write_checkpoint
from loraover.data.word_problems import split_word_problems

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="folder or hub name")
parser.add_argument("--output", default="runs/lightning")
parser.add_argument("--steps", type=int, default=100)
options = parser.parse_args()


class Tuned(LightningModule):
    def __init__(self):
        super().__init__()
        lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model = get_peft_model(AutoModelForCausalLM.from_pretrained(options.model), lora).train()

    def training_step(self, batch):
        loss = self.model(**batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):  # the model is on its device by now
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=3e-3)
        self.over = OverParameterization(self.model, LoraOverConfig(), steps=self.trainer.estimated_stepping_batches)
        self.over.attach(optimizer)
        return optimizer

    def on_train_end(self):
        self.over.finish()


tokenizer = AutoTokenizer.from_pretrained(options.model)
rows, _ = split_word_problems(train=400, held_out=0, seed=0)
data = [tokenizer(row["prompt"] + row["completion"]) for row in rows]
loader = DataLoader(data, batch_size=8, shuffle=True, collate_fn=DataCollatorForLanguageModeling(tokenizer, mlm=False))
tuned = Tuned()
Trainer(max_steps=options.steps, logger=False, enable_checkpointing=False).fit(tuned, loader)
tuned.model.save_pretrained(options.output)  # a plain LoRA
write_checkpoint(options.output, tuned.over, step=options.steps)  # and its cores, for `loraover export fold`
