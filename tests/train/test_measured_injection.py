"""Bases are measured whenever sites get their cores: in rounds, by choice, under a quantised model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from loraover import Budget, LoraOverConfig, OverParameterization, Probe
from loraover.common.errors import ConfigError
from loraover.overparam.block_bases import Side

from support.hf_trainer import llama
from support.measured import BATCHES, LAYER, MEASURED, Recorded, assert_diagonalises, basis_of, measured
from support.tiny_models import lora_matrices, tiny_llama, tiny_net, token_ids, trainable, with_lora


def test_a_dynamic_schedule_measures_when_it_injects() -> None:
    """With bases that q, k and v share, and moments that are carried into them."""
    model = llama()
    config = LoraOverConfig(
        decomposition="eigen",
        options=MEASURED,
        schedule="dynamic",
        budget=Budget(fraction=1.0),
        rounds=2,
        start=0.3,
        end=0.6,
        quota="global",
    )
    over = OverParameterization(model, config, steps=10, probe=Probe(model, BATCHES))
    over.attach(optimizer := AdamW(trainable(model), lr=1e-2))
    recorded: dict[int, Recorded] = {}
    for step in range(8):
        batch = token_ids(50 + step)
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        before = lora_matrices(model)
        optimizer.step()
        assert not any(torch.equal(matrix, before[key]) for key, matrix in lora_matrices(model).items())
        if len(over.schedule.rounds) > len(recorded):
            recorded[over.step] = Recorded(model, BATCHES)
    assert list(recorded) == [held.step for held in over.schedule.rounds] == [3, 6]
    for held, found in zip(over.schedule.rounds, recorded.values(), strict=True):
        for name in held.chosen:
            module, matrix = name.rsplit(".lora_", 1)
            basis, division = basis_of(over, name, "columns" if matrix == "A" else "rows")
            assert_diagonalises(basis, found.covariance(module, matrix), division)
    assert len(over.injected) == 28
    shared = [group for group in over.groups if len(group.stacks[-1]) < len(group.sites)]
    assert shared
    for group in over.groups:
        for i in range(len(group.sites)):
            assert float(group.core_state(group.centre, i)["step"]) == 8
    over.finish()


def test_carried_moments_are_turned_into_each_sites_own_basis() -> None:
    model = llama(target_modules=["q_proj", "k_proj", "v_proj"])
    config = LoraOverConfig(decomposition="eigen", options=MEASURED)
    over = OverParameterization(model, config, inject=False, probe=Probe(model, BATCHES))
    over.attach(optimizer := AdamW(trainable(model), lr=1e-2))
    for batch in BATCHES:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    before = {name: dict(optimizer.state[site.parameter]) for name, site in over.sites.items()}
    over.inject(over.sites)
    for name, (group, i) in over.injected.items():
        cores = [group.core(k, i).unsqueeze(0) for k in range(len(group.stacks))]
        state = group.core_state(group.centre, i)
        for key, squared in (("exp_avg", False), ("exp_avg_sq", True)):
            expected = over.decomposition.to_centre(cores, before[name][key][None], *group.shape, squared=squared)[0]
            torch.testing.assert_close(state[key], expected)


@pytest.mark.parametrize("weight", [None, 0.0], ids=["not-run", "no-gradient"])
def test_sites_that_no_batch_reached_are_refused_by_name(weight: float | None) -> None:
    """Their layers were not run, or without hooks, or the loss does not depend on them."""
    net = tiny_net()
    config = LoraOverConfig(decomposition="eigen", options=MEASURED)

    def loss(model: Any, x: Tensor) -> Tensor:
        hidden: Tensor = model.get_base_model().first(x)
        total = hidden.square().mean()
        return total if weight is None else total + weight * model(x).mean()

    message = r"no covariance of 4 matrices, first second\.lora_A: .* leave these out with `sites`, .*\{short: gradient"
    before = lora_matrices(net)
    with pytest.raises(ConfigError, match=message):
        OverParameterization(net, config, probe=Probe(net, [torch.ones(3, 6)], loss))
    assert all(torch.equal(matrix, before[key]) for key, matrix in lora_matrices(net).items())
    config = LoraOverConfig(decomposition="eigen", options=MEASURED, sites=["first.*"])
    over = OverParameterization(net, config, probe=Probe(net, [torch.ones(3, 6)], loss))
    assert not torch.equal(basis_of(over, "first.lora_B", "rows")[0], torch.eye(8))


def test_a_quantised_base_is_measured_as_it_computes() -> None:
    """4-bit weights: covariances are of activations, and need no weight."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    base = tiny_llama(hidden_size=64, intermediate_size=64)
    try:
        for name, linear in list(base.named_modules()):
            if isinstance(linear, nn.Linear) and name != "lm_head":
                quantised = bitsandbytes.nn.Linear4bit(
                    linear.in_features, linear.out_features, bias=False, quant_type="nf4", compute_dtype=torch.float32
                )
                quantised.load_state_dict(linear.state_dict())
                base.set_submodule(name, quantised.to("cpu"))
        base(token_ids())
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        pytest.skip(f"bitsandbytes has no 4-bit layers on this CPU: {error}")
    model = with_lora(base, task_type="CAUSAL_LM", target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    recorded = Recorded(model, BATCHES)
    over = measured(model)
    sides: dict[str, Side] = {"A": "columns", "B": "rows"}
    for kind, side in sides.items():
        basis, division = basis_of(over, f"{LAYER}.q_proj.lora_{kind}", side)
        assert_diagonalises(basis, recorded.covariance(f"{LAYER}.q_proj", kind), division)
    over.attach(optimizer := AdamW(trainable(model), lr=1e-2))
    before = lora_matrices(model)
    model(**BATCHES[0]).loss.backward()
    optimizer.step()
    assert not any(torch.equal(matrix, before[key]) for key, matrix in lora_matrices(model).items())
