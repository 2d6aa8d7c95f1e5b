"""Method soma: the split of the base weights, the run, and its plain LoRA on the original base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

import loraover
from loraover.checkpoint.peft_adapter import read_adapter_dir
from loraover.common.errors import ConfigError
from loraover.training.run_result import read_run
from loraover_lab.methods.layers import get_weight, linear_layers
from loraover_lab.methods.soma import find_blocks, split

from oracles.methods import minor_part, soma
from support.make_checkpoint import numpy64
from support.methods import PREFIX, RANK, SCALING, started, watched_steps
from support.resumed_run import assert_resumes
from support.tiny_hub import write_recipe
from support.tiny_models import tiny_gpt2, tiny_llama, token_ids
from support.trained_run import loss, matrices

pytestmark = [pytest.mark.process, pytest.mark.usefixtures("no_network")]


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, with its checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    loraover.train(make(folder / "soma.yaml", base), folder / "whole")
    return folder / "whole"


def make(path: Path, base: Path, **parts: Any) -> Path:
    settings = {"method": "soma", "soma": {"frozen_blocks": 1}, "evaluation": {"exact_match": False}}
    return write_recipe(path, base, **(settings | parts))


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
def test_the_split_is_the_part_of_the_smallest_singular_values(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    b, a = split(weight, 2, scaling=0.5)
    assert (b.shape, a.shape) == ((shape[0], 2), (2, shape[1]))
    np.testing.assert_allclose(0.5 * numpy64(b @ a), minor_part(numpy64(weight), 2), rtol=0, atol=1e-11)
    torch.testing.assert_close((b**2).sum(0), (a**2).sum(1))  # each factor has a root of the singular values


@pytest.mark.parametrize("make_base", [tiny_llama, tiny_gpt2])
def test_the_start_keeps_the_models_function_and_changes_its_weights(make_base: Any) -> None:
    base: PreTrainedModel = make_base()
    expected, weights = base(token_ids()).logits, {n: p.clone() for n, p in base.named_parameters()}
    model, method = started("soma", base)
    assert torch.allclose(model(token_ids()).logits, expected, atol=1e-5)
    layers = linear_layers(model, "soma")
    assert len(layers) >= 4
    for path, layer in layers.items():
        old = numpy64(weights[f"{path}.weight"] if make_base is tiny_llama else weights[f"{path}.weight"].mT)
        np.testing.assert_allclose(numpy64(get_weight(layer)), old - minor_part(old, RANK), rtol=0, atol=1e-6)
    assert 0 < (method.finish(model) or 0) < 1e-5
    base_parameters = {n: p for n, p in model.named_parameters() if "lora_" not in n}
    assert all(
        torch.equal(p, weights[n.replace(".base_layer", "").removeprefix(PREFIX)]) for n, p in base_parameters.items()
    )


def test_the_result_is_the_exact_update_of_the_original_base(base: Path, whole: Path) -> None:
    weights = load_file(base / "model.safetensors")
    trained = load_file(whole / "trainer" / "checkpoint-4" / "adapter_model.safetensors")
    served = matrices(whole)
    paths = {key.removeprefix(PREFIX).removesuffix(".lora_A.weight") for key in served if "lora_A" in key}
    assert len(paths) == 7
    assert all(path.startswith("model.layers.1.") for path in paths)  # the first of two blocks is frozen
    for path in paths:
        a, b, wide_a, wide_b = (
            numpy64(tensors[f"{PREFIX}{path}.lora_{name}.weight"]) for tensors in (trained, served) for name in "AB"
        )
        assert (len(a), len(wide_a)) == (RANK, 2 * RANK)
        expected = soma(numpy64(weights[f"{path}.weight"]), a, b, SCALING)
        assert np.abs(expected).max() > 1e-3
        np.testing.assert_allclose(SCALING * wide_b @ wide_a, expected, rtol=0, atol=1e-6)


def test_the_result_is_a_plain_lora_that_was_measured(whole: Path) -> None:
    adapter = read_adapter_dir(whole / "adapter")
    adapter.check_keeps_base()
    assert (adapter.config.r, adapter.config.scaling("any")) == (2 * RANK, SCALING)
    result = read_run(whole)
    assert result.served_rank == 2 * RANK
    assert result.served_bytes == 4 * sum(tensor.numel() for tensor in matrices(whole).values())
    assert result.trained_parameters == result.lora_parameters // 2
    assert 0 < (result.served_error or 0) < 1e-5
    assert loss(result.after) < loss(result.before)


def test_a_run_that_was_killed_resumes_to_the_same_bits(whole: Path, tmp_path: Path) -> None:
    assert_resumes(whole, tmp_path / "resumed", 4)


def test_the_weight_decay_of_a_run_falls_along_a_cosine(base: Path, tmp_path: Path) -> None:
    found: list[set[float]] = []

    def watch(_: Any, optimizer: Any, is_taken: bool) -> None:
        if not is_taken:
            found.append({group["weight_decay"] for group in optimizer.param_groups})

    with watched_steps(watch):
        loraover.train(make(tmp_path / "r.yaml", base), tmp_path / "out")
    assert all(len(step) == 1 for step in found)
    expected = 1e-5 + (0.05 - 1e-5) * (1 + np.cos(np.pi * np.arange(4) / 4)) / 2
    np.testing.assert_allclose([step.pop() for step in found], expected, rtol=1e-12)


def test_a_third_of_the_blocks_is_frozen_by_default() -> None:
    base = tiny_llama(num_hidden_layers=7)
    assert find_blocks(base) == ("model.layers", 7)
    model, _ = started("soma", base)
    assert {path.split(".")[2] for path in linear_layers(model, "soma")} == {"2", "3", "4", "5", "6"}


def test_a_weight_that_two_modules_share_is_refused() -> None:
    base = tiny_llama(tie_word_embeddings=True)
    with pytest.raises(ConfigError, match="lm_head shares its weight"):
        started("soma", base, options={"lora.target_modules": ["lm_head"]})
