"""Faults that noise used to hide, each planted in a server that answers as models in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loraover_serve.verify import names
from loraover_serve.verify.report import EngineResult
from loraover_serve.verify.run import verify_engine

from support.openai_server import Reply, openai_server
from support.verified import Case, Planted, Served, plant, save_adapter, save_base

Plant = Callable[[Case, Path], Reply]


def scaled(case: Case, factor: float, folder: Path) -> Path:
    changed = Planted("", "", {}, lambda found: {k: factor * t if "lora_B" in k else t for k, t in found.items()})
    return plant(changed, case.adapter, folder)


def served(case: Case, scratch: Path, **more: Any) -> Served:
    return Served(case.base, {"base": None, "shop": case.adapter}, **more)


def penalised(logits: Tensor, ids: list[int]) -> Tensor:
    """Hugging Face's repetition penalty of 1.3."""
    read = torch.zeros(len(logits), dtype=torch.bool)
    read[ids] = True
    return torch.where(read, torch.where(logits > 0, logits / 1.3, logits * 1.3), logits)


def at_temperature(case: Case, scratch: Path) -> Reply:
    return served(case, scratch, change=lambda logits, ids: logits / 0.9)


def with_a_penalty(case: Case, scratch: Path) -> Reply:
    return served(case, scratch, change=penalised)


def ends_after_one_token(case: Case, scratch: Path) -> Reply:
    right = served(case, scratch)
    return lambda body: right(body | {"max_tokens": 1})


def decodes_with_the_base(case: Case, scratch: Path) -> Reply:
    """From the second token on, and without the ids of the tokens."""
    right = served(case, scratch)

    def answer(body: dict[str, Any]) -> bytes:
        first = right.answer(body | {"max_tokens": 1})
        (choice,) = first["choices"]
        if body["max_tokens"] > 1:
            (token,) = (int(name.removeprefix("token_id:")) for name in choice["logprobs"]["tokens"])
            rest = {"model": "base", "prompt": [*body["prompt"], token], "max_tokens": body["max_tokens"] - 1}
            choice["logprobs"]["top_logprobs"] += right.answer(body | rest)["choices"][0]["logprobs"]["top_logprobs"]
        del choice["logprobs"]["tokens"]
        return json.dumps(first).encode()

    return answer


def answers_the_base_with_a_weaker_adapter(case: Case, scratch: Path) -> Reply:
    return Served(case.base, {"base": scaled(case, 0.3, scratch / "weaker"), "shop": case.adapter})


def answers_the_base_with_another_adapter(case: Case, scratch: Path) -> Reply:
    lora = {"r": 2, "lora_alpha": 1, "target_modules": ["o_proj"], "rank_pattern": {}, "alpha_pattern": {}}
    other = save_adapter(scratch / "other", case.base, **lora)
    return Served(case.base, {"base": other, "shop": case.adapter})


def forgets_the_adapter_at_times(case: Case, scratch: Path) -> Reply:
    right, calls = served(case, scratch), count()

    def answer(body: dict[str, Any]) -> int | bytes:
        forgets = body["model"] == "shop" and next(calls) % 5 == 4
        found = right.answer(body | ({"model": "base"} if forgets else {}))
        return json.dumps(found | {"model": body["model"]}).encode()

    return answer


def adds_a_token(case: Case, scratch: Path) -> Reply:
    right = served(case, scratch)
    return lambda body: right(body | {"prompt": [right.first, *body["prompt"]]})


def has_other_weights(case: Case, scratch: Path) -> Reply:
    """By 3 %, at random."""
    draw = torch.Generator().manual_seed(3)

    def near(weight: Tensor) -> Tensor:
        return weight * (1 + 0.03 * torch.randn(weight.shape, generator=draw))

    return Served(save_base(scratch / "near", change=near), {"base": None, "shop": case.adapter})


def is_right(case: Case, scratch: Path) -> Reply:
    return served(case, scratch)


@dataclass(frozen=True)
class Expected:
    """What is expected of a server: its verdicts, of which one must be, and the fault."""

    verdicts: tuple[str, ...]
    fault: str | None = None


DIFFERS = ("differs",)
TABLE: dict[Plant, Expected] = {
    is_right: Expected(("as trained",)),
    at_temperature: Expected(DIFFERS, names.TEMPERATURE),
    with_a_penalty: Expected(DIFFERS, names.PENALTY),
    ends_after_one_token: Expected(DIFFERS, names.ENDS_EARLY),
    decodes_with_the_base: Expected(DIFFERS, names.DECODED),
    answers_the_base_with_a_weaker_adapter: Expected(DIFFERS, names.IN_BASE),
    answers_the_base_with_another_adapter: Expected(DIFFERS, names.UNLIKE),
    forgets_the_adapter_at_times: Expected(DIFFERS, names.INTERMITTENT),
    adds_a_token: Expected(DIFFERS, names.EXTRA_TOKEN),
    has_other_weights: Expected(("inconclusive",)),
}


@pytest.mark.parametrize("fault", TABLE, ids=lambda plant: plant.__name__)
def test_each_planted_fault_has_its_verdict(fault: Plant, case: Case, tmp_path: Path) -> None:
    found = verify(fault(case, tmp_path), case, tmp_path)
    assert found.verdict in TABLE[fault].verdicts, found.reason
    assert found.fault == TABLE[fault].fault, found.reason


def verify(reply: Reply, case: Case, scratch: Path) -> EngineResult:
    with openai_server(reply, ("base", "shop")) as server:
        setting = case.setting(scratch, endpoint=server.url, served_name="shop")
        return verify_engine("endpoint", setting, case.judge)
