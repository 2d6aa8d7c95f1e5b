"""A run whose bases were measured before it is the oracle's, which is given the same bases.

That the bases diagonalise what they are to diagonalise is shown in test_measured_bases.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import AdamW

from loraover import LoraOverConfig, OverParameterization, Probe
from loraover.overparam.block_bases import Side
from loraover.overparam.decompositions import Eigen

from oracles.contraction import Array
from oracles.eigen import EigenAdamW, Rule, SteppedFactors
from support.hf_trainer import llama
from support.measured import BATCHES, blocks_of
from support.tiny_models import token_ids

STEPS, LR, RATIO, BLOCK, AUX = 12, 3e-3, 4.0, 20, 0.3  # neither 32 nor 48 is a multiple of the block

# As in test_eigen.py: directions that are off by 1e-8 move 12 steps, of at most RATIO * LR in each direction, by 2e-9.
TOLERANCE = STEPS * RATIO * LR * 1e-8

Run = Callable[[], tuple[dict[str, Array], dict[str, Array]]]


def backward(model: nn.Module, step: int) -> None:
    model.zero_grad()
    ids = token_ids(100 + step)
    model(input_ids=ids, labels=ids).loss.backward()


def started(options: Mapping[str, Any]) -> tuple[Any, OverParameterization, dict[str, Array]]:
    """A model in float64 with its bases measured, and its matrices as they were before."""
    model = llama().double()
    before = {
        n: s.parameter.detach().numpy().copy() for n, s in OverParameterization(model, inject=False).sites.items()
    }
    config = LoraOverConfig(decomposition="eigen", options={"block": BLOCK, **options}, aux_lr_scale=AUX)
    return model, OverParameterization(model, config, probe=Probe(model, BATCHES)), before


def measured_blocks(over: OverParameterization, name: str) -> dict[str, list[Array]]:
    """Each side's measured blocks, without their padding."""
    group, i = over.injected[name]
    eigen, found = over.decomposition, {}
    assert isinstance(eigen, Eigen)
    for side, length in zip(get_args(Side), group.shape, strict=True):
        k = eigen.bases.core(side, *group.shape)
        if k is not None and eigen.bases.source(side, *group.shape) == "calibration":
            blocks = blocks_of(group.core(k, i))
            parts = np.array_split(np.arange(length), len(blocks))
            found[side] = [block[: len(part), : len(part)] for block, part in zip(blocks, parts, strict=True)]
    return found


def trained(model: Any, over: OverParameterization, rule: Rule) -> dict[str, Array]:
    """The matrices after the run, with LoRA+'s rates."""
    rates: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rates.setdefault(LR * (rule.ratio if "lora_B" in name else 1), []).append(parameter)
    groups = [{"params": found, "lr": rate} for rate, found in rates.items()]
    over.attach(optimizer := AdamW(groups, lr=LR, eps=rule.eps, weight_decay=rule.weight_decay))
    for step in range(STEPS):
        backward(model, step)
        optimizer.step()
    over.finish()
    return {name: site.parameter.detach().numpy() for name, site in over.sites.items()}


def gradient(parameter: nn.Parameter) -> Array:
    assert parameter.grad is not None
    return parameter.grad.numpy().copy()


def plain_steps(take: Callable[[Mapping[str, Array]], Mapping[str, Array]]) -> dict[str, Array]:
    """A plain LoRA whose matrices are, after each step, what `take` makes of the gradients."""
    model = llama().double()
    sites = OverParameterization(model, inject=False).sites
    for step in range(STEPS):
        backward(model, step)
        taken = take({name: gradient(site.parameter) for name, site in sites.items()})
        for name, value in taken.items():
            sites[name].parameter.data = torch.from_numpy(value.copy())
    return {name: site.parameter.detach().numpy() for name, site in sites.items()}


def with_fixed_bases(options: Mapping[str, Any]) -> tuple[dict[str, Array], dict[str, Array]]:
    """Matrices after a run, and the oracle's."""
    model, over, before = started(options)
    rule = Rule(block=BLOCK, ratio=RATIO, weight_decay=0.1, short=options.get("short") != "none")
    oracle = EigenAdamW.of(before, rule, {name: measured_blocks(over, name) for name in over.sites})
    ours = trained(model, over, rule)

    def take(gradients: Mapping[str, Array]) -> Mapping[str, Array]:
        oracle.step(gradients, LR)
        return {name: matrix.value for name, matrix in oracle.matrices.items()}

    return ours, plain_steps(take)


def with_stepped_bases() -> tuple[dict[str, Array], dict[str, Array]]:
    """The same where the optimizer steps the bases too."""
    model, over, before = started({"short": "calibration", "long": "calibration", "train_auxiliary": True})
    rule = Rule(ratio=RATIO, weight_decay=0.1)
    factors = {name: SteppedFactors(value, **measured_blocks(over, name)) for name, value in before.items()}
    ours = trained(model, over, rule)

    def take(gradients: Mapping[str, Array]) -> Mapping[str, Array]:
        for name, found in gradients.items():
            factors[name].step(found, rule.rate(name, LR), AUX, rule)
        return {name: found.value for name, found in factors.items()}

    return ours, plain_steps(take)


CASES: dict[str, Run] = {
    "as the study has it": lambda: with_fixed_bases({"long": "calibration"}),
    "both sides": lambda: with_fixed_bases({"short": "calibration", "long": "calibration"}),
    "the longer side alone": lambda: with_fixed_bases({"short": "none", "long": "calibration"}),
    "stepped": with_stepped_bases,
}


def deviation(one: Mapping[str, Array], other: Mapping[str, Array]) -> float:
    """Largest difference of any element; the elements are below one."""
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


@pytest.mark.parametrize("case", CASES)
def test_a_run_is_the_oracles(case: str) -> None:
    ours, oracles = CASES[case]()
    assert ours.keys() == oracles.keys()
    assert deviation(ours, oracles) < TOLERANCE
