"""Bases of a side in blocks: how a side is divided, turned and kept, and what eigenvectors of its moments promise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import ceil
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Adagrad, Adam, AdamW, RMSprop
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loraover import LoraOverConfig, OverParameterization
from loraover.callbacks.diagnostics import core_numbers
from loraover.overparam import eigenbases
from loraover.overparam.block_bases import (
    RIDGE,
    Blocks,
    eigenvectors,
    next_eigenvectors,
    orthonormalised,
    packed,
    unpacked,
)
from loraover.overparam.core_group import CoreGroup
from loraover.overparam.decompositions import Eigen
from loraover.overparam.eigenbases import BasisFollower
from loraover.overparam.optimizers import ROTATED
from loraover.overparam.sites import Site

from oracles.contraction import block_diagonal
from strategies import SEEDS, generators, normal, sizes
from support.hooked_run import make, ordinary_step
from support.speed import examples
from support.tiny_models import lora_matrices, tiny_net
from tolerances import UNDERFLOW, UNIT, gamma, isometry_error

LENGTHS, LARGEST = st.integers(1, 150), st.sampled_from([1, 2, 3, 5, 7, 16, 64])
DTYPES = [torch.float64, torch.float32]
some = examples(40)


# Division


@given(length=LENGTHS, largest=LARGEST, seed=SEEDS)
@some
def test_the_diagonal_is_that_of_the_matrix(length: int, largest: int, seed: int) -> None:
    blocks, matrix = Blocks.of(length, largest), normal(seed, length, length)
    found = blocks.diagonal(matrix)
    assert found.shape == (blocks.number, blocks.size, blocks.size)
    assert not found[blocks.padding(found.device)].any()
    inside = torch.from_numpy(block_diagonal(np.ones_like(found.numpy()), length)) > 0
    assert np.array_equal(block_diagonal(found.numpy(), length), torch.where(inside, matrix, 0.0).numpy())


# Turning


@pytest.mark.parametrize("shape", [(8, 4096), (4096, 8)], ids=str)
def test_nothing_dense_is_made_of_a_long_side(shape: tuple[int, int]) -> None:
    eigen, largest = Eigen(), 0
    cores = [torch.zeros(1, *core) for core in eigen.core_shapes(*shape)]

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            largest = max([largest, *(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor))])
            return result

    with Watch():  # type: ignore[no-untyped-call]
        eigen.init(torch.zeros(1, *shape, dtype=torch.float64), generators(0, 1))
        left, right = eigen.frames(cores, *shape)
        eigen.contract(cores, *shape)
        eigen.to_centre(cores, torch.zeros(1, *shape), *shape, squared=True)
        eigen.apply(cores, torch.zeros(1, 2, shape[1]), *shape)
    assert {tuple(left.shape), tuple(right.shape)} == {(1, 8, 8), (64, 64, 64)}
    assert largest <= 4096 * 64


# Cores that neighbours share


@given(m=sizes(), n=sizes(), block=st.sampled_from([1, 2, 3, 7, 64]), seed=SEEDS)
@some
def test_shared_bases_do_what_copies_of_them_do(m: int, n: int, block: int, seed: int) -> None:
    eigen = Eigen(short="calibration", long="calibration", block=block)
    shapes = eigen.core_shapes(m, n)
    cores = [normal(seed + k, 2 if k in eigen.bases.shareable(m, n) else 6, *shape) for k, shape in enumerate(shapes)]
    copies = [core.repeat_interleave(6 // len(core), 0) for core in cores]
    x, gradients = normal(seed + 8, 6, 2, n), normal(seed + 9, 6, m, n)
    sizes_of = [core.abs() for core in copies]
    bound = 2 * gamma(m + n + 4, UNIT[torch.float64])

    def close(found: Tensor, expected: Tensor, size: Tensor) -> bool:
        return bool(((found - expected).abs() <= bound * size + UNDERFLOW[torch.float64]).all())

    assert close(eigen.contract(cores, m, n), eigen.contract(copies, m, n), eigen.contract(sizes_of, m, n))
    assert close(eigen.apply(cores, x, m, n), eigen.apply(copies, x, m, n), eigen.apply(sizes_of, x.abs(), m, n))
    for squared in (False, True):
        found, expected, size = (
            eigen.to_centre(used, given, m, n, squared=squared)
            for used, given in ((cores, gradients), (copies, gradients), (sizes_of, gradients.abs()))
        )
        assert close(found, expected, size)


# Eigenvectors


def moments(blocks: Blocks, kind: str, seed: int, dtype: torch.dtype) -> Tensor:
    """Positive semi-definite blocks, (2, count, size, size), zero in the padding."""
    factor = normal(seed, 2, blocks.number, blocks.size, 1 if kind == "rank one" else 2 * blocks.size)
    factor[:, blocks.full :, -1] = 0
    if kind == "steep":
        factor *= 4.0 ** -torch.arange(blocks.size)[:, None]
    if kind == "one is zero":
        factor[:, 0] = 0
    return (factor @ factor.mT * (1e-6 if kind == "tiny" else 1)).to(dtype)


KINDS = st.sampled_from(["full", "rank one", "steep", "one is zero", "tiny"])


def assert_orthogonal(basis: Tensor, blocks: Blocks) -> None:
    """Columns are orthonormal, and padding is a direction of its own, the last one."""
    identity = torch.eye(blocks.size, dtype=basis.dtype)
    error = isometry_error(blocks.size, blocks.size) * UNIT[basis.dtype] / UNIT[torch.float64]
    assert (basis.mT @ basis - identity).abs().max() <= error
    padding = blocks.padding(basis.device).expand_as(basis)
    assert (basis - identity)[padding].abs().sum() <= error


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(length=LENGTHS, largest=LARGEST, kind=KINDS, seed=SEEDS)
@some
def test_eigenvectors_are_orthogonal_sorted_and_signed(
    dtype: torch.dtype, length: int, largest: int, kind: str, seed: int
) -> None:
    blocks = Blocks.of(length, largest)
    moment = moments(blocks, kind, seed, dtype)
    basis = eigenvectors(moment, blocks)
    assert basis.dtype == dtype
    assert_orthogonal(basis, blocks)
    turned = (basis.mT @ moment @ basis).double()
    size = moment.double().norm(dim=(-2, -1))
    # The ridge moves no eigenvector; LAPACK's error is a small multiple of size * u, Higham (19.13) and its like.
    allowed = 100 * blocks.size * UNIT[dtype] * size + RIDGE * size * (kind == "tiny") + 1e-300
    assert ((turned - torch.diag_embed(turned.diagonal(dim1=-2, dim2=-1))).norm(dim=(-2, -1)) <= allowed).all()
    values = turned.diagonal(dim1=-2, dim2=-1)
    assert (values.diff(dim=-1).clamp(min=0).sum(-1) <= allowed).all()
    assert (basis.gather(-2, basis.abs().argmax(-2, keepdim=True)) > 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(length=LENGTHS, largest=LARGEST, kinds=st.tuples(KINDS, KINDS), seed=SEEDS)
@some
def test_the_next_eigenvectors_are_orthogonal_and_leave_padding_alone(
    dtype: torch.dtype, length: int, largest: int, kinds: tuple[str, str], seed: int
) -> None:
    blocks = Blocks.of(length, largest)
    basis = eigenvectors(moments(blocks, kinds[0], seed, dtype), blocks)
    for step in range(3):
        moment = basis.mT @ moments(blocks, kinds[1], seed + step, dtype) @ basis
        rotation, order = next_eigenvectors(moment, blocks)
        basis = orthonormalised(basis @ rotation)
        assert_orthogonal(basis, blocks)
        assert torch.equal(order.sum(-1), torch.ones_like(order[..., 0]))
        assert torch.equal(order.mT @ order, torch.eye(blocks.size, dtype=dtype).expand_as(order))
        assert (order[:, blocks.full :, -1, -1] == 1).all()


@given(length=LENGTHS, largest=LARGEST, seed=SEEDS)
@some
def test_eigenvectors_stay_where_they_are(length: int, largest: int, seed: int) -> None:
    """With their order and sign: QR iteration has them as its fixed point."""
    blocks = Blocks.of(length, largest)
    vectors = eigenvectors(moments(blocks, "full", seed, torch.float64), blocks)
    values = 1.0 + torch.arange(blocks.size, 0.0, -1, dtype=torch.float64)
    moment = (vectors * values) @ vectors.mT
    moment[blocks.padding(moment.device).expand_as(moment)] = 0
    rotation, order = next_eigenvectors(vectors.mT @ moment @ vectors, blocks)
    assert torch.equal(order, torch.eye(blocks.size, dtype=order.dtype).expand_as(order))
    assert (vectors @ rotation - vectors).abs().max() < 1e-10 * blocks.size


# Moments


@given(length=LENGTHS, largest=LARGEST, seed=SEEDS)
@some
def test_a_moment_is_kept_as_its_upper_triangles(length: int, largest: int, seed: int) -> None:
    blocks = Blocks.of(length, largest)
    upper = moments(blocks, "full", seed, torch.float64).triu()
    moment = upper + upper.triu(1).mT  # a product's halves may differ in their last bits
    triangles = packed(moment)
    rows, columns = np.triu_indices(blocks.size)
    assert torch.equal(triangles, moment[..., rows, columns])
    assert triangles.shape[-1] == blocks.triangle
    assert torch.equal(unpacked(triangles, blocks.size, torch.float64), moment)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moments_follow_gradients_in_the_axes_of_the_bases(dtype: torch.dtype) -> None:
    """Whether they have been turned or not: V^T C V, where C is the running mean of G^T G or G G^T in float64."""
    eigen = Eigen(block=5, growth=1, refresh=3, decay=0.9)
    group = group_of(eigen, 4, 12, 3, 0, dtype)
    follower = BasisFollower(group)
    # bfloat16 rounds each of 20 sums, of which each later one keeps 0.9: at most 10 roundings of an element of the
    # size of the root of two diagonal ones, or 13 at a turn, which sums up some.
    error = 30 * 2.0**-9 if dtype == torch.float32 else 1e-12
    means = {"rows": torch.zeros(3, 4, 4).double(), "columns": torch.zeros(3, 12, 12).double()}
    for step in range(20):
        gradients = normal(step, 3, 4, 12) * 2.0 ** -torch.arange(12)
        centre = eigen.to_centre([stack.double() for stack in group.stacks], gradients, 4, 12)
        follower.observe(centre.to(dtype), torch.tensor(True))
        for side, new in (("rows", gradients @ gradients.mT), ("columns", gradients.mT @ gradients)):
            means[side] = 0.9 * means[side] + 0.1 * new
        follower.refresh()
        for side, blocks in follower.blocks.items():
            found = eigen.bases.of(group.stacks, side, 4, 12)
            assert found is not None
            basis = found[0].double()
            exact = basis.mT @ torch.stack([blocks.diagonal(mean) for mean in means[side]]) @ basis
            size = exact.diagonal(dim1=-2, dim2=-1).sqrt()
            kept = unpacked(follower.moments[side], blocks.size, torch.float64)
            assert ((kept - exact).abs() <= error * size[..., None] * size[..., None, :]).all()
            assert follower.moments[side].dtype == (torch.bfloat16 if dtype == torch.float32 else dtype)


def test_moments_of_earlier_versions_are_turned_into_the_axes_of_the_bases() -> None:
    """They were whole blocks in the matrix's own axes."""
    eigen = Eigen(block=5, growth=1)
    group, resumed = group_of(eigen, 4, 12, 3, 0, torch.float64), group_of(eigen, 4, 12, 3, 0, torch.float64)
    follower, other = BasisFollower(group), BasisFollower(resumed)
    for step in range(8):
        follower.observe(eigen.to_centre(group.stacks, normal(step, 3, 4, 12), 4, 12), torch.tensor(True))
        follower.refresh()
    for stack, kept in zip(resumed.stacks, group.stacks, strict=True):
        stack.copy_(kept)
    for i in range(3):
        state = follower.site_state(i)
        for side, blocks in follower.blocks.items():
            found = eigen.bases.of(group.stacks, side, 4, 12)
            assert found is not None
            basis = found[0][i]
            own = basis @ unpacked(state[f"moment.{side}"].unsqueeze(0), blocks.size, torch.float64)[0] @ basis.mT
            assert (tuple(own.shape), own.dtype) == follower.earlier_forms()[f"moment.{side}"]
            state[f"moment.{side}"] = own
        other.load_site_state(i, state)
    for side, moment in follower.moments.items():
        assert (moment - other.moments[side]).abs().max() <= 1e-13 * moment.abs().max()


def test_bases_stay_orthogonal_over_many_refreshes() -> None:
    """Each is a product with the one before, and products alone move away by a rounding error each."""
    eigen = Eigen(block=16, growth=1, decay=0.5)
    group = group_of(eigen, 8, 32, 1, 0, torch.float32)
    follower = BasisFollower(group)
    for step in range(300):
        follower.observe(eigen.to_centre(group.stacks, normal(step, 1, 8, 32).float(), 8, 32), torch.tensor(True))
        follower.refresh()
    # Products of 16 terms round by at most 16 u; without a correction, 300 of them are 6e-6 away.
    assert eigen.bases.departure(group.stacks, 8, 32) <= 16 * UNIT[torch.float32]


@pytest.mark.parametrize("split", [False, True])
def test_a_refresh_in_parts_is_one_of_all_sites(split: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the optimizer's state."""

    def run() -> list[Tensor]:
        eigen = Eigen(block=5, growth=1, second_moments="carried")
        group = group_of(eigen, 4, 12, 5, 0, torch.float64)
        if split:
            group.split()
        follower, parameters = BasisFollower(group), group.parameters(group.centre)
        optimizer = AdamW(parameters, lr=1e-2)
        group.state = optimizer.state
        for step in range(6):
            gradients = eigen.to_centre(group.stacks, normal(step, 5, 4, 12), 4, 12)
            for parameter, gradient in zip(parameters, gradients if split else [gradients], strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
            follower.observe(gradients, torch.tensor(True))
            follower.refresh()
        states = [state[key] for state in group.state.values() for key in ("exp_avg", "exp_avg_sq")]
        return [*group.stacks, *follower.moments.values(), *states]

    whole = run()
    monkeypatch.setattr(eigenbases, "NUMBERS_AT_ONCE", {"cpu": 1})
    monkeypatch.setattr(eigenbases, "REFRESHED_AT_ONCE", 200)
    parts = run()
    assert all((one - other).abs().max() <= 1e-12 for one, other in zip(whole, parts, strict=True))


# Groups


def group_of(eigen: Eigen, m: int, n: int, count: int, seed: int, dtype: torch.dtype) -> CoreGroup:
    matrices = normal(seed, count, m, n).to(dtype)
    sites = [Site(f"{i}", f"{i}", "default", "A", nn.Parameter(matrix)) for i, matrix in enumerate(matrices)]
    return CoreGroup.initialised(sites, eigen, seed, 0)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
@given(
    m=sizes(), n=sizes(), block=st.sampled_from([1, 3, 4, 64]), count=st.integers(1, 3), split=st.booleans(), seed=SEEDS
)
@some
def test_a_refresh_keeps_every_matrix(
    dtype: torch.dtype, m: int, n: int, block: int, count: int, split: bool, seed: int
) -> None:
    eigen = Eigen(block=block, growth=1, decay=0.5)
    group = group_of(eigen, m, n, count, seed, dtype)
    follower = BasisFollower(group)
    if split:
        group.split()
    with torch.no_grad():  # as after a step, so that the model's matrices are rounded
        group.stacks[group.centre].add_(0.01 * normal(seed + 9, count, m, n).to(group.dtype))
        group.write()
    before = group.contract()
    for step in range(6):
        gradients = normal(seed + 10 + step, count, m, n).to(dtype)
        follower.observe(
            eigen.to_centre(group.stacks, (gradients / gradients.norm()).to(group.dtype), m, n), torch.tensor(True)
        )
        follower.refresh()
    assert all(bool(started.all()) or ceil(block / min(m, n)) > 6 for started in follower.started.values())
    for side in follower.blocks:
        found = eigen.bases.of(group.stacks, side, m, n)
        assert found is not None
        assert_orthogonal(*found)
    # Each of six refreshes and two sides: a product, and a basis that is orthogonal to within its error. Cores of a
    # bfloat16 matrix are float32, and are turned without rounding to bfloat16.
    unit = UNIT[torch.promote_types(dtype, torch.float32)]
    error = 12 * 2 * isometry_error(max(m, n), max(m, n)) * unit / UNIT[torch.float64]
    assert (group.contract() - before).norm() <= error * before.norm()
    back = eigen.to_centre(group.stacks, group.contract(), m, n)
    assert (back - group.stacks[group.centre]).norm() <= error * before.norm()


MEANS = {"exp_avg", "grad_avg", "momentum_buffer"}
"""What PyTorch's optimizers call means of gradients; their other moments are those of squares."""


@pytest.mark.parametrize("kind", ROTATED)
def test_a_refresh_turns_the_state_of_every_optimizer_whose_state_can_be_turned(kind: Any) -> None:
    """Means of gradients stay as they are in the matrix's own axes, and squares keep their sum."""
    eigen = Eigen(block=5, growth=1, second_moments="carried")
    group = group_of(eigen, 4, 12, 3, 0, torch.float64)
    (centre,) = group.parameters(group.centre)
    options: dict[str, Any] = {"amsgrad": True} if kind in (Adam, AdamW) else {}
    options |= {"momentum": 0.9, "centered": True} if kind is RMSprop else {}
    optimizer = kind([centre], lr=1e-2, **options)
    group.state = optimizer.state
    follower = BasisFollower(group)
    checked: Counter[str] = Counter()
    for step in range(6):
        gradients = normal(step, 3, 4, 12)
        centre.grad = eigen.to_centre(group.stacks, gradients, 4, 12).clone()
        optimizer.step()
        follower.observe(centre.grad / gradients.norm(), torch.tensor(True))
        before = {key: value.clone() for key, value in group.state[centre].items() if value.shape == centre.shape}
        stacks = [stack.detach().clone() for stack in group.stacks]
        follower.refresh()
        for key, old in before.items():
            new = group.state[centre][key]
            if key in MEANS:
                old, new = (
                    in_own_axes(eigen, group, cores, moment) for cores, moment in ((stacks, old), (group.stacks, new))
                )
                assert (new - old).norm() <= 1e-12 * old.norm()
            else:
                assert (new.sum((1, 2)) - old.sum((1, 2))).abs().max() <= 1e-12 * old.sum()
            checked[key] += 1
    assert set(checked.values()) == {6}
    assert len(checked) == {Adam: 3, AdamW: 3, RMSprop: 3, Adagrad: 1}.get(kind, 2)


@pytest.mark.parametrize("second_moments", ["kept", "carried"])
@pytest.mark.parametrize("refresh", [{"growth": 1}, {"growth": None, "refresh": 4}], ids=["often", "once"])
def test_a_centred_rmsprop_divides_by_a_variance_after_a_refresh(second_moments: str, refresh: dict[str, Any]) -> None:
    """Also where gradients hardly change, so that mean and mean square, each turned by itself, would not agree."""
    model, over, optimizer = make(
        lambda p: RMSprop(p, lr=1e-3, alpha=0.9, centered=True, momentum=0.9),
        decomposition="eigen",
        options={"second_moments": second_moments, **refresh},
    )
    for step in range(20):
        ordinary_step(model, optimizer, step % 2)
        for state in (state for group in over.groups for state in group.state.values()):
            variance = state["square_avg"] - state["grad_avg"].square()
            assert bool((variance >= -4 * UNIT[torch.float32] * state["square_avg"]).all())
    assert all(bool(matrix.isfinite().all()) for matrix in lora_matrices(model).values())


def in_own_axes(eigen: Eigen, group: CoreGroup, cores: Sequence[Tensor], moment: Tensor) -> Tensor:
    """A moment of Z as one of the matrices: U m V^T."""
    given = [moment if k == group.centre else core for k, core in enumerate(cores)]
    return eigen.contract(given, *group.shape)


@pytest.mark.parametrize("options", [{}, {"block": 3}, {"short": "none"}, {"short": "none", "long": "none"}], ids=str)
def test_trained_numbers_and_those_of_the_gauge_are_counted_apart(options: dict[str, Any]) -> None:
    over = OverParameterization(tiny_net(), LoraOverConfig(decomposition="eigen", options=options))
    matrices = sum(site.parameter.numel() for site in over.sites.values())
    assert over.num_parameters() == (matrices, matrices)
    assert over.decomposition.bases is not None
    bases, shapes = over.decomposition.bases, [site.shape for site in over.sites.values()]
    expected = sum(sum(bases.numbers(*shape)) for shape in shapes)
    assert over.gauge_numbers() == expected
    held = [tensor for follower in over.followers.values() for tensor in follower.moments.values()]
    held += [stack for group in over.groups for k, stack in enumerate(group.stacks) if k not in group.trained]
    assert sum(tensor.numel() for tensor in held) == expected
    assert sum(tensor.nbytes for tensor in held) == sum(bases.bytes(*shape) for shape in shapes)
    assert core_numbers(over)["gauge_condition"] == pytest.approx(1)
    assert core_numbers(over)["added_parameters"] == 0


def test_other_decompositions_have_no_numbers_beside_the_trained_ones() -> None:
    assert OverParameterization(tiny_net()).gauge_numbers() == 0
