"""The LoRA that a method serves gives the function that was trained, but for the error in `run.json`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

import loraover
from loraover.overparam.sites import lora_layers
from loraover.training.method_table import METHODS
from loraover.training.run_result import read_run
from loraover_lab.methods.layers import get_pair, get_weight

from oracles.methods import Matrix
from support.make_checkpoint import numpy64
from support.methods import started
from support.tiny_hub import write_recipe
from support.tiny_models import fill_b, tiny_gpt2, tiny_llama

pytestmark = [pytest.mark.process, pytest.mark.usefixtures("no_network")]

SETTINGS: dict[str, dict[str, Any]] = {
    "soma": {"frozen_blocks": 0},
    "lorasc": {"stages": 2, "pace": 1.0, "noise": 0.0},
    "tensorguide": {"tt_rank": 2},
}
"""Of LoRASC, what is served is what the last stage trains if nothing is averaged and there is no noise."""

PATTERNS = {
    tiny_llama: {"rank_pattern": {"q_proj": 2, "down_proj": 1}, "alpha_pattern": {"down_proj": 7, "v_proj": 3}},
    tiny_gpt2: {"rank_pattern": {"c_attn": 2, "c_fc": 1}, "alpha_pattern": {"mlp.c_proj": 7, "c_fc": 3}},
}


def function_of(model: nn.Module) -> dict[str, Matrix]:
    """What each adapted module multiplies with: its present base weight and scaling * B A, in float64."""
    found = {}
    for path, layer in lora_layers(model).items():
        b, a = map(numpy64, get_pair(layer))
        found[path] = numpy64(get_weight(layer)) + layer.scaling["default"] * b @ a
    return found


def distance(first: dict[str, Matrix], second: dict[str, Matrix]) -> float:
    """Frobenius norm of the difference, over all modules."""
    assert first.keys() == second.keys()
    return math.sqrt(sum(float(((first[path] - second[path]) ** 2).sum()) for path in first))


def base_weights(model: nn.Module) -> dict[str, Matrix]:
    return {path: numpy64(get_weight(layer)).copy() for path, layer in lora_layers(model).items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", list(SETTINGS))
def test_a_run_serves_what_it_trained(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, precision: str
) -> None:
    trained: list[dict[str, Matrix]] = []
    method: Any = METHODS[name]

    class Watched(method):
        def finish(self, model: PeftModel) -> float | None:
            trained.append(function_of(model))
            return super().finish(model)  # type: ignore[no-any-return]

    monkeypatch.setitem(METHODS, name, Watched)
    parts: dict[str, Any] = {"method": name, name: SETTINGS[name], "evaluation": {"exact_match": False}}
    parts |= {"lora": {} if name == "tensorguide" else PATTERNS[tiny_llama], "training": {"bf16": precision == "bf16"}}
    loraover.train(write_recipe(tmp_path / "r.yaml", base, **parts), tmp_path / "out")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    served = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=dtype), str(tmp_path / "out" / "adapter")
    )
    assert {get_weight(layer).dtype for layer in lora_layers(served).values()} == {dtype}
    error, found = read_run(tmp_path / "out").served_error, distance(trained[0], function_of(served))
    change = distance(function_of(served), base_weights(served))
    assert change > 0.1
    if name == "tensorguide":  # whose A and B are those of the last step, but for the roundings of its contraction
        assert error is None
        assert found < 1e-5 * change
        return
    assert error == pytest.approx(found, rel=1e-6)
    assert (error or 0) > (1e-3 if precision == "bf16" else 1e-8)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("make_base", list(PATTERNS))
@pytest.mark.parametrize(("name", "rank"), [("soma", None), ("lorasc", None), ("lorasc", 3)])
def test_patterns_rslora_and_transposed_weights_are_served_as_trained(
    tmp_path: Path, name: str, make_base: Any, use_rslora: bool, rank: int | None
) -> None:
    options = {f"lora.{key}": value for key, value in PATTERNS[make_base].items()} | {"lora.use_rslora": use_rslora}
    settings = SETTINGS[name] | ({} if rank is None else {"rank": rank})
    model, method = started(name, make_base(), options=options, **settings)
    if name == "lorasc":
        fill_b(model, seed=1)
        method.end_stage()
        method.begin_fast_lora()
        method.set_base()
        fill_b(model, seed=2)
    else:
        generator = torch.Generator().manual_seed(1)
        for layer in lora_layers(model).values():
            b, _ = get_pair(layer)
            b += 0.1 * torch.randn(b.shape, generator=generator)
    assert len({(layer.r["default"], layer.scaling["default"]) for layer in lora_layers(model).values()}) >= 3
    trained = function_of(model)
    error = method.finish(model)
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    served = PeftModel.from_pretrained(make_base(), str(tmp_path))
    assert error == pytest.approx(distance(trained, function_of(served)), rel=1e-6 if rank is None else 1e-3)
    change = distance(function_of(served), base_weights(served))
    assert change > 0.1
    assert error < 1e-5 if rank is None else 0.01 * change < error < change
