"""TRL's experimental trainers on a CPU, with an engine that samples when asked, by the weights that it got last."""

from __future__ import annotations

import copy
import queue
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.chat_template_utils import qwen3_template
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer, async_rollout_worker, packing
from trl.experimental.async_grpo.async_rollout_worker import RolloutSample
from trl.experimental.online_dpo import online_dpo_trainer as online_dpo_module

from support.online_trainers import PROMPTS, odd_answers, odd_characters


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, k_ends: Tensor, *_: Any, softmax_scale: float, **options: Any
) -> Tensor:
    """Attention of FlashAttention's signature: segments of queries, each after the end of its own keys."""
    found = []
    for i in range(len(q_ends) - 1):
        mine, keys, values = (
            each[ends[i] : ends[i + 1]].transpose(0, 1) for each, ends in ((q, q_ends), (k, k_ends), (v, k_ends))
        )
        rows, columns = mine.shape[1], keys.shape[1]
        seen = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)
        out = torch.nn.functional.scaled_dot_product_attention(
            mine, keys, values, attn_mask=seen, scale=softmax_scale, enable_gqa=True
        )
        found.append(out.transpose(0, 1))
    return torch.cat(found)


class Sampler:
    """Worker, queue and engine in one: `get` samples an answer by the weights that were sent last.

    Args:
        base: Folder of the base model.
        new_tokens: Number of tokens of each answer.

    Attributes:
        fault: "base" ignores all weights but the first; "stale" samples by those before the last.
    """

    fault = ""

    def __init__(self, base: Path, new_tokens: int = 8) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(str(base))
        self.prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
        self.new_tokens, self.version, self.served = new_tokens, 0, 0
        self.draw = torch.Generator().manual_seed(0)
        self.sent: list[dict[str, Tensor]] = []
        self.rollout_buffer, self.metrics_queue = self, queue.Queue[Any]()

    def ignore(self, *args: Any, **options: Any) -> None:
        """Stand in for calls that do nothing here."""

    start = stop = check_health = init_weight_transfer = pause = resume = destroy = ignore

    def update_model_version(self, model_version: int) -> None:
        self.version = model_version

    def send_weights(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        self.sent.append({name: copy.deepcopy(one.detach()) for name, one in weights})
        place = {"": -1, "base": 0, "stale": max(len(self.sent) - 2, 0)}[self.fault]
        self.model.load_state_dict(self.sent[place], strict=False)

    def qsize(self) -> int:
        return 1

    @torch.no_grad()
    def get(self, timeout: float | None = None) -> RolloutSample:
        prompt = self.prompts[self.served // 2 % len(self.prompts)]
        ids, told = torch.tensor([prompt]), [0.0] * len(prompt)
        for _ in range(self.new_tokens):
            scores = self.model(input_ids=ids).logits[0, -1].float().log_softmax(-1)
            token = torch.multinomial(scores.exp(), 1, generator=self.draw)
            told.append(float(scores[token]))
            ids = torch.cat([ids, token[None]], dim=1)
        answer = ids[0].numpy()
        self.served += 1
        mask = np.array([0] * len(prompt) + [1] * self.new_tokens)
        advantage = float(answer[-1] % 2) - 0.5
        return RolloutSample(
            [], [], answer, mask, np.array(told, np.float32), advantage, self.version, self.served // 2, {"reward": 0.0}
        )


def async_trainer(base: Path, output: Path, patch: pytest.MonkeyPatch, fault: str = "", **options: Any) -> Any:
    """The trainer, with two micro-batches of eight rows at each step."""
    on_cpu(patch)
    sampler = type("Planted", (Sampler,), {"fault": fault})(base)
    return AsyncGRPOTrainer(
        str(base),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config(output, **options),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        processing_class=AutoTokenizer.from_pretrained(str(base)),
        peft_config=LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", r=4),
        rollout_worker=sampler,
        weight_transfer=sampler,
    )


def on_cpu(patch: pytest.MonkeyPatch) -> None:
    """Give the trainer what it takes from CUDA."""
    patch.setattr(packing, "_flash_attn", lambda: SimpleNamespace(flash_attn_varlen_func=varlen_attention))
    patch.setattr(torch.cuda, "get_device_name", lambda device: "CPU")


def config(output: Path, **options: Any) -> AsyncGRPOConfig:
    """Settings of the trainer: 16 rows at each step."""
    given: dict[str, Any] = {
        "max_steps": 6,
        "logging_steps": 1,
        "bf16": False,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "learning_rate": 2e-2,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "num_generations": 2,
        "token_budget": 0,
        "max_staleness": 0,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    return AsyncGRPOConfig(str(output), **(given | options))


def served_async_trainer(
    base: Path,
    output: Path,
    patch: pytest.MonkeyPatch,
    url: str,
    prompts: Sequence[str],
    fault: str = "",
    **options: Any,
) -> Any:
    """The trainer with its own worker and client, which ask a real vLLM; a fault changes the folder that it loads.

    `base` has to be the folder that the server was started with. The worker wants an importable vLLM, of which it
    uses nothing, and the template of answers that it knows for this form of chat.
    """
    on_cpu(patch)
    patch.setattr(async_rollout_worker, "is_vllm_available", lambda: True)
    tokenizer = AutoTokenizer.from_pretrained(str(base))
    tokenizer.response_template = qwen3_template
    trainer = AsyncGRPOTrainer(
        str(base),
        reward_funcs=odd_answers,
        args=config(output, vllm_server_base_url=url, **options),
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": prompt}]} for prompt in prompts]),
        processing_class=tokenizer,
        peft_config=LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", r=8, lora_alpha=16),
    )
    name = f"trl-policy-{output.parent.name}"  # the server has those of earlier runs
    trainer._lora_name = trainer.rollout_worker._loop_kwargs["lora_name"] = name
    load, sent = trainer.vllm_client.load_lora_adapter, list[str]()

    def planted(name: str, path: str) -> None:
        sent.append(path)
        if fault == "stale":
            load(name, _kept(sent[max(len(sent) - 2, 0)]))
        else:
            load(name, _scaled(path, {"": 1.0, "base": 0.0, "half": 0.5}[fault]))

    trainer.vllm_client.load_lora_adapter = planted
    return trainer


def _kept(path: str) -> str:
    """A copy of an adapter, since the trainer removes its own after some syncs."""
    copied = f"{path}-kept"
    if not Path(copied).is_dir():
        shutil.copytree(path, copied)
    return copied


def _scaled(path: str, factor: float) -> str:
    """An adapter whose B is multiplied; the same folder for 1."""
    if factor == 1:
        return path
    copied = Path(_kept(path)) / "adapter_model.safetensors"
    tensors = load_file(copied)
    save_file({name: one * factor if "lora_B" in name else one for name, one in tensors.items()}, copied)
    return str(copied.parent)


class Server(Sampler):
    """Stand-in for TRL's client of a vLLM server, as OnlineDPOTrainer calls it."""

    base: Path

    def __init__(self, **_: Any) -> None:
        super().__init__(self.base)
        self.tokenizer = AutoTokenizer.from_pretrained(str(self.base))
        self.weights: dict[str, Tensor] = {}

    init_communicator = reset_prefix_cache = Sampler.ignore

    def get_server_info(self) -> dict[str, Any]:
        return {"model_config": {"dtype": "torch.float32", "logprobs_mode": "raw_logprobs"}}

    @contextmanager
    def weight_update(self) -> Iterator[None]:
        yield
        self.send_weights(iter(self.weights.items()))

    def update_named_param(self, name: str, weights: Tensor) -> None:
        self.weights[name] = weights.clone()

    def generate(self, prompts: list[str], n: int, **_: Any) -> dict[str, Any]:
        self.prompts, self.served = [self.tokenizer(prompt).input_ids for prompt in prompts], 0
        samples = [self.get() for _ in range(n * len(prompts))]
        told = [(each.input_ids.tolist(), each.old_log_probs.tolist()) for each in samples]
        return {
            "prompt_ids": self.prompts,
            "completion_ids": [ids[-self.new_tokens :] for ids, _ in told],
            "logprobs": [[[value] for value in values[-self.new_tokens :]] for _, values in told],
        }


def online_dpo_trainer(base: Path, output: Path, patch: pytest.MonkeyPatch, fault: str = "") -> Any:
    """OnlineDPOTrainer with a server, at the temperature 0.9, which is not in the server's logprobs."""
    patch.setattr(online_dpo_module, "is_vllm_available", lambda: True)
    patch.setattr(online_dpo_module, "SamplingParams", SimpleNamespace, raising=False)
    patch.setattr(online_dpo_module, "VLLMClient", type("Planted", (Server,), {"base": base, "fault": fault}))
    config = online_dpo_module.OnlineDPOConfig(
        str(output),
        max_steps=4,
        logging_steps=1,
        bf16=False,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        learning_rate=2e-2,
        per_device_train_batch_size=8,
        max_new_tokens=8,
        use_vllm=True,
        vllm_mode="server",
        disable_tqdm=True,
    )
    with pytest.MonkeyPatch.context() as during:  # it asks PyTorch for an accelerator
        during.setattr(torch.accelerator, "current_accelerator", lambda **_: SimpleNamespace(type="cpu"))
        return online_dpo_module.OnlineDPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(str(base)),
            reward_funcs=odd_characters,
            args=config,
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
            processing_class=AutoTokenizer.from_pretrained(str(base)),
            peft_config=LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", r=4),
        )
