"""Method tensorguide: A and B from one tensor train, its gradients, the run, and the plain LoRA that it leaves."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.func import functional_call

import loraover
from loraover.checkpoint.peft_adapter import read_adapter_dir
from loraover.overparam.sites import lora_layers
from loraover.training.plan import make_plan
from loraover.training.recipe import load_recipe
from loraover.training.run_result import read_run
from loraover_export import export_vllm
from loraover_lab.methods.layers import get_pair
from loraover_lab.methods.tensorguide import CoreLayout, TensorGuideSettings, contract, draw_cores, make_layout, split

from oracles.methods import guided_pair, train_operands
from support.make_checkpoint import numpy64
from support.methods import PREFIX, RANK, started
from support.resumed_run import assert_resumes
from support.tiny_hub import write_recipe
from support.tiny_models import tiny_gpt2, tiny_llama, tiny_t5, token_ids
from support.trained_run import loss, matrices

pytestmark = [pytest.mark.process, pytest.mark.usefixtures("no_network")]


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, with its checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    loraover.train(make(folder / "tensorguide.yaml", base), folder / "whole")
    return folder / "whole"


guided = partial(started, "tensorguide", tt_rank=2)


def make(path: Path, base: Path, **settings: Any) -> Path:
    settings = {"tt_rank": 2} | settings
    return write_recipe(path, base, method="tensorguide", tensorguide=settings, evaluation={"exact_match": False})


def drawn(
    r: int, in_features: int, out_features: int, seed: int = 0, **settings: Any
) -> tuple[CoreLayout, Any, list[Any]]:
    """Layout, input and cores of one module, float64."""
    layout = make_layout(TensorGuideSettings(**settings), "q_proj", r, in_features, out_features)
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn([2] * len(layout.modes), generator=generator, dtype=torch.float64)
    return layout, z, draw_cores(layout, z, generator)


SHAPES = [
    ((4, 32, 16), {"tt_rank": 2}),
    ((3, 20, 35), {"tt_rank": 3, "cores": 2}),
    ((1, 30, 42), {"tt_rank": 1, "cores": 5}),
    ((8, 24, 40), {"tt_rank": 3, "cores": 3}),
]


@pytest.mark.parametrize(("shape", "settings"), SHAPES)
def test_the_contraction_equals_the_oracle(shape: tuple[int, int, int], settings: dict[str, int]) -> None:
    (layout, *first), (_, *second) = (drawn(*shape, seed, **settings) for seed in (0, 1))
    cores = [torch.stack(pair) for pair in zip(first[1], second[1], strict=True)]
    assert all(mode > 1 for mode in layout.modes)
    pair = split(contract(cores, torch.stack([first[0], second[0]])), layout)
    for g, (z, own) in enumerate((first, second)):
        a, b = guided_pair(z.numpy(), [core.numpy() for core in own], *shape[:2])
        np.testing.assert_allclose(numpy64(pair.a[g]), a, rtol=0, atol=1e-13)
        np.testing.assert_allclose(numpy64(pair.b[g]), b, rtol=0, atol=1e-13)


def test_the_first_a_has_the_variance_of_pefts() -> None:
    squares = []
    for seed in range(40):
        layout, z, cores = drawn(8, 576, 576, seed)
        a = split(contract([core[None] for core in cores], z[None]), layout).a
        squares.append(float(a.square().mean()))
    assert np.mean(squares) * 3 * 576 == pytest.approx(1, rel=0.25)


@pytest.mark.parametrize(
    ("make_base", "task"), [(tiny_llama, "CAUSAL_LM"), (tiny_gpt2, "CAUSAL_LM"), (tiny_t5, "SEQ_2_SEQ_LM")]
)
def test_the_start_keeps_the_models_function_with_both_factors_alive(make_base: Any, task: str) -> None:
    inputs = {"input_ids": token_ids()} | ({"labels": token_ids(1)} if task == "SEQ_2_SEQ_LM" else {})
    expected = make_base()(**inputs).logits
    model, method = guided(make_base(), task=task)
    assert torch.allclose(model(**inputs).logits, expected, atol=1e-5)  # PEFT's sums of T5 round differently
    for trains in method.trains:
        shape = trains.layout
        for g, layer in enumerate(trains.layers):
            cores = [numpy64(core[g]) for core in trains.cores]
            a, b = guided_pair(numpy64(trains.inputs[g]), cores, shape.r, shape.in_features)
            np.testing.assert_allclose(numpy64(get_pair(layer).a), a, rtol=0, atol=1e-6)
            assert not get_pair(layer).b.any()
            assert min(np.abs(a).max(), np.abs(b).max()) > 1e-2


SEEDS: list[dict[str, Any]] = [{}, {}, {"input_seed": 7}]


def test_modules_have_inputs_and_cores_of_their_own_by_the_seeds() -> None:
    (_, first), (_, again), (_, other) = (guided(tiny_llama(), **s) for s in SEEDS)
    q, q_again, q_other = (method.trains[0] for method in (first, again, other))
    assert len(q.layers) == 4  # q_proj and o_proj of two layers
    assert not torch.equal(q.inputs[0], q.inputs[1])
    assert not torch.allclose(q.cores[1][0], q.cores[1][1])
    assert torch.equal(q.inputs, q_again.inputs)
    assert torch.equal(q.cores[0], q_again.cores[0])
    assert not torch.equal(q.inputs, q_other.inputs)


def test_a_step_over_micro_batches_is_that_of_autograd_through_the_trains() -> None:
    model, method = guided(tiny_llama().double())
    optimizer = method.attach(torch.optim.SGD(method.trained(), lr=0.5))
    with torch.no_grad():
        for trains in method.trains:  # else B is zero, and so is the gradient of A
            for core in trains.cores:
                core.mul_(1.25)
            trains.write()
    before = [core.detach().clone().requires_grad_() for core in method.trained()]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    cores, values = iter(before), {}
    for trains in method.trains:
        own = [next(cores) for _ in trains.layout.modes]
        r, at = trains.layout.r, trains.layout.r * trains.layout.in_features
        for g in range(len(trains.layers)):
            operands = ([core[g] for core in each] for each in (own, trains.first))
            now, first = (torch.einsum(*train_operands(trains.inputs[g], each)).flatten() for each in operands)
            values[names[id(trains.factors("A")[g])]] = now[:at].reshape(-1, r).mT
            values[names[id(trains.factors("B")[g])]] = (now - first)[at:].reshape(r, -1).mT
    batches = [token_ids(seed) for seed in (0, 1)]
    for ids in batches:
        model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    losses = [functional_call(model, values, kwargs={"input_ids": ids, "labels": ids}).loss for ids in batches]
    gradients = torch.autograd.grad(sum(losses), before)
    for core, old, gradient in zip(method.trained(), before, gradients, strict=True):
        assert gradient.abs().max() > 1e-6
        torch.testing.assert_close(core.detach(), old.detach() - 0.5 * gradient, rtol=1e-9, atol=1e-12)
    for trains in method.trains:
        assert all(b.any() for b in trains.factors("B"))  # written after the step


def test_the_result_is_what_the_cores_give_rounded_once(whole: Path) -> None:
    kept = load_file(whole / "trainer" / "checkpoint-4" / "tensorguide.safetensors")
    served = matrices(whole)
    model, method = guided(tiny_llama())
    assert {a.shape for key, a in served.items() if "lora_A" in key} == {(RANK, 32), (RANK, 48)}
    paths = {id(layer): path for path, layer in lora_layers(model).items()}
    for n, trains in enumerate(method.trains):
        r, width, modes = trains.layout.r, trains.layout.in_features, range(len(trains.layout.modes))
        for g, layer in enumerate(trains.layers):
            z = numpy64(kept[f"{n}.inputs"][g])
            (a, b), (_, b0) = (
                guided_pair(z, [numpy64(kept[f"{n}.{name}.{k}"][g]) for k in modes], r, width)
                for name in ("cores", "first")
            )
            found = [numpy64(served[f"{PREFIX}{paths[id(layer)]}.lora_{name}.weight"]) for name in "AB"]
            np.testing.assert_allclose(found[0], a, rtol=2.0**-24, atol=1e-14)
            np.testing.assert_allclose(found[1], b - b0, rtol=2.0**-24, atol=1e-14)
            assert np.linalg.matrix_rank(found[1] @ found[0], tol=1e-6) == RANK


def test_the_result_is_a_smaller_training_of_a_plain_lora(base: Path, whole: Path, tmp_path: Path) -> None:
    adapter = read_adapter_dir(whole / "adapter")
    adapter.check_keeps_base()
    assert (adapter.config.r, adapter.config.scaling("any")) == (RANK, 2.0)
    result = read_run(whole)
    plan = make_plan(load_recipe(whole / "recipe.yaml"))
    assert (result.served_rank, result.served_error) == (RANK, None)
    assert 0 < result.trained_parameters < result.lora_parameters // 2
    assert result.facts()["parameters trained"] == f"{result.trained_parameters:,}"
    assert (plan.cores, plan.optimizer_states) == (4 * result.trained_parameters, 8 * result.trained_parameters)
    assert plan.gradients == plan.adapter + plan.cores
    assert plan.adapter == 4 * result.lora_parameters == result.served_bytes
    assert loss(result.after) < loss(result.before)
    assert export_vllm(whole / "adapter", tmp_path / "vllm", model=base).passed


def test_a_run_that_was_killed_resumes_to_the_same_bits(whole: Path, tmp_path: Path) -> None:
    assert_resumes(whole, tmp_path / "middle", 4)
    assert_resumes(whole, tmp_path / "end")


def test_a_bond_is_no_wider_than_full() -> None:
    layout = make_layout(TensorGuideSettings(tt_rank=8, cores=6), "q_proj", 8, 576, 576)
    assert layout.bonds == (1, 8, 8, 8, 8, 8, 1)
    assert make_layout(TensorGuideSettings(tt_rank=16, cores=6), "q_proj", 8, 576, 576).bonds[1] == 2 * layout.modes[0]
