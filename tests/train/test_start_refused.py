"""Adapters that a run cannot start from, and recipes that cannot start from one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from loraover.common.errors import ConfigError
from loraover.common.reporter import SILENT
from loraover.training.recipe import load_recipe
from loraover.training.start import pin_start

from support.conversions import load_base
from support.lines import Lines
from support.started import adapter, started
from support.tiny_hub import save_llama, write_recipe
from support.tiny_models import saved, tiny_llama, with_lora

pytestmark = pytest.mark.usefixtures("no_network")


def refused(base: Path, folder: Path, start: Any, **lora: Any) -> str:
    with pytest.raises(ConfigError) as error:
        started(base, folder / "out", start, **lora)
    assert not (folder / "out" / "start.json").exists()
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "full"}, "method full trains no adapter"),
        ({"method": "soma"}, "method soma takes no lora.start_from"),
        ({"method": "lorasc"}, "method lorasc takes no lora.start_from"),
        ({"method": "tensorguide"}, "method tensorguide takes no lora.start_from"),
        ({"trainer": "dpo"}, "trainer dpo compares with the base model without an adapter"),
        ({"trainer": "grpo", "reward_funcs": ["think_format_reward"]}, "or set training.beta to 0"),
        ({"method": "lora", "lora.init_lora_weights": "pissa"}, "both say how A and B start"),
        ({"lora.init_lora_weights": "gaussian"}, "both say how A and B start"),
        ({"method": "lora", "lora.use_dora": True}, "use_dora trains magnitudes"),
        ({"lora.start_from": []}, "at least 1 item"),
        ({"lora.start_from": ["a", "a"]}, "named twice"),
        ({"lora.start_from": {"a": 0}}, "finite numbers other than 0"),
    ],
)
def test_a_recipe_that_contradicts_its_start_is_refused(
    base: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", base, lora={"start_from": "a"})
    with pytest.raises(ConfigError, match=message):
        load_recipe(recipe, changes)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (
            {"target_modules": ["q_proj"]},
            "down_proj and 11 other modules, but this recipe's lora does not: it adapts 2 modules",
        ),
        ({"alpha_pattern": {"q_proj": 0}}, "the scaling of model.layers.0.self_attn.q_proj is 0"),
    ],
)
def test_a_recipe_that_does_not_fit_the_adapter_is_refused(
    base: Path, tmp_path: Path, lora: dict[str, Any], message: str
) -> None:
    assert message in refused(base, tmp_path, adapter(base, tmp_path / "source"), **lora)


@pytest.mark.parametrize("weights", [None, [1, -2]])
def test_an_adapter_with_two_names_is_refused(base: Path, tmp_path: Path, weights: list[float] | None) -> None:
    names = [str(tmp_path / "source"), f"{tmp_path}/./source/"]
    start = names if weights is None else dict(zip(names, weights, strict=True))
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", base, lora={"start_from": start}))
    with pytest.raises(ConfigError, match="are one adapter; name it once"):
        pin_start(recipe, tmp_path, SILENT)


def test_an_adapter_of_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    save_llama(other, intermediate_size=40)
    message = refused(base, tmp_path, adapter(other, tmp_path / "source"))
    assert "by a matrix of shape (32, 40)" in message
    assert f"(32, 48) there, so the adapter belongs to another base model, {other}. Set model to that" in message


def test_another_base_of_the_same_shapes_is_said(base: Path, tmp_path: Path) -> None:
    other, report = save_llama(tmp_path / "other", seed=5), Lines()
    started(base, tmp_path / "out", adapter(other, tmp_path / "source"), report)
    assert f"warning: the adapter was trained on {other}, and this run trains on {base}" in report.lines


def test_adapters_of_two_bases_are_refused(base: Path, tmp_path: Path) -> None:
    other = save_llama(tmp_path / "other", seed=5)
    sources = [adapter(base, tmp_path / "a"), adapter(other, tmp_path / "b")]
    assert "Deltas fit one base model only" in refused(base, tmp_path, sources)


@pytest.mark.parametrize(
    ("lora", "config", "message"),
    [
        ({"bias": "lora_only"}, {}, "bias is 'lora_only'"),
        ({"lora_bias": True}, {}, "lora_bias is True"),
        ({"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}, {}, "modules_to_save is ['lm_head']"),
        ({}, {"init_lora_weights": "corda"}, "corda"),
        ({}, {"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING adapter cannot become a LoRA"),
    ],
)
def test_an_adapter_that_is_more_than_a_and_b_is_refused(
    tmp_path: Path, lora: dict[str, Any], config: dict[str, Any], message: str
) -> None:
    base = tmp_path / "base"
    saved(tiny_llama(attention_bias=True), base)
    source = adapter(base, tmp_path / "source", **lora)
    file = source / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    found = refused(base, tmp_path, source)
    assert found.startswith("lora.start_from: ")
    assert message in found


def test_untrained_damaged_and_absent_adapters_are_refused(base: Path, tmp_path: Path) -> None:
    zero = tmp_path / "zero"
    with_lora(load_base(base), draw_b=False).save_pretrained(zero)
    assert "is zero in every module; train it first" in refused(base, tmp_path, zero)
    nan = adapter(base, tmp_path / "nan")
    tensors = load_file(nan / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = math.nan
    save_file(tensors, nan / "adapter_model.safetensors")
    assert "NaN" in refused(base, tmp_path, nan)
    assert "no such folder" in refused(base, tmp_path, tmp_path / "absent")
