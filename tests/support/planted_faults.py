"""Faults of servers and of base models, with what verify must find: one table for all engines that tests make wrong.

A fault changes what becomes of the requests to a right server, or the base model that it serves, or both. The right
server has the models "base", "shop" (the adapter), "weaker" (the adapter at 0.3 times) and "other".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig

from loraover_serve.judge import names
from loraover_serve.judge.limits import Verdict

from support.plain_adapter import tiny_decoder
from support.tiny_hub import tiny_tokenizer
from support.verified import BASE_OPTIONS, Case, CutCache, Float8Cache, Planted, Served, plant, save_adapter

Body = dict[str, Any]
Ask = Callable[[Body], dict[str, Any]]
"""A server: the answer to a request."""

SHARPER = 8.0
"""Factor on the weights of queries."""

BEGIN = 1
"""Id of the token at the beginning of the text."""


def _asked(change: Callable[[Body], Body]) -> Callable[[Ask], Ask]:
    return lambda ask: lambda body: ask(body | change(body))


def _as_another(model: str, other: str) -> Callable[[Ask], Ask]:
    return _asked(lambda body: {"model": other} if body["model"] == model else {})


def _at_times(ask: Ask) -> Ask:
    """One of five requests for the adapter is answered by the base model."""
    calls = count()

    def answer(body: Body) -> dict[str, Any]:
        forgets = body["model"] == "shop" and next(calls) % 5 == 4
        return ask(body | {"model": "base"}) if forgets else ask(body)

    return answer


def _decoding_with_the_base(ask: Ask) -> Ask:
    """From the second token on, and without the ids of the tokens."""

    def answer(body: Body) -> dict[str, Any]:
        first = ask(body | {"max_tokens": 1})
        (choice,) = first["choices"]
        if body["max_tokens"] > 1:
            (token,) = (int(name.removeprefix("token_id:")) for name in choice["logprobs"]["tokens"])
            rest = {"model": "base", "prompt": [*body["prompt"], token], "max_tokens": body["max_tokens"] - 1}
            choice["logprobs"]["top_logprobs"] += ask(body | rest)["choices"][0]["logprobs"]["top_logprobs"]
        del choice["logprobs"]["tokens"]
        choice.pop("token_ids", None)
        return first

    return answer


def _right(ask: Ask) -> Ask:
    return ask


def save_sharp_base(
    folder: Path, change: Callable[[Any], None] = lambda model: None, family: str = "Llama", **options: Any
) -> Path:
    """A tiny Llama whose attention depends on positions more than that of random weights, with a tokenizer."""
    model = tiny_decoder("Llama", **BASE_OPTIONS)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= SHARPER
        change(model)
    saved = tiny_decoder(family, **BASE_OPTIONS, **options)
    saved.load_state_dict(model.state_dict())
    saved.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def _3_percent_off(model: Any) -> None:
    draw = torch.Generator().manual_seed(3)
    for weight in model.parameters():
        weight *= 1 + 0.03 * torch.randn(weight.shape, generator=draw)


def _without_a_layer(model: Any) -> None:
    """What a layer adds is zero."""
    model.model.layers[1].self_attn.o_proj.weight.zero_()
    model.model.layers[1].mlp.down_proj.weight.zero_()


@dataclass(frozen=True)
class Fault:
    """What is wrong with a server, and what verify must find.

    Args:
        verdict: The verdict.
        name: Name of the fault; None if it has none.
        wrong: Makes a wrong server of a right one.
        listed: Names of the models that the server lists; only servers have others.
        base: Writes the base model that is served into a folder; None for the right one.
        cache: What holds keys and values.
        by_server: Whether it lies in names or generated answers, so that only servers have it.
    """

    verdict: Verdict
    name: str | None = None
    wrong: Callable[[Ask], Ask] = _right
    listed: tuple[str, ...] = ("base", "shop")
    base: Callable[[Path], Path] | None = None
    cache: type[DynamicCache] = DynamicCache
    by_server: bool = False


ANOTHER_THETA = {"rope_type": "default", "rope_theta": 1e6}
FAULTS: Mapping[str, Fault] = {
    "none": Fault("as trained"),
    "temperature": Fault("differs", names.TEMPERATURE, _asked(lambda body: {"temperature": 0.9})),
    "penalty": Fault("differs", names.PENALTY, _asked(lambda body: {"repetition_penalty": 1.3})),
    "one token": Fault("differs", names.ENDS_EARLY, _asked(lambda body: {"max_tokens": 1}), by_server=True),
    "decoding": Fault("differs", names.DECODED, _decoding_with_the_base, by_server=True),
    "weaker in base": Fault("differs", names.IN_BASE, _as_another("base", "weaker")),
    "other in base": Fault("differs", names.UNLIKE, _as_another("base", "other")),
    "other in adapter": Fault("differs", None, _as_another("shop", "other")),
    "intermittent": Fault("differs", names.INTERMITTENT, _at_times),
    "token": Fault("differs", names.EXTRA_TOKEN, _asked(lambda body: {"prompt": [BEGIN, *body["prompt"]]})),
    "theta": Fault(
        "differs",
        names.POSITIONS,
        base=partial(save_sharp_base, rope_parameters=ANOTHER_THETA),
    ),
    "window": Fault("differs", names.WINDOW, base=partial(save_sharp_base, family="Mistral", sliding_window=8)),
    "layer": Fault("differs", names.BASE_LAYERS, base=partial(save_sharp_base, change=_without_a_layer)),
    "weights": Fault("inconclusive", base=partial(save_sharp_base, change=_3_percent_off)),
    "cache": Fault("as trained", cache=Float8Cache),
    "cut cache": Fault("as trained", cache=CutCache),
    "one model": Fault("as trained", wrong=_as_another("base", "shop"), listed=("shop",), by_server=True),
    "SGLang": Fault("differs", names.NOT_APPLIED, _as_another("shop", "base"), by_server=True),
}
"""Faults by a word for each."""


def models(case: Case, scratch: Path) -> dict[str, Path | None]:
    """The models of a right server, by their names; folders of adapters are written to `scratch`."""
    weaker = Planted("", "", {}, lambda found: {k: 0.3 * t if "lora_B" in k else t for k, t in found.items()})
    plain: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}}
    return {
        "base": None,
        "shop": case.adapter,
        "weaker": plant(weaker, case.adapter, scratch / "weaker"),
        "other": save_adapter(scratch / "other", case.base, r=2, lora_alpha=1, target_modules=["o_proj"], **plain),
    }


def right_models(case: Case, scratch: Path) -> Callable[[Fault], Ask]:
    """Makes the right server in this process that a fault is planted in; those with the right base model are one."""
    adapters = models(case, scratch)
    right = Served(case.base, adapters).answer

    def serve(fault: Fault) -> Ask:
        if fault.base is None and fault.cache is DynamicCache:
            return right
        base = case.base if fault.base is None else fault.base(Path(mkdtemp(dir=scratch)))
        return Served(base, adapters, cache=fault.cache).answer

    return serve


def reply(ask: Ask) -> Callable[[Body], bytes]:
    """What a fake server sends, which names the model that it was asked for."""
    return lambda body: json.dumps(ask(body) | {"model": body["model"]}).encode()


class AskedModel:
    """A model that `TorchEngine` runs, whose logits are those that a server computes with."""

    device = torch.device("cpu")
    config = LlamaConfig(vocab_size=torch.iinfo(torch.int32).max)  # so that questions are asked one by one

    def __init__(self, name: str, ask: Ask) -> None:
        self._name, self._ask = name, ask

    def __call__(self, input_ids: torch.Tensor, past_key_values: tuple[int, ...] = (), **_: Any) -> Any:
        (new,) = input_ids.tolist()
        ids = [*past_key_values, *new]
        logits = self._ask({"model": self._name, "prompt": ids, "max_tokens": 1, "all_logits": True})["logits"]
        return SimpleNamespace(logits=logits[None, -len(new) :], past_key_values=tuple(ids))
