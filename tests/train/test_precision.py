"""Cores are contracted in full float32 precision, however lower precision was asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from transformers.utils import import_utils

from loraover import LoraOverConfig, OverParameterization
from loraover.overparam.core_group import MATMULS
from loraover.overparam.decompositions import DECOMPOSITIONS

from support.decomposition_cases import at_contraction
from support.hooked_run import assert_contracted, cores, make, ordinary_step, same, train
from support.precision import ALL, BACKENDS, restore_default_precision
from support.tiny_models import fill_b, lora_matrices, net_loss, tiny_net, trainable, with_lora
from support.versions import TRANSFORMERS


def setter(backend: str, precision: str) -> Callable[[], None]:
    return lambda: setattr(BACKENDS[backend], "fp32_precision", precision)


def older(precision: str) -> Callable[[], None]:
    return lambda: torch.set_float32_matmul_precision(precision)


def in_turn(*functions: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: [function() for function in functions]


def transformers_tf32() -> None:
    import_utils.enable_tf32.__wrapped__(True)  # without its cache, which makes a second call do nothing


WAYS: dict[str, Callable[[], Any]] = {
    "transformers": transformers_tf32,
    "cuda": setter("cuda", "tf32"),
    "mkldnn-bf16": setter("mkldnn", "bf16"),
    "mkldnn-tf32": setter("mkldnn", "tf32"),
    "mkldnn-flags": lambda: ALL.mkldnn.set_flags(_fp32_precision="bf16"),
    "older-high": older("high"),
    "older-medium": older("medium"),
    "older-allow-tf32": lambda: setattr(ALL.cuda.matmul, "allow_tf32", True),
    "older-then-transformers": in_turn(older("high"), transformers_tf32),
    "transformers-then-cuda": in_turn(transformers_tf32, setter("cuda", "ieee")),
}
OLDER_WAYS = {"older-high", "older-medium", "older-allow-tf32"}
by_backend = pytest.mark.skipif(not MATMULS, reason="torch before 2.9 sets no precision of single backends")
by_transformers = pytest.mark.skipif(Version("5") > TRANSFORMERS, reason="transformers before 5 has no enable_tf32")


def marks(way: str) -> list[pytest.MarkDecorator]:
    return [by_backend] * (way not in OLDER_WAYS) + [by_transformers] * ("transformers" in way)


def reading(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except RuntimeError:
        return "mixed"


def settings() -> dict[str, Any]:
    """Everything that torch says of float32 products; `mixed` where the older functions raise."""
    found = {name: backend.fp32_precision for name, backend in BACKENDS.items()}
    found["older"] = reading(torch.get_float32_matmul_precision)
    found["allow_tf32"] = reading(lambda: ALL.cuda.matmul.allow_tf32)
    return found


@pytest.fixture(autouse=True)
def _defaults() -> Iterator[None]:
    before = settings()
    yield
    restore_default_precision()
    assert settings() == before


def step(decomposition: str) -> list[Tensor]:
    """The matrices and cores after an optimizer step.

    The matrices are large enough that a processor with bfloat16 products uses them once they are allowed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = with_lora(nn.Sequential(nn.Linear(512, 512)), target_modules=["0"], r=128)
    fill_b(model)
    optimizer = SGD(trainable(model), lr=1e-2)
    over = OverParameterization(model, LoraOverConfig(decomposition=decomposition)).attach(optimizer)
    for parameter in trainable(model):
        parameter.grad = torch.linspace(-1, 1, parameter.numel()).view_as(parameter)
    optimizer.step()
    return [*(stack.clone() for group in over.groups for stack in group.stacks), *lora_matrices(model).values()]


@pytest.mark.parametrize(
    ("way", "decomposition"),
    [
        *(pytest.param(way, "mpo", marks=marks(way)) for way in WAYS),
        *(("older-medium", name) for name in DECOMPOSITIONS if name != "mpo"),
    ],
)
def test_lower_precision_is_not_used_for_contraction_and_stays_set(way: str, decomposition: str) -> None:
    seen: list[dict[str, Any]] = []
    expected = step(decomposition)
    WAYS[way]()
    before = settings()
    with at_contraction(decomposition, lambda _: seen.append(settings())):
        found = step(decomposition)
    assert settings() == before
    assert len(seen) > 2
    full = {"older": "highest", "allow_tf32": False, **({"cuda": "ieee", "mkldnn": "ieee"} if MATMULS else {})}
    assert all(full.items() <= told.items() for told in seen)
    assert all(map(torch.equal, found, expected))


@by_backend
@by_transformers
def test_what_followed_the_setting_of_all_backends_still_follows_it() -> None:
    transformers_tf32()
    step("mpo")
    ALL.fp32_precision = "ieee"
    assert settings()["cuda"] == settings()["mkldnn"] == "ieee"
    ALL.cuda.matmul.fp32_precision = "tf32"
    step("mpo")
    ALL.fp32_precision = "none"
    assert settings()["cuda"] == "tf32"


def test_bfloat16_adapters_have_float32_cores() -> None:
    model = tiny_net(dtype=torch.bfloat16)
    optimizer = AdamW(trainable(model), lr=1e-5)
    over = OverParameterization(model).attach(optimizer)
    assert {stack.dtype for stack in cores(over)} == {torch.float32}
    before, first_cores = lora_matrices(model), cores(over)

    def step(model: Any, optimizer: Optimizer, _: int) -> None:
        ordinary_step(model, optimizer, 0)

    once, once_cores = train(model, optimizer, range(1), step), cores(over)
    assert not any(map(torch.equal, first_cores, once_cores))
    moved = [int((before[key] != once[key]).sum()) for key in before]
    later = train(model, optimizer, range(200), step)
    assert sum(int((before[key] != later[key]).sum()) for key in before) > 4 * sum(moved)
    assert {matrix.dtype for matrix in later.values()} == {torch.bfloat16}
    assert_contracted(over)


def test_autocast_around_a_step_is_not_used_for_contraction() -> None:
    def trained(inside: bool) -> dict[str, Tensor]:
        def step(model: Any, optimizer: Optimizer, number: int) -> None:
            optimizer.zero_grad()
            net_loss(model, number).backward()
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                optimizer.step()

        model, _, optimizer = make()
        return train(model, optimizer, range(3), step)

    assert same(trained(inside=True), trained(inside=False))
