"""Record the logprobs of a loop that samples and trains, by which the judge of rollouts is tested without an engine.

    cd tests && ../.venv/bin/python -m benchmarks.rollout_noise

SmolLM2 with a LoRA samples answers to GSM8K's questions in bfloat16, token by token with a cache, and is trained on
them in float32 for digits. At every step a trainer scores the sampled tokens, with few rows in a batch and without a
cache: with the adapter as it is, without it, and with each fault. The arrays are kept as
`tests/serve/rollouts/smollm2.npz`: one for each model, of shape (steps, rows, tokens), in nats.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from torch import Tensor

from loraover.models.load import load_model, load_tokenizer, resolve_model

from support.real_data import data_folder

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
KEPT = Path(__file__).parents[1] / "serve" / "rollouts" / "smollm2.npz"
STEPS, PROMPTS, ROWS, NEW_TOKENS, PROMPT_TOKENS, RATE = 8, 8, 1, 16, 16, 6e-4
TRAINER_ROWS = 3
TEMPERATURE = 0.9
SYSTEM = "<|im_start|>system\nAnswer briefly.<|im_end|>\n"

State = dict[str, Tensor]


class Sampled:
    """Prompts of one length, and tokens that followed them."""

    def __init__(self, prompts: Tensor, answers: Tensor) -> None:
        self.prompts, self.answers = prompts, answers


def logprobs(model: Any, prompts: Tensor, answers: Tensor, rows: int, temperature: float = 1.0) -> Tensor:
    """Logprobs of the answers' tokens, in nats, with so many rows in a batch."""
    found = []
    for start in range(0, len(prompts), rows):
        ids = torch.cat([prompts[start : start + rows], answers[start : start + rows]], dim=1)
        logits = model(input_ids=ids, logits_to_keep=answers.shape[1] + 1).logits[:, :-1].float() / temperature
        found.append(logits.log_softmax(-1).gather(-1, answers[start : start + rows, :, None])[..., 0])
    return torch.cat(found)


@torch.no_grad()
def sample(model: Any, prompts: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Answers, and the logprobs with which they were sampled."""
    out, ids, answers, found = None, prompts, [], []
    for _ in range(NEW_TOKENS):
        out = model(input_ids=ids, past_key_values=None if out is None else out.past_key_values, use_cache=True)
        each = out.logits[:, -1].float().log_softmax(-1)
        ids = torch.multinomial(each.exp(), 1, generator=draw)
        answers.append(ids[:, 0])
        found.append(each.gather(-1, ids)[:, 0])
    return torch.stack(answers, 1), torch.stack(found, 1)


def adapted(model: Any, dtype: torch.dtype) -> Any:
    """The model with a fresh LoRA, in a number format."""
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config).to(dtype).eval()


def parts(state: State, *words: str) -> State:
    """An adapter of which only the modules with one of these words in their names are left."""
    return {k: t if any(word in k for word in words) or "lora_B" not in k else 0 * t for k, t in state.items()}


def scaled(state: State, factor: float) -> State:
    """An adapter with a factor on each delta_W."""
    return {name: factor * t if "lora_B" in name else t for name, t in state.items()}


def arms(model: Any, states: list[State], s: Sampled, others: Tensor) -> dict[str, Tensor]:
    """A trainer's logprobs with the newest adapter, with none and with each fault."""
    mine = {name: p for name, p in model.named_parameters() if "lora_" in name}
    now, before = states[-1], states[max(len(states) - 2, 0)]
    models = {
        "right": now,
        "base": states[0],
        "stale": before,
        "half": scaled(now, 0.5),
        "attention": parts(now, "self_attn"),
        "temperature": now,
        "template": now,
    }
    found = {}
    with torch.no_grad():
        for name, state in models.items():
            for matrix, p in mine.items():
                p.data.copy_(state[matrix])
            prompts = others if name == "template" else s.prompts
            temperature = TEMPERATURE if name == "temperature" else 1.0
            found[name] = logprobs(model, prompts, s.answers, TRAINER_ROWS, temperature)
    for matrix, p in mine.items():
        p.data.copy_(now[matrix])
    return found


@click.command()
@click.option("--steps", default=STEPS)
def main(steps: int) -> None:
    """Train, and keep the arrays of each step."""
    torch.set_num_threads(1)
    source = resolve_model(MODEL)
    tokenizer = load_tokenizer(source)
    exact, rounded = adapted(load_model(source), torch.float32), adapted(load_model(source), torch.bfloat16)
    mine = {name: p for name, p in exact.named_parameters() if "lora_" in name}
    optimizer = torch.optim.AdamW(mine.values(), lr=RATE)
    with gzip.open(data_folder() / "gsm8k" / "train.jsonl.gz", "rt") as file:
        texts = [json.loads(line)["question"] for line in file]
    digits = torch.tensor([any(c.isdigit() for c in tokenizer.decode([i])) for i in range(len(tokenizer))])
    system = tokenizer(SYSTEM).input_ids
    kept: dict[str, list[NDArray[np.float32]]] = {}
    states: list[State] = []
    draw, at = torch.Generator().manual_seed(0), 0
    for step in range(steps):
        ids: list[list[int]] = []
        while len(ids) < PROMPTS:
            new = tokenizer(texts[at]).input_ids[:PROMPT_TOKENS]
            at += 1
            ids += [new] if len(new) == PROMPT_TOKENS else []
        prompts = torch.tensor(ids).repeat_interleave(ROWS, 0)
        states.append({name: p.detach().clone() for name, p in mine.items()})
        for name, p in rounded.named_parameters():
            if name in mine:
                p.data.copy_(mine[name].data)
        answers, sampled = sample(rounded, prompts, draw)
        s = Sampled(prompts, answers)
        others = torch.cat([torch.tensor(system).expand(len(prompts), -1), prompts], 1)
        found = {"sampled": sampled} | arms(rounded, states, s, others)
        for name, each in found.items():
            kept.setdefault(name, []).append(each.numpy())
        KEPT.parent.mkdir(exist_ok=True)
        np.savez_compressed(KEPT, **{name: np.stack(each) for name, each in kept.items()})  # type: ignore[arg-type]
        reward = digits[answers].float().mean(1)
        off = {name: float((found[name] - found["right"]).square().mean().sqrt()) for name in found}
        click.echo(f"step {step}: reward {reward.mean():.3f}, nats {off['sampled']:.3g} {off['base']:.3g}")
        gain = (reward - reward.mean()) / (reward.std() + 1e-6)
        for start in range(0, len(prompts), TRAINER_ROWS):
            part = slice(start, start + TRAINER_ROWS)
            scores = logprobs(exact, prompts[part], answers[part], TRAINER_ROWS)
            loss = -(gain[part, None] * scores).sum() / answers.numel()
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    main()
