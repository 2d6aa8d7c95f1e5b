"""Checkpoints of eigen are refused where their bases cannot be those of a run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loraover import read_checkpoint
from loraover.common.command_line import run
from loraover.common.errors import CheckpointError
from loraover_export.cli import cli

from strategies import normal
from support.eigen_checkpoint import CORE, OUT, B, V, made_of
from support.make_checkpoint import (
    Made,
    adamw,
    edit_json,
    edit_tensors,
    oracle_matrices,
    reopened,
    reseal,
)

Copy = Callable[[str], Made]
Change = Callable[[dict[str, Tensor]], object]


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    return cache(lambda kind: made_of(tmp_path_factory.mktemp(kind), kind))


@pytest.fixture
def copy_of(made_once: Copy, tmp_path: Path) -> Copy:
    """Copies the checkpoint of a kind, which is made once; the model is the one that wrote it."""

    def copied(kind: str) -> Made:
        made = made_once(kind)
        return replace(made, path=shutil.copytree(made.path, tmp_path / "checkpoint"))

    return copied


def damaged(made: Made, change: Change) -> None:
    """Edit the cores, and put what they contract to into the adapter, so that only the bases are wrong."""
    edit_tensors(made.path / "loraover.safetensors", change)
    matrices = {key: torch.from_numpy(matrix).float() for key, matrix in oracle_matrices(made.path).items()}
    edit_tensors(made.path / "adapter_model.safetensors", lambda tensors: tensors.update(matrices))
    reseal(made.path)


def _scaled(cores: dict[str, Tensor]) -> None:
    cores[f"{CORE}.core.2"] *= 2


def _one_bit(cores: dict[str, Tensor]) -> None:
    cores[f"{CORE}.core.2"][5, 3] += 2.0**-10


def _zero(cores: dict[str, Tensor]) -> None:
    cores[f"{CORE}.core.0"].zero_()


def _padding_mixed_in(cores: dict[str, Tensor]) -> None:
    """Orthogonal, but a turn would lose what it moves into the padding: 32 = 11 + 11 + 10."""
    basis = cores[f"{CORE}.core.2"].view(3, 11, 11)
    basis[2] = torch.linalg.qr(normal(0, 11, 11).float())[0]


@pytest.mark.parametrize("change", [_one_bit, _zero, _padding_mixed_in], ids=lambda change: change.__name__)
def test_bases_that_are_not_orthogonal_are_refused(change: Change, copy_of: Copy, tmp_path: Path) -> None:
    made = copy_of("gradient")
    damaged(made, change)
    with pytest.raises(CheckpointError, match=rf"the bases of {CORE} are not orthogonal: V\^T V is \S+ away"):
        reopened(made, adamw)
    assert run(cli, ["fold", str(made.path), "-o", str(tmp_path / "folded")]) == 0  # a contraction needs no more


def test_trained_bases_need_not_be_orthogonal(copy_of: Copy) -> None:
    made = copy_of("trained")
    damaged(made, _scaled)
    reopened(made, adamw)


def shares(name: str, value: dict[str, str]) -> Callable[[dict[str, Any]], None]:
    def change(meta: dict[str, Any]) -> None:
        next(site for site in meta["sites"] if site["name"] == name)["shares"] = value

    return change


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "the centre": (shares(V, {"1": CORE}), f"{V}: shares: core 1 cannot be shared"),
    "a negative core": (shares(V, {"-1": CORE}), f"{V}: shares: core -1 cannot be shared"),
    "no such site": (shares(V, {"2": "nothing"}), f"{V}: shares: there is no site 'nothing'"),
    "another shape": (shares(V, {"2": B}), f"{V}: shares: {B} has another shape or step"),
    "one that holds none": (shares(V, {"2": OUT}), f"{V}: shares: {OUT} does not hold it itself"),
    "a circle": (shares(CORE, {"2": V}), "does not hold it itself"),
    "absent": (lambda meta: meta["sites"][0].pop("shares"), r"sites\.0\.shares"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_shares_that_no_run_writes_are_refused(case: str, copy_of: Copy) -> None:
    made = copy_of("both")
    change, message = HOSTILE[case]
    edit_json(made.path / "loraover.json", change)
    reseal(made.path)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(made.path)


@pytest.mark.parametrize("kind", ["gradient", "trained"])
def test_what_follows_gradients_or_is_trained_is_not_shared(kind: str, copy_of: Copy) -> None:
    made = copy_of(kind)
    edit_json(made.path / "loraover.json", shares(V, {"2": CORE}))
    edit_json(made.path / "loraover.json", shares(CORE, {"2": CORE}))
    reseal(made.path)
    with pytest.raises(CheckpointError, match="shares: core 2 cannot be shared"):
        read_checkpoint(made.path)


GAUGE: dict[str, tuple[Change, str]] = {
    "no counts": (lambda t: t.pop(f"{CORE}.gauge.counts"), "no tensor"),
    "another shape": (
        lambda t: t.update({f"{CORE}.gauge.moment.rows": torch.ones(3, 3)}),
        r"gauge\.moment\.rows is torch\.float32 \(3, 3\), expected torch\.float32 \(1, 4, 4\)",
    ),
    "another type": (lambda t: t.update({f"{CORE}.gauge.started.rows": torch.ones(())}), r"expected torch\.bool"),
    "short counts": (
        lambda t: t.update({f"{CORE}.gauge.counts": torch.tensor([1, 1])}),
        r"expected \S+ \(3,\)",
    ),
    "not finite": (lambda t: t[f"{CORE}.gauge.moment.rows"].fill_(torch.nan), "holds NaN"),
    "state of a basis": (
        lambda t: t.update({f"{CORE}.core.0.exp_avg": torch.ones(4, 4)}),
        r"core\.0 has optimizer state \(exp_avg\), but is not trained",
    ),
}


@pytest.mark.parametrize("case", GAUGE)
def test_moments_that_bases_cannot_follow_are_refused(case: str, copy_of: Copy) -> None:
    made = copy_of("gradient")
    change, message = GAUGE[case]
    edit_tensors(made.path / "loraover.safetensors", change)
    reseal(made.path)
    with pytest.raises(CheckpointError, match=message):
        reopened(made, adamw)
