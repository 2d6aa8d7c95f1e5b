"""Bounds of conversions cover the error where terms cancel, against exact rational arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from loraover.adapters.convert.methods.base import Dense

from strategies import normal
from support.conversion_bounds import (
    KEY,
    TENSORS,
    converted,
    delta_of,
    exact,
    exact_norm,
    low_rank_of,
    made,
)
from support.conversions import SOURCES, Source
from support.make_checkpoint import edit_tensors


def test_deft_is_bounded_where_its_terms_cancel(tmp_path: Path) -> None:
    """R is P^T W rounded to float32, so that the difference is much smaller than the rounding of either."""
    weight = normal(1, 34, 34).float()
    adapter = made(tmp_path, SOURCES["deft"], weight)
    p = load_file(adapter / TENSORS)[f"{KEY}.deft_P"]
    r = (p.double().relu().mT @ weight.double() * 3 / 2).float()  # alpha / r is 2 / 3
    edit_tensors(adapter / TENSORS, lambda found: found.update({f"{KEY}.deft_R": r}))
    found = low_rank_of(adapter)
    truth = exact(p) @ (Fraction(2, 3) * exact(r) - exact(p.relu()).T @ exact(weight))
    error = exact_norm(exact(found.b) @ exact(found.a) - truth)
    assert error <= found.left_out <= 1e5 * error
    assert error > 1e-10 * float((found.b @ found.a).norm())


def in_pairs(matrix: Tensor) -> Tensor:
    """The matrix with each second column almost the column before it."""
    found = matrix.clone()
    found[:, 1::2] = found[:, ::2] * (1 + 2.0**-20)
    return found


def differences(count: int) -> Tensor:
    """Columns (34, count), each a sum of differences of the pairs in a matrix of `in_pairs`, times some numbers."""
    numbers = normal(5, 17, count).float()
    return torch.stack([numbers, -numbers], dim=1).reshape(34, count)


def exact_reflections(adapter: Path, weight: Tensor) -> Any:
    turned = exact(weight)
    for u in exact(load_file(adapter / TENSORS)[f"{KEY}.hra_u"]).T:
        turned = turned - np.outer(turned @ u, u) * (2 / (u @ u))
    return turned - exact(weight)


def exact_network(adapter: Path, weight: Tensor) -> Any:
    file = load_file(adapter / TENSORS)
    a, b, encoder, decoder = (
        exact(file[f"{KEY}.peanut_{name}.weight"]) for name in ("A", "B", "encoders.0", "decoders.0")
    )

    def relu(x: Any) -> Any:
        return x * (x > 0)

    first = relu(exact(weight).T @ a.T)
    return b @ (relu(relu(first @ encoder.T) @ decoder.T) + first).T * Fraction(1, 2)


PEANUT_OF_RELU = Source("PEANUT", {"r": 3, "depth": 1, "act_fn": "relu", "scaling": 0.5})
CANCELLING: dict[str, tuple[Source, Tensor, dict[str, Tensor], Callable[[Path, Tensor], Any]]] = {
    "hra": (
        SOURCES["hra"],
        in_pairs(normal(1, 34, 34).float()),
        {"hra_u": differences(4)},
        exact_reflections,
    ),
    "peanut": (
        PEANUT_OF_RELU,
        in_pairs(normal(1, 34, 34).float()).T.contiguous(),
        {"peanut_A.weight": differences(3).T.contiguous()},
        exact_network,
    ),
}


@pytest.mark.parametrize("case", CANCELLING)
def test_products_with_the_weight_are_bounded_where_their_terms_cancel(case: str, tmp_path: Path) -> None:
    source, weight, tensors, truth_of = CANCELLING[case]
    adapter = made(tmp_path, source, weight)
    edit_tensors(adapter / TENSORS, lambda found: found.update({f"{KEY}.{name}": new for name, new in tensors.items()}))
    found, truth = low_rank_of(adapter), truth_of(adapter, weight)
    error = exact_norm(exact(found.b) @ exact(found.a) - truth)
    size = exact_norm(truth)
    assert 1e-12 * size < error <= found.left_out <= 1e-4 * size  # the error depends on a processor's order of sums


def cancelling(*shape: int) -> Tensor:
    """Numbers (3, *shape) whose first dimension adds up to its own rounding to float32."""
    large, small = 1000 * normal(2, *shape).float(), normal(3, *shape).float()
    return torch.stack([large, small, -large - small])


def same(count: int, *shape: int) -> Tensor:
    """Numbers (count, *shape), the same in each place of the first dimension."""
    return normal(4, *shape).float().expand(count, *shape).contiguous()


def cancelling_hira(file: dict[str, Tensor], weight: Tensor) -> Any:
    a, b = file[f"{KEY}.hira_A"], file[f"{KEY}.hira_B"] = cancelling(34), same(3, 34).T.contiguous()
    return exact(weight) * (exact(b) @ exact(a))


def cancelling_lokr(file: dict[str, Tensor], weight: Tensor) -> Any:
    """W_2 (17, 17) is a product of 20 terms, all but three of which are zero."""
    del file[f"{KEY}.lokr_w2"]
    a, b = torch.zeros(17, 20), torch.zeros(20, 17)
    a[:, :3], b[:3] = same(3, 17).T, cancelling(17)
    file[f"{KEY}.lokr_w2_a"], file[f"{KEY}.lokr_w2_b"] = a, b
    return np.kron(exact(file[f"{KEY}.lokr_w1"]), exact(a) @ exact(b)) * Fraction(8, 20)


def cancelling_vblora(file: dict[str, Tensor], weight: Tensor) -> Any:
    """A is made of mixtures of the first three vectors of the bank."""
    bank = next(tensor for name, tensor in file.items() if name.endswith("vector_bank"))
    bank[:3] = cancelling(4)
    a, b = f"{KEY}.vblora_logits_A_topk", f"{KEY}.vblora_logits_B_topk"
    file[f"{a}_indices"][:] = torch.arange(3)
    file[f"{a}_weights"][:] = 1 / 3
    mixed = {}
    for side in (a, b):
        first = exact(file[f"{side}_weights"])
        mixed[side] = (
            np.concatenate([first, 1 - first.sum(-1, keepdims=True)], -1)[..., None]
            * exact(bank)[file[f"{side}_indices"].long().numpy()]
        ).sum(-2)
    return mixed[b].swapaxes(1, 2).reshape(32, 3) @ mixed[a].reshape(3, 32)


def cancelling_randlora(file: dict[str, Tensor], weight: Tensor) -> Any:
    """All rows of A are the same, and those columns of B that are not zero add up to almost nothing."""
    shared = {name[-1]: tensor for name, tensor in file.items() if name.endswith(("randlora_A", "randlora_B"))}
    shared["A"][:] = same(1, shared["A"].shape[-1])
    shared["B"][:] = 0
    shared["B"][:, 0, :3] = cancelling(len(shared["B"])).T
    file[f"{KEY}.randlora_lambda"][:] = 1
    gamma = file[f"{KEY}.randlora_gamma"]
    gamma[:] = same(1, 34)
    outer, inner = exact(shared["B"])[:34, 0, :3].sum(-1), exact(shared["A"])[0, 0, :34] * exact(gamma)[0]
    return np.outer(outer, inner) * Fraction(640, 3)


def cancelling_fourierft(file: dict[str, Tensor], weight: Tensor) -> Any:
    """The spectrum almost has the opposite sign at each negative frequency, so its transform is almost imaginary."""
    places = torch.randperm(34 * 34, generator=torch.Generator().manual_seed(777))
    values = normal(2, 34, 34).float()
    values -= values.flip(0, 1).roll((1, 1), (0, 1))
    values[:17] *= 1 + 2.0**-20
    file[f"{KEY}.fourierft_spectrum"] = values.flatten()[places]
    turn = 8 * np.arctan(np.longdouble(1)) / 34 * (np.outer(np.arange(34), np.arange(34)) % 34)
    c, s, wide = np.cos(turn), np.sin(turn), values.double().numpy().astype(np.longdouble)
    found = (c @ wide @ c - s @ wide @ s) / 34**2 * 150
    return np.vectorize(lambda x: Fraction(*x.as_integer_ratio()), otypes=[object])(found)


def cancelling_supertuning(file: dict[str, Tensor], weight: Tensor) -> Any:
    file[f"{KEY}.supertuning_values"][:] = 0
    a, b = cancelling(34), same(3, 34).T.contiguous()
    file[f"{KEY}.supertuning_lora_A.weight"], file[f"{KEY}.supertuning_lora_B.weight"] = a, b
    return exact(b) @ exact(a) * Fraction(4, 3)


def cancelling_miss(file: dict[str, Tensor], weight: Tensor) -> Any:
    """delta_W = (W + 1) D in blocks of 4; the rows of a block of D are the same, and W + 1 almost adds up to 0."""
    d = file[f"{KEY}.miss_block"] = same(4, 8, 4).transpose(0, 1).contiguous()
    blocks = exact(weight).reshape(8, 4, 8, 4).transpose(0, 2, 1, 3)  # (out block, in block, row, column)
    return (blocks @ exact(d)[:, None] + exact(d)[:, None]).transpose(0, 2, 1, 3).reshape(32, 32)


CANCELLING_SUMS: dict[str, tuple[Source, Callable[[dict[str, Tensor], Tensor], Any]]] = {
    "hira": (SOURCES["hira"], cancelling_hira),
    "lokr": (Source("LOKR", {"r": 20}), cancelling_lokr),
    "vblora": (SOURCES["vblora with the top k only"], cancelling_vblora),
    "randlora": (SOURCES["randlora"], cancelling_randlora),
    "fourierft": (Source("FOURIERFT", {"n_frequency": 34 * 34}, full=True), cancelling_fourierft),
    "supertuning": (
        Source("SUPERTUNING", {"sparsity": 0.5, "r": 3, "lora_alpha": 4}, full=True),
        cancelling_supertuning,
    ),
    "miss": (SOURCES["miss bat"], cancelling_miss),
}


@pytest.mark.parametrize("case", CANCELLING_SUMS)
def test_sums_are_bounded_where_their_terms_cancel(case: str, tmp_path: Path) -> None:
    source, edit = CANCELLING_SUMS[case]
    n = 32 if source.base == "even" else 34
    weight = normal(1, n, n).float()
    if case == "miss":
        weight = torch.cat([cancelling(n, 8), -torch.ones(1, n, 8)]).permute(1, 2, 0).reshape(n, n).contiguous()
    adapter = made(tmp_path, source, weight)
    truths: list[Any] = []
    edit_tensors(adapter / TENSORS, lambda file: truths.append(edit(file, weight)))
    module = converted(adapter, tmp_path / "out", approximate_to_rank=n)
    found = delta_of(adapter)
    value = exact(found.value) if isinstance(found, Dense) else exact(found.b) @ exact(found.a)
    error = exact_norm(value - truths[0])
    assert 1e-12 * exact_norm(truths[0]) < error <= module.arithmetic_bound <= 1e6 * error
