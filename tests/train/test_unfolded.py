"""The unfolded model: cores applied to activations, and a base model left as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from loraover import LoraOverConfig, read_checkpoint
from loraover.checkpoint.peft_adapter import site_key
from loraover.common.errors import CheckpointError
from loraover.overparam.decompositions import DECOMPOSITIONS
from loraover.reference import unfolded

from support.apple import apple_gpu
from support.make_checkpoint import (
    EMBEDDING,
    LINEAR,
    Made,
    edit_tensors,
    logits,
    make_checkpoint,
    oracle_matrices,
    reseal,
)
from support.tiny_models import hooks, tiny_gpt2, tiny_llama
from support.versions import needs_meta_models

# Both models compute in float64. A forward of two layers runs through fewer than 1000 rounded operations, on
# numbers below 10: 1000 * 2^-53 * 10 = 1e-12. What is seen is 1e-15.
TOLERANCE = 1e-12
LORA: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": LINEAR},
    "rslora": {"use_rslora": True, "r": 2},
    "patterns": {"target_modules": LINEAR, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 32}},
    "embedding": {"target_modules": EMBEDDING},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "tied embedding": {"target_modules": EMBEDDING, "base_options": {"tie_word_embeddings": True}},
    "lora_bias": {"lora_bias": True},
    "bias": {"bias": "all", "base_options": {"attention_bias": True}},
    "modules_to_save": {"modules_to_save": ["lm_head", "norm"]},
    "saved embedding": {"modules_to_save": ["embed_tokens"]},
    "dropout": {"lora_dropout": 0.5},
}


def load_base(made: Made) -> Any:
    return AutoModelForCausalLM.from_pretrained(made.base, dtype=made.model.dtype).eval()


def weights(model: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def largest_difference(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    return float((one - other).abs().max())


@pytest.fixture
def no_contraction(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever forms A or B from cores fails."""

    def contract(*_: Any) -> Tensor:
        pytest.fail("the unfolded model formed a matrix")

    for kind in DECOMPOSITIONS.values():
        monkeypatch.setattr(kind, "contract", contract)


@pytest.mark.parametrize(
    ("lora", "decomposition"), [*((lora, "mpo") for lora in LORA), *(("embedding", name) for name in DECOMPOSITIONS)]
)
def test_it_computes_what_the_training_model_does_and_never_forms_a_or_b(
    lora: str, decomposition: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    config = LoraOverConfig(decomposition=decomposition, seed=5)
    made = make_checkpoint(tmp_path, config=config, dtype=torch.float64, **LORA[lora])
    base, checkpoint = load_base(made), read_checkpoint(made.path)
    request.getfixturevalue("no_contraction")
    with unfolded(base, checkpoint) as model:
        found = logits(model)
    assert found.dtype == torch.float64
    assert largest_difference(found, made.logits()) < TOLERANCE
    assert largest_difference(logits(base), made.logits()) > 1e-3  # the adapter does something


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_its_delta_is_exact_beside_a_float32_model(decomposition: str, tmp_path: Path) -> None:
    """Many cores in float32 would add an error of their own, which no folded adapter has.

    The delta is that of the oracle's matrices in float64, and only the sum with W x is rounded to float32.
    """
    made = make_checkpoint(tmp_path, config=LoraOverConfig(decomposition=decomposition, seed=5))
    base, matrices = load_base(made), oracle_matrices(made.path)
    seen: list[tuple[Tensor, Tensor]] = []
    module = "model.layers.1.self_attn.v_proj"
    with unfolded(base, read_checkpoint(made.path)) as model:
        layer: Any = model.get_submodule(module)
        layer.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
        logits(model)
    ((x, found),) = seen
    a, b = (torch.from_numpy(matrices[site_key(f"{module}.lora_{matrix}")]) for matrix in "AB")
    exact = torch.nn.functional.linear(x, layer.weight).double() + 2 * x.double() @ a.mT @ b.mT
    assert found.dtype == torch.float32
    # one rounding, and room for float64's own
    assert bool(((found.double() - exact).abs() <= 2.0**-24 * 1.0001 * exact.abs() + 1e-13).all())


def test_the_cpu_computes_what_an_apple_gpu_cannot(tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path, lora_bias=True)
    base = load_base(made)
    layer = base.get_submodule("model.layers.0.self_attn.q_proj")
    x = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), unfolded(base, read_checkpoint(made.path)):
        expected = layer(x)
        with apple_gpu(base):
            found = layer(x.to("mps"))
            assert found.device == torch.device("mps")
    assert torch.equal(found, expected)


def test_sites_without_cores_keep_their_matrices(tmp_path: Path) -> None:
    config = LoraOverConfig(sites=["*.layers.0.*.lora_A", "*.v_proj.lora_B"], seed=5)
    made = make_checkpoint(tmp_path, config=config, dtype=torch.float64)
    checkpoint = read_checkpoint(made.path)
    assert 0 < len(checkpoint.sites) < len(checkpoint.matrices)
    with unfolded(load_base(made), checkpoint) as model:
        assert largest_difference(logits(model), made.logits()) < TOLERANCE


@pytest.mark.parametrize("ending", [None, ValueError, KeyboardInterrupt])
def test_the_base_model_is_as_before(ending: type[BaseException] | None, tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path, modules_to_save=["lm_head", "norm"])
    base, checkpoint = load_base(made), read_checkpoint(made.path)
    before, expected, identities = weights(base), logits(base), [id(p) for p in base.parameters()]
    try:
        with unfolded(base, checkpoint) as model:
            assert model is base
            assert hooks(base) == 4
            assert not torch.equal(logits(model), expected)
            if ending is not None:
                raise ending
    except (ValueError, KeyboardInterrupt):
        pass
    assert hooks(base) == 0
    assert [id(p) for p in base.parameters()] == identities
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())
    assert torch.equal(logits(base), expected)


WRONG_BASES: dict[str, tuple[Any, str]] = {
    "fewer heads": (lambda: tiny_llama(num_key_value_heads=1), r"v_proj maps 32 to 8 features .* but 32 to 16"),
    "other names": (tiny_gpt2, r"GPT2LMHeadModel\) has no module 'model\.layers\.0\.self_attn\.[qv]_proj'"),
}


@pytest.mark.parametrize("case", WRONG_BASES)
def test_another_base_model_is_refused_and_left_as_it_was(case: str, tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path)
    make, message = WRONG_BASES[case]
    base = make()
    before = weights(base)
    with pytest.raises(CheckpointError, match=message) as caught, unfolded(base, read_checkpoint(made.path)):
        pytest.fail("the block ran")
    assert str(made.path) in str(caught.value)
    assert str(made.base) in str(caught.value)  # the model to use instead
    assert hooks(base) == 0
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())


def test_a_base_model_is_restored_when_a_later_parameter_fits_nowhere(tmp_path: Path) -> None:
    """`lm_head.weight` fits and comes first in the file; `z.weight` fits nothing."""
    made = make_checkpoint(tmp_path, modules_to_save=["lm_head"])

    def add(tensors: dict[str, Tensor]) -> None:
        tensors["base_model.model.z.weight"] = torch.ones(2, 2)

    edit_tensors(made.path / "adapter_model.safetensors", add)
    reseal(made.path)
    base = load_base(made)
    before = weights(base)
    checkpoint = read_checkpoint(made.path)
    with pytest.raises(CheckpointError, match=r"z\.weight fits no parameter"), unfolded(base, checkpoint):
        pytest.fail("the block ran")
    assert [name for name, p in base.named_parameters() if not torch.equal(p, before[name])] == []
    assert hooks(base) == 0


@needs_meta_models
def test_cores_follow_the_base_model_to_its_device(tmp_path: Path) -> None:
    """The meta device stands for a GPU: it refuses to mix with tensors of the CPU, and needs no hardware."""
    made = make_checkpoint(tmp_path, modules_to_save=["lm_head"], lora_bias=True)
    base = load_base(made).to("meta")
    ids = torch.zeros(1, 5, dtype=torch.long, device="meta")
    expected = base(input_ids=ids).logits
    with unfolded(base, read_checkpoint(made.path)) as model:
        found = model(input_ids=ids).logits
    assert (found.shape, found.device) == (expected.shape, expected.device)
