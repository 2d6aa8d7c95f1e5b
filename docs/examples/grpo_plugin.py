"""Train an adapter by GRPO on one CPU, while vLLM samples from it, and judge at each step what it samples from.

Each step writes the adapter into one folder, and tells vLLM to load it in place. All prompts begin alike, so that vLLM
continues cached keys and values. The plug-in serves each version from another path, and no answer continues those of an
older one: the judge compares each step with a prompt that the adapter before has cached.

Usage: python docs/examples/grpo_plugin.py RUN [--model BASE] [--steps N]

vLLM's environment needs this package, as docs/how-to/serve-any-adapter.md says; $LORAOVER_VLLM names its command.
"""

import argparse
import json
import urllib.request
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraover_serve import RolloutJudge, scale_faults, serve_adapters

INSTRUCTIONS = "You are a careful clerk. " + "Write numbers as digits, one after the other, and no other words. " * 5
ROWS, NEW_TOKENS, RATE = 8, 12, 1e-3

parser = argparse.ArgumentParser()
parser.add_argument("run", type=Path)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--steps", type=int, default=6)
asked = parser.parse_args()
torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(asked.model)
base = AutoModelForCausalLM.from_pretrained(asked.model, dtype="float32")
lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(base, lora)
matrices = {name: one for name, one in model.named_parameters() if one.requires_grad}
optimizer = torch.optim.AdamW(matrices.values(), lr=RATE)
policy, judge, before = asked.run / "adapters" / "policy", RolloutJudge(), None


def post(url: str, body: dict) -> bytes:
    """Send a request as JSON."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        return answer.read()


def logprobs(prompts: list, answers: list, old: dict | None = None) -> torch.Tensor:
    """Logprobs of the answers' tokens; `old` is an adapter that reads the prompts, as a stale cache would have it."""
    found = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids, cache = torch.tensor([prompt + answer]), None
        if old is not None:
            now = {name: one.detach().clone() for name, one in matrices.items()}
            model.load_state_dict(old, strict=False)
            cache = model(input_ids=ids[:, : len(prompt) - 1], use_cache=True).past_key_values
            model.load_state_dict(now, strict=False)
            ids = ids[:, len(prompt) - 1 :]
        logits = model(input_ids=ids, past_key_values=cache).logits[0, -len(answer) - 1 : -1]
        found.append(logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0])
    return torch.cat(found)


def train(url: str) -> None:
    """Sample, judge, learn and send the adapter, step by step."""
    global before
    for step in range(1, asked.steps + 1):
        questions = [f"{INSTRUCTIONS}What is {7 * step + n // 2} times {n // 2 + 12}?" for n in range(ROWS)]
        prompts = [tokenizer(question).input_ids for question in questions]
        sampled = {"model": "policy", "prompt": prompts, "max_tokens": NEW_TOKENS, "logprobs": 0}
        told = json.loads(post(f"{url}/v1/completions", sampled | {"return_token_ids": True}))["choices"]
        told.sort(key=lambda choice: choice["index"])
        answers = [choice["token_ids"] for choice in told]
        with torch.no_grad():
            with model.disable_adapter():
                b = logprobs(prompts, answers)
            faults = scale_faults(lora.lora_alpha / lora.r)
            if before is not None:
                faults["prompts cached by the adapter before"] = logprobs(prompts, answers, before)
        a = logprobs(prompts, answers)  # last, since the stale cache has changed A and B in place
        lengths = torch.tensor([len(answer) for answer in answers])
        rows = torch.arange(ROWS).repeat_interleave(lengths).tolist()
        finding = judge.step(
            [value for choice in told for value in choice["logprobs"]["token_logprobs"]],
            a.detach(),
            b,
            [questions[row] for row in rows],
            rows=rows,
            faults=faults,
        )
        rewards = torch.tensor([sum(each.isdigit() for each in choice["text"]) / NEW_TOKENS for choice in told])
        print(f"step {step}: reward {rewards.mean():.2f}; {finding.verdict}: {finding.reason}", flush=True)

        advantages = (rewards.view(-1, 2) - rewards.view(-1, 2).mean(1, keepdim=True)).flatten()
        before = {name: one.detach().clone() for name, one in matrices.items()}
        (-(advantages.repeat_interleave(lengths) * a).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.save_pretrained(policy)
        post(
            f"{url}/v1/load_lora_adapter",
            {"lora_name": "policy", "lora_path": str(policy.resolve()), "load_inplace": True},
        )


model.save_pretrained(policy)
options = ["--dtype", "float32", "--block-size", "32", "--max-model-len", "256", "--enforce-eager"]
with serve_adapters(
    folder=policy.parent,
    model=asked.model,
    cache=asked.run / "prepared",
    settle_s=0,
    log=asked.run / "vllm.log",
    options=options,
) as server:
    post(f"{server.url}/v1/load_lora_adapter", {"lora_name": "policy", "lora_path": str(policy.resolve())})
    train(server.url)
