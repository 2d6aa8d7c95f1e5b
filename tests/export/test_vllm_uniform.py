"""The adapter for vLLM says the same as its source: one rank, scaling 1, each element rounded once."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file
from torch import Tensor

from loraover.adapters.numerics.delta import scale
from loraover.adapters.uniform.folder import name_modules, uniform_config, write_uniform
from loraover.checkpoint.exact_tensors import ExactArray
from loraover.checkpoint.peft_adapter import read_adapter_dir
from loraover.common.errors import ExportError
from loraover.models.load import ModelSource

from oracles.contraction import Array
from strategies import SEEDS, normal
from support.faults import Rounding
from support.make_checkpoint import nearest, numpy64
from support.plain_adapter import write_adapter
from support.speed import examples
from tolerances import UNIT, gamma

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BASE = ModelSource("owner/base", "owner/base", None, "hub owner/base")
MODULES = ("model.layers.0.q_proj", "model.layers.1.q_proj", "model.layers.0.up_proj")


def matrices(seed: int, ranks: tuple[int, ...], dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """A (r, 7) and B (5, r) of each module."""
    return {
        module: (normal(seed + k, r, 7).to(dtype), normal(seed + k + 100, 5, r).to(dtype))
        for k, (module, r) in enumerate(zip(MODULES, ranks, strict=True))
    }


def written(source: Path, output: Path, dtype: str) -> tuple[dict[str, Tensor], dict[str, Any], list[Any]]:
    adapter = read_adapter_dir(source)
    output.mkdir()
    config = uniform_config(adapter, BASE, name_modules(MODULES, ["model", "model.layers.1.up_proj"]))
    certificates = write_uniform(adapter, output, dtype, config)
    tensors = load_file(output / "adapter_model.safetensors")
    return tensors, json.loads((output / "adapter_config.json").read_text()), certificates


def pair(tensors: dict[str, Tensor], module: str) -> tuple[Array, Array]:
    a, b = (tensors[f"base_model.model.{module}.lora_{kind}.weight"] for kind in "AB")
    return numpy64(a), numpy64(b)


def padded(matrix: Array, rows: int, columns: int) -> Array:
    result = np.zeros((rows, columns))
    result[: matrix.shape[0], : matrix.shape[1]] = matrix
    return result


RANKS = st.tuples(*[st.integers(1, 6)] * 3)
ALPHAS = st.one_of(st.integers(1, 64), st.floats(0.01, 100), st.just(0))


@examples(60)
@given(
    seed=SEEDS,
    ranks=RANKS,
    alpha=ALPHAS,
    other=ALPHAS,
    rslora=st.booleans(),
    stored=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    dtype=st.sampled_from(list(DTYPES)),
)
def test_delta_is_the_sources(
    seed: int, ranks: tuple[int, ...], alpha: float, other: float, rslora: bool, stored: torch.dtype, dtype: str
) -> None:
    """Every element is the oracle's bit for bit, and B' A' is scaling * B A to the two roundings."""
    with TemporaryDirectory() as scratch:
        source = write_adapter(
            Path(scratch) / "in",
            matrices(seed, ranks, stored),
            r=ranks[0],
            lora_alpha=alpha,
            rank_pattern={"layers.1.q_proj": ranks[1], "up_proj": ranks[2]},
            alpha_pattern={"up_proj": other},
            use_rslora=rslora,
        )
        tensors, config, certificates = written(source, Path(scratch) / "out", dtype)
        original = load_file(source / "adapter_model.safetensors")
    r = max(ranks)
    assert config["r"] == config["lora_alpha"] == r
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert all(tensor.dtype == DTYPES[dtype] for tensor in tensors.values())
    assert all(certificate.passed for certificate in certificates)
    assert len(certificates) == len(tensors) == 6
    for module, rank, chosen in zip(MODULES, ranks, (alpha, alpha, other), strict=True):
        scaling = chosen / (np.sqrt(rank) if rslora else rank)
        a, b = pair(original, module)
        found_a, found_b = pair(tensors, module)
        np.testing.assert_array_equal(found_a, padded(nearest(a, dtype), r, 7))
        np.testing.assert_array_equal(found_b, padded(nearest(scaling * b, dtype), 5, r))
        u, tiny = UNIT[DTYPES[dtype]], 2.0**-25 if dtype == "fp16" else 2.0**-100
        sides = (1 + u) ** 2 - 1 + gamma(2 * r, UNIT[torch.float64])
        bound = sides * abs(scaling * b) @ abs(a) + tiny * (abs(a).sum(0) + abs(scaling * b).sum(1)[:, None] + r)
        assert (abs(found_b @ found_a - scaling * b @ a) <= bound).all()


def test_the_certificate_rejects_padding_that_is_not_zero(tmp_path: Path, wrong_rounding: Rounding) -> None:
    def wrong(matrix: Tensor) -> Tensor:
        matrix[-1, -1] = torch.nextafter(matrix[-1, -1], torch.tensor(9.0, dtype=matrix.dtype))
        return matrix

    source = write_adapter(
        tmp_path / "in", matrices(5, (4, 2, 3), torch.float32), rank_pattern={"layers.1.q_proj": 2, "up_proj": 3}
    )
    wrong_rounding(wrong)
    _, _, certificates = written(source, tmp_path / "out", "fp32")
    assert not all(certificate.passed for certificate in certificates)


def test_the_bound_of_a_scaled_matrix_covers_the_contractions_error() -> None:
    value, bound = normal(6, 4, 4), normal(7, 4, 4).abs()
    result = scale(ExactArray(value.numpy(), bound.numpy(), None), -0.3).tensors()
    assert (result.bound >= 0.3 * bound).all()
    assert (result.bound <= 0.3 * bound + 2.0**-52 * result.value.abs() + 1e-300).all()


PATHS = st.lists(st.sampled_from("ab"), min_size=1, max_size=4).map(".".join)


@examples(300)
@given(st.sets(PATHS, min_size=1, max_size=8), st.sets(PATHS, max_size=8))
def test_peft_resolves_the_names_to_exactly_the_adapted_modules(adapted: set[str], others: set[str]) -> None:
    others -= adapted
    try:
        names = name_modules(adapted, others)
    except ExportError:
        assert any(other.endswith(f".{path}") for path in adapted for other in others)
        return
    config = LoraConfig(target_modules=names)
    assert {path for path in adapted | others if check_target_module_exists(config, path)} == adapted


def test_names_are_as_short_as_they_can_be() -> None:
    layers = [f"model.layers.{k}.{name}" for k in (1, 11) for name in ("q_proj", "k_proj")]
    assert name_modules(layers, ["model", "lm_head"]) == ["k_proj", "q_proj"]
    assert name_modules(layers[:1], layers[1:]) == ["1.q_proj"]
