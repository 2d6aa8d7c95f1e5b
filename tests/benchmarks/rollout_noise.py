"""Record the logprobs of a loop that samples and trains, by which the judge of rollouts is tested without an engine.

    cd tests && ../.venv/bin/python -m benchmarks.rollout_noise --number-format bf16

SmolLM2 with a LoRA samples answers to GSM8K's questions in a number format, token by token with a cache, and is trained
on them in float32 for digits. At every step a trainer scores the sampled tokens in that number format, with few rows in
a batch and without a cache: with the adapter as it is, without it, and with each fault. The arrays are kept as
`tests/serve/rollouts/smollm2-bf16.npz`: one for each model, of shape (steps, rows, tokens), in nats. A token that a
fault's sampling leaves out is NaN.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from torch import Tensor

from loraover.models.load import load_model, load_tokenizer, resolve_model

from support.real_data import data_folder
from support.recorded_rollouts import FOLDER, SCALING

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
NUMBER_FORMATS = {"bf16": torch.bfloat16, "fp32": torch.float32}
STEPS, PROMPTS, NEW_TOKENS, PROMPT_TOKENS, RATE = 24, 8, 16, 16, 2e-4
RANK = 8
TRAINER_ROWS = 3
TEMPERATURE, TOP_P = 0.9, 0.9
CACHED_BY = 4
"""Number of steps between the adapter that has computed a prompt's keys and values, and the one that continues them."""
SYSTEM = "<|im_start|>system\nAnswer briefly.<|im_end|>\n"

State = dict[str, Tensor]


def logits_of(model: Any, prompts: Tensor, answers: Tensor) -> Tensor:
    """Logits at the answers' tokens, with few rows in a batch; shape (rows, tokens, vocabulary)."""
    found = []
    for start in range(0, len(prompts), TRAINER_ROWS):
        part = slice(start, start + TRAINER_ROWS)
        ids = torch.cat([prompts[part], answers[part]], dim=1)
        found.append(model(input_ids=ids, logits_to_keep=answers.shape[1] + 1).logits[:, :-1].float())
    return torch.cat(found)


def logits_after_kept(model: Any, load: Any, older: State, now: State, prompts: Tensor, answers: Tensor) -> Tensor:
    """Logits of an adapter that continues the keys and values of an older one, but for the prompt's last token."""
    load(older)
    out = model(input_ids=prompts[:, :-1], use_cache=True)
    load(now)
    ids = torch.cat([prompts[:, -1:], answers[:, :-1]], dim=1)
    return model(input_ids=ids, past_key_values=out.past_key_values).logits.float()  # type: ignore[no-any-return]


def chosen(logits: Tensor, answers: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """Logprobs of the answers' tokens, in nats, as sampling by a temperature and top-p processes them."""
    every = (logits / temperature).log_softmax(-1)
    mine = every.gather(-1, answers[..., None])[..., 0]
    if top_p == 1:
        return mine
    likely = every.sort(-1, descending=True).values.exp()
    mass = likely.cumsum(-1)
    kept = torch.where(mass - likely < top_p, likely, 0.0)
    least = torch.where(kept > 0, likely, torch.inf).amin(-1)
    return torch.where(mine.exp() >= least, mine - kept.sum(-1).log(), torch.nan)


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
    config = LoraConfig(r=RANK, lora_alpha=int(RANK * SCALING), target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config).to(dtype).eval()


def parts(state: State, *words: str) -> State:
    """An adapter of which only the modules with one of these words in their names are left."""
    return {k: t if any(word in k for word in words) or "lora_B" not in k else 0 * t for k, t in state.items()}


def scaled(state: State, factor: float) -> State:
    """An adapter with a factor on each delta_W."""
    return {name: factor * t if "lora_B" in name else t for name, t in state.items()}


def turned(state: State) -> State:
    """Another adapter of the same size: the columns of each B in another order."""
    return {name: t.roll(1, 1) if "lora_B" in name else t for name, t in state.items()}


@torch.no_grad()
def arms(model: Any, states: list[State], prompts: Tensor, answers: Tensor, others: Tensor) -> dict[str, Tensor]:
    """A trainer's logprobs with the newest adapter, with none and with each fault."""
    mine = {name: p for name, p in model.named_parameters() if "lora_" in name}

    def load(state: State) -> None:
        for name, p in mine.items():
            p.data.copy_(state[name])

    def behind(steps: int) -> State:
        return states[max(len(states) - 1 - steps, 0)]

    now = states[-1]
    models = {
        "stale by 1": behind(1),
        "stale by 2": behind(2),
        **{f"times {factor:g}": scaled(now, factor) for factor in (1 / SCALING, 0.5, 2.0, SCALING)},
        "attention": parts(now, "self_attn"),
        "mlp": parts(now, ".mlp."),
        "layers": parts(now, *(f"layers.{layer}." for layer in range(15))),
        "another": turned(now),
    }
    found = {}
    for name, state in models.items():
        load(state)
        found[name] = chosen(logits_of(model, prompts, answers), answers)
    found["kept"] = chosen(logits_after_kept(model, load, behind(CACHED_BY), now, prompts, answers), answers)
    found["template"] = chosen(logits_of(model, others, answers), answers)
    for name, state in {"right": now, "base": states[0]}.items():
        load(state)
        logits = logits_of(model, prompts, answers)
        found[name] = chosen(logits, answers)
        found[f"{name}, temperature"] = chosen(logits, answers, TEMPERATURE)
        found[f"{name}, top-p"] = chosen(logits, answers, top_p=TOP_P)
    load(now)
    return found


def questions(tokenizer: Any) -> Iterator[Tensor]:
    """Yield the prompts of each step: the first tokens of GSM8K's questions."""
    with gzip.open(data_folder() / "gsm8k" / "train.jsonl.gz", "rt") as file:
        texts = (tokenizer(json.loads(line)["question"]).input_ids[:PROMPT_TOKENS] for line in file)
        long = (ids for ids in texts if len(ids) == PROMPT_TOKENS)
        while True:
            yield torch.tensor([next(long) for _ in range(PROMPTS)])


@click.command()
@click.option("--number-format", type=click.Choice(list(NUMBER_FORMATS)), default="bf16")
@click.option("--steps", default=STEPS)
def main(number_format: str, steps: int) -> None:
    """Train, and keep the arrays of each step."""
    torch.set_num_threads(1)
    source = resolve_model(MODEL)
    tokenizer = load_tokenizer(source)
    exact = adapted(load_model(source), torch.float32)
    served = adapted(load_model(source), NUMBER_FORMATS[number_format])
    mine = {name: p for name, p in exact.named_parameters() if "lora_" in name}
    optimizer = torch.optim.AdamW(mine.values(), lr=RATE)
    digits = torch.tensor([any(c.isdigit() for c in tokenizer.decode([i])) for i in range(len(tokenizer))])
    system = torch.tensor(tokenizer(SYSTEM).input_ids).expand(PROMPTS, -1)
    kept: dict[str, list[NDArray[np.float32]]] = {}
    states: list[State] = []
    draw = torch.Generator().manual_seed(0)
    for step, prompts in zip(range(steps), questions(tokenizer), strict=False):
        states.append({name: p.detach().clone() for name, p in mine.items()})
        for name, p in served.named_parameters():
            if name in mine:
                p.data.copy_(mine[name].data)
        answers, sampled = sample(served, prompts, draw)
        others = torch.cat([system, prompts], 1)
        found = {"sampled": sampled} | arms(served, states, prompts, answers, others)
        for name, each in found.items():
            kept.setdefault(name, []).append(each.numpy())
        stacked: Any = {name: np.stack(each) for name, each in kept.items()}
        FOLDER.mkdir(exist_ok=True)
        np.savez_compressed(FOLDER / f"smollm2-{number_format}.npz", **stacked)
        reward = digits[answers].float().mean(1)
        off = {name: float((each - found["right"]).square().nanmean().sqrt()) for name, each in found.items()}
        click.echo(f"step {step}: reward {reward.mean():.3f}, nats {off['sampled']:.3g} {off['base']:.3g}")
        gain = (reward - reward.mean()) / (reward.std() + 1e-6)
        for start in range(0, len(prompts), TRAINER_ROWS):
            part = slice(start, start + TRAINER_ROWS)
            scores = chosen(logits_of(exact, prompts[part], answers[part]), answers[part])
            loss = -(gain[part, None] * scores).sum() / answers.numel()
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    main()
