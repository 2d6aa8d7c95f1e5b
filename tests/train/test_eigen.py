"""Decomposition eigen trains as the oracle does, and as SOAP on one matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from loraover import LoraOverConfig, OverParameterization
from loraover.overparam import block_bases
from loraover.overparam.block_bases import Blocks
from loraover.overparam.decompositions import eigen
from loraover.overparam.decompositions.eigen import Eigen

from oracles.contraction import Array
from oracles.eigen import EigenAdamW, Rule, soap
from support.devices import DEVICE
from support.tiny_models import net_loss, tiny_net, trainable

STEPS, LR, EPS, MAX_NORM = 25, 1e-2, 1e-8, 0.05

# An eigenvector errs by the moment's rounding, some size * u = 1e-15 of its largest eigenvalue, over the distance to
# the next eigenvalue, which is asserted to be above 1e-7 (QR iteration: over the eigenvalue itself, at least
# the ridge of 1e-7). Directions that are off by 1e-8 move Adam's step by as much, or 1e-10 at this rate: 2.5e-9 over
# 25 steps, if all of them erred the same way. Seen: 1e-13.
TOLERANCE = 2.5e-9
SMALLEST_GAP = 1e-7


@dataclass(frozen=True)
class Case:
    """Options of the decomposition, with what the oracle calls them, and of the training loop."""

    name: str
    options: Mapping[str, Any]
    rule: Rule
    micro_batches: int = 1
    clipped: bool = False
    scheduled: bool = False
    closure: bool = False
    net: Mapping[str, Any] = field(default_factory=dict)

    def rate(self, step: int) -> float:
        return LR * 0.9**step if self.scheduled else LR


CASES = [
    Case("default", {}, Rule()),
    Case("blocks-that-do-not", {"block": 3}, Rule(block=3)),
    Case("blocks-of-one", {"block": 1}, Rule(block=1)),
    Case("short-side", {"long": "none"}, Rule(long=False)),
    Case("long-side", {"short": "none", "block": 5}, Rule(short=False, block=5)),
    Case("neither-side", {"short": "none", "long": "none"}, Rule(short=False, long=False)),
    Case("once", {"growth": None, "refresh": 4}, Rule(growth=None, refresh=4)),
    Case("every-step", {"growth": 1}, Rule(growth=1)),
    Case("carried", {"second_moments": "carried", "block": 3}, Rule(carried=True, block=3)),
    Case("forgetful", {"decay": 0.5}, Rule(decay=0.5)),
    Case("b-is-zero", {"block": 4}, Rule(block=4), net={"draw_b": False}),
    Case("square", {"block": 3}, Rule(block=3), micro_batches=4, net={"r": 8, "target_modules": ["second"]}),
    Case(
        "all-at-once",
        {"block": 3, "refresh": 2, "growth": 1.2, "second_moments": "carried"},
        Rule(block=3, refresh=2, growth=1.2, carried=True, weight_decay=0.1),
        micro_batches=2,
        clipped=True,
        scheduled=True,
        closure=True,
    ),
]
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def backward(model: nn.Module, step: int, case: Case) -> float:
    """Leave a step's gradients on the matrices."""
    model.zero_grad()
    total = 0.0
    for micro in range(case.micro_batches):
        loss = net_loss(model, case.micro_batches * step + micro) / case.micro_batches
        loss.backward()
        total += float(loss.detach())
    return total


def found(case: Case) -> dict[str, Array]:
    """Each matrix after every step: (STEPS, m, n) by site."""
    model = tiny_net(dtype=torch.float64, **case.net)
    over = OverParameterization(model, LoraOverConfig(decomposition="eigen", options=dict(case.options)))
    optimizer = AdamW(trainable(model), lr=LR, eps=EPS, weight_decay=case.rule.weight_decay)
    over.attach(optimizer)
    scheduler = LambdaLR(optimizer, lambda step: case.rate(step) / LR)
    history: dict[str, list[Array]] = {name: [] for name in over.sites}

    def evaluate(step: int) -> float:
        loss = backward(model, step, case)
        if case.clipped:
            nn.utils.clip_grad_norm_(trainable(model), MAX_NORM)
        return loss

    for step in range(STEPS):
        if case.closure:
            optimizer.step(partial(evaluate, step))
        else:
            evaluate(step)
            optimizer.step()
        scheduler.step()
        for name, site in over.sites.items():
            history[name].append(numpy(site.parameter))
    over.finish()
    return {name: np.stack(matrices) for name, matrices in history.items()}


def expected(case: Case) -> dict[str, Array]:
    """The same of the oracle, whose gradients come from a plain LoRA that holds its matrices."""
    model = tiny_net(dtype=torch.float64, **case.net)
    sites = OverParameterization(model, inject=False).sites
    oracle = EigenAdamW.of({name: numpy(site.parameter) for name, site in sites.items()}, case.rule)
    history: dict[str, list[Array]] = {name: [] for name in sites}
    for step in range(STEPS):
        backward(model, step, case)
        gradients = {name: numpy(site.parameter.grad) for name, site in sites.items()}
        if case.clipped:
            norm = np.sqrt(sum(np.sum(gradient**2) for gradient in gradients.values()))
            assert norm > MAX_NORM
            gradients = {name: gradient * (MAX_NORM / (norm + 1e-6)) for name, gradient in gradients.items()}
        oracle.step(gradients, case.rate(step))
        for name, matrix in oracle.matrices.items():
            sites[name].parameter.data.copy_(torch.from_numpy(matrix.value))
            history[name].append(matrix.value)
    assert len(oracle.refreshes) > 1 or not (case.rule.short or case.rule.long)
    assert oracle.smallest_gap > SMALLEST_GAP
    return {name: np.stack(matrices) for name, matrices in history.items()}


def numpy(tensor: Tensor | None) -> Array:
    assert tensor is not None
    return tensor.detach().cpu().clone().numpy()


def deviation(one: Mapping[str, Array], other: Mapping[str, Array]) -> float:
    """Largest difference of any element at any step; the elements are below one."""
    assert one.keys() == other.keys()
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


@by_case
def test_a_run_is_the_oracles(case: Case) -> None:
    ours = found(case)
    assert all(np.abs(matrices[-1] - matrices[0]).max() > 1e-2 for matrices in ours.values())
    assert deviation(ours, expected(case)) < TOLERANCE


def test_a_shorter_side_that_is_long_is_divided_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Eigen().bases.blocks("rows", 256, 400) == Blocks.of(256, 256)
    assert Eigen().bases.blocks("rows", 257, 400) == Blocks.of(257, 64)
    monkeypatch.setattr(eigen, "WHOLE_SHORT_SIDE", 4)
    case = Case("divided", {"block": 3}, Rule(block=3, whole=4), net={"r": 5})
    assert deviation(found(case), expected(case)) < TOLERANCE


def test_bases_change_what_is_learned() -> None:
    """So that a decomposition which does nothing does not pass."""
    plain, both, short = (found(case) for case in CASES if case.name in ("neither-side", "default", "short-side"))
    assert min(deviation(plain, both), deviation(plain, short), deviation(both, short)) > 1e-3


# SOAP on one matrix


def directions(*, steep: bool) -> list[Array]:
    """Gradients of an 8 x 8 matrix of norm 1, with a mean that does not vanish.

    Args:
        steep: Whether the same directions are the largest in all gradients, each by far.
    """
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((8, 8)))[0] for _ in range(2))
    sizes = (1.5 if steep else 1.0) ** -np.arange(8.0)
    found = []
    for _ in range(20):
        core = sizes[:, None] * ((0.1 if steep else 1) * rng.standard_normal((8, 8)) + 2 * np.eye(8)) * sizes
        gradient = u @ core @ v.T
        found.append(gradient / np.linalg.norm(gradient))
    return found


def one_matrix(gradients: list[Array], frequency: int, betas: tuple[float, float]) -> tuple[Array, list[Array]]:
    """An 8 x 8 matrix that is given these gradients, before the first and after each step."""
    model = tiny_net(dtype=torch.float64, r=8)
    options = {"refresh": 1, "growth": 1, "decay": betas[1], "block": 64}
    over = OverParameterization(model, LoraOverConfig(decomposition="eigen", options=options, sites=["second.lora_B"]))
    matrix = over.sites["second.lora_B"].parameter
    optimizer = AdamW([matrix], lr=LR, betas=betas, eps=0.0, weight_decay=0.0)
    over.attach(optimizer)
    (follower,) = over.followers.values()
    start, after = numpy(matrix), []
    for t, gradient in enumerate(gradients, 1):
        matrix.grad = torch.from_numpy(gradient).to(DEVICE, copy=True)
        follower.due = t if t == 1 or t % frequency == 0 else t + 1
        optimizer.step()
        after.append(numpy(matrix))
    return start, after


@pytest.mark.parametrize("frequency", [1, 5])
@pytest.mark.parametrize("printed", [False, True], ids=["as-implemented", "as-printed"])
def test_one_matrix_is_soaps(printed: bool, frequency: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As printed, the eigenvectors are never sorted; where the spectrum is steep, they keep their order anyway."""
    monkeypatch.setattr(block_bases, "RIDGE", 0.0)  # which SOAP has not
    gradients, betas = directions(steep=printed), (0.9, 0.95)
    start, ours = one_matrix(gradients, frequency, betas)
    paper = soap(start, gradients, rate=LR, betas=betas, frequency=frequency, ordered=not printed)
    # The steep spectrum's smallest eigenvalue is 1.5^-28 = 1e-5 of its largest: an error of 8 u is 1e-10 of its
    # direction, or 1e-12 of a step, which Adam takes in all directions alike.
    assert max(float(np.abs(a - b).max()) for a, b in zip(ours, paper, strict=True)) < 20 * 1e-12
    assert np.abs(ours[-1] - start).max() > 5 * LR
