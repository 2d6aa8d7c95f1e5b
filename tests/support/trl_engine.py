"""Stand-ins for TRL's `VLLMGeneration`, which has no way to a vLLM on a CPU: the same calls, with planted faults.

TRL sends weights by NCCL. These send an adapter: `LocalEngine` to a copy of the model in this process, `VllmByHttp` to
the real vLLM, which loads each version from a folder under a new name.
"""

from __future__ import annotations

import copy
import json
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch import Tensor
from torch.func import functional_call

Adapter = dict[str, Tensor]
MLP = ("gate_proj", "up_proj", "down_proj")


def adapter_of(model: Any) -> Adapter:
    return {name: one.detach().clone() for name, one in model.named_parameters() if one.requires_grad}


def times(adapter: Adapter, factor: float, only: Sequence[str] = ("",)) -> Adapter:
    """An adapter whose B is multiplied where a part of its name is one of some."""
    return {
        name: one * factor if "lora_B" in name and any(part in name for part in only) else one
        for name, one in adapter.items()
    }


class LocalEngine:
    """An engine in this process: a copy of the model, in a number format.

    Class attributes plant a fault from the sync number `since` on: base, stale, half, attention, upper (the layers from
    the second on have no adapter), or mixed, which answers every second row by the base model.
    """

    fault: ClassVar[str] = ""
    since: ClassVar[int] = 0
    dtype: ClassVar[torch.dtype] = torch.float32
    mode: ClassVar[str] = "processed_logprobs"

    def __init__(self, *, model: Any, temperature: float, max_completion_length: int, **options: Any) -> None:
        self.trained, self.temperature, self.longest = model, temperature, max_completion_length
        self.logprobs = options["logprobs"]
        self.vllm_client = SimpleNamespace(get_server_info=self.info)
        self.adapters: list[Adapter] = []
        self.prepare()

    def prepare(self) -> None:
        self.model = copy.deepcopy(self.trained).to(self.dtype).eval()
        if isinstance(self.model, PeftModel):
            vars(self.model.get_base_model()).pop("forward", None)  # TRL's, which runs the trained model
        self.draw = torch.Generator().manual_seed(0)

    def info(self) -> dict[str, Any]:
        return {"model_config": {"dtype": str(self.dtype), "logprobs_mode": self.mode}}

    def sync_weights(self) -> None:
        self.adapters.append(adapter_of(self.trained))

    def served(self, index: int) -> Adapter | None:
        """The adapter that answers a row; None: the base model."""
        fault, now = self.fault if len(self.adapters) > self.since else "", self.adapters[-1]
        found = {
            "": now,
            "base": None,
            "stale": self.adapters[max(len(self.adapters) - 2, 0)],
            "half": times(now, 0.5),
            "attention": times(now, 0.0, MLP),
            "upper": times(now, 0.0, ("layers.1.",)),
            "mixed": None if index % 2 else now,
        }
        return found[fault]

    def generate(
        self, prompts: list[list[int]], images: Any, num_generations: int, profiler: Any = None
    ) -> tuple[Any, ...]:
        answers: list[Any] = [None] * len(prompts)
        known: dict[bool, Adapter | None] = {}
        for is_base in (False, True):
            rows = [index for index in range(len(prompts)) if (self.served(index) is None) == is_base]
            if rows:
                known[is_base] = self.served(rows[0])
                for index, answer in zip(rows, self.answer([prompts[i] for i in rows], known[is_base]), strict=True):
                    answers[index] = answer
        ids, told = zip(*answers, strict=True)
        logprobs = None if self.logprobs is None else [[[value] for value in each] for each in told]
        return prompts, list(ids), logprobs, None

    @torch.no_grad()
    def answer(self, prompts: Sequence[list[int]], adapter: Adapter | None) -> list[tuple[list[int], list[float]]]:
        """Sampled tokens and their logprobs: all the tokens that there may be, without an end."""
        held = {name: one.to(self.dtype) for name, one in (adapter or times(self.adapters[0], 0.0)).items()}
        found: dict[int, tuple[list[int], list[float]]] = {}
        for length in {len(prompt) for prompt in prompts}:
            rows = [index for index, prompt in enumerate(prompts) if len(prompt) == length]
            ids, told = torch.tensor([prompts[index] for index in rows]), list[Tensor]()
            for _ in range(self.longest):
                logits = functional_call(self.model, held, (), {"input_ids": ids}).logits[:, -1].float()
                scores = (logits / self.temperature).log_softmax(-1)
                tokens = torch.multinomial(scores.exp(), 1, generator=self.draw)
                told.append(scores.gather(1, tokens))
                ids = torch.cat([ids, tokens], dim=1)
            sampled, logprobs = ids[:, length:].tolist(), torch.cat(told, dim=1).tolist()
            found |= {index: (sampled[i], logprobs[i]) for i, index in enumerate(rows)}
        return [found[index] for index in range(len(prompts))]


class VllmByHttp(LocalEngine):
    """The real vLLM, asked by HTTP; class attributes name its address, its base model, and a folder for adapters."""

    url: ClassVar[str]
    base: ClassVar[str]
    folder: ClassVar[Path]

    def prepare(self) -> None:
        self.names: list[tuple[Adapter, str]] = []

    def info(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.url}/server_info?config_format=json", timeout=600) as answer:
            found: dict[str, Any] = json.load(answer)["vllm_config"]
        return found

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            text = answer.read()
        return json.loads(text) if text.startswith(b"{") else None

    def name_of(self, adapter: Adapter) -> str:
        """Name under which the server has loaded an adapter, a new one for each version."""
        for known, name in self.names:
            if known.keys() == adapter.keys() and all(torch.equal(known[key], adapter[key]) for key in adapter):
                return name
        name = f"{self.folder.name}-v{len(self.names)}"
        self.trained.save_pretrained(str(self.folder / name), state_dict=adapter)
        self.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(self.folder / name)})
        self.names.append((adapter, name))
        return name

    def answer(self, prompts: Sequence[list[int]], adapter: Adapter | None) -> list[tuple[list[int], list[float]]]:
        body = {
            "model": self.base if adapter is None else self.name_of(adapter),
            "prompt": [*prompts],
            "max_tokens": self.longest,
            "temperature": self.temperature,
            "logprobs": 0,
            "return_token_ids": True,
        }
        choices = self.post("/v1/completions", body)["choices"]
        choices.sort(key=lambda choice: choice["index"])
        return [(choice["token_ids"], choice["logprobs"]["token_logprobs"]) for choice in choices]
