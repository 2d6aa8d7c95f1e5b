"""Checkpoints of eigen are resumed bit for bit, and refused where their bases cannot be those of a run."""

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
from torch.optim import AdamW

from loraover import LoraOverConfig, read_checkpoint
from loraover.checkpoint.tensor_file import open_tensors
from loraover.common.command_line import run
from loraover.common.errors import CheckpointError
from loraover_export import fold_checkpoint
from loraover_export.cli import cli

from strategies import normal
from support.eigen_checkpoint import CORE, OPTIONS, OUT, B, V, made_of
from support.hooked_run import same
from support.make_checkpoint import (
    Made,
    adamw,
    edit_json,
    edit_tensors,
    make_checkpoint,
    oracle_matrices,
    reopened,
    reseal,
    save,
    train,
)
from support.parallel_run import cores
from support.tiny_models import lora_matrices


def assert_alike(one: Made, other: Made) -> None:
    assert same(cores(one.over), cores(other.over))
    assert same(lora_matrices(one.model), lora_matrices(other.model))


RESUMED = [*((kind, torch.float32) for kind in OPTIONS), ("both", torch.float64), ("both", torch.bfloat16)]


@pytest.mark.parametrize(("kind", "dtype"), RESUMED, ids=str)
def test_a_resumed_run_is_the_uninterrupted_one(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    made = made_of(tmp_path, kind, dtype=dtype)
    resumed = reopened(made, adamw)
    assert_alike(resumed, made)
    due = [follower.due for follower in made.over.followers.values()]
    for each in (made, resumed):
        train(each.model, each.optimizer, range(3, 12))
    is_refreshed = [follower.due for follower in made.over.followers.values()] != due
    assert is_refreshed is (kind in ("gradient", "both", "carried", "once"))
    assert_alike(resumed, made)


@pytest.mark.parametrize("kind", ["gradient", "carried"])
def test_a_run_some_of_whose_sites_had_no_gradients_is_resumed(kind: str, tmp_path: Path) -> None:
    """One of a group of several, which is split; and all of another group, whose bases then follow fewer steps."""
    made = made_of(tmp_path, kind, steps=2)
    idle = [p for key, p in made.model.named_parameters() if "layers.1.self_attn.q_proj.lora_A" in key]
    idle += [p for key, p in made.model.named_parameters() if "k_proj.lora_B" in key or "v_proj.lora_B" in key]
    for parameter in idle:
        parameter.requires_grad_(False)
    train(made.model, made.optimizer, range(2, 5))
    for parameter in idle:
        parameter.requires_grad_(True)
    assert 0 < sum(group.is_joined for group in made.over.groups) < len(made.over.groups)
    assert len({follower.steps for follower in made.over.followers.values()}) == 2
    save(made.path, made.model, made.over, step=5)
    resumed = reopened(made, adamw)
    assert_alike(resumed, made)
    for each in (made, resumed):
        train(each.model, each.optimizer, range(5, 12))
    assert_alike(resumed, made)


def test_groups_of_two_rates_that_follow_other_steps_are_resumed(tmp_path: Path) -> None:
    """LoRA+ divides a group, and then only one part has gradients: it is one group again until the optimizer comes."""

    def rates(model: Any) -> list[dict[str, Any]]:
        named = [(key, p) for key, p in model.named_parameters() if p.requires_grad]
        return [{"params": [p for k, p in named if ("layers.0" in k) is first], "lr": 1e-2} for first in (True, False)]

    made = made_of(tmp_path, "gradient", steps=0)
    made.over.detach()
    optimizer = AdamW(rates(made.model))
    made.over.attach(optimizer)
    train(made.model, optimizer, range(2))
    idle = [p for key, p in made.model.named_parameters() if "layers.1" in key and "lora_" in key]
    for parameter in idle:
        parameter.requires_grad_(False)
    train(made.model, optimizer, range(2, 4))
    for parameter in idle:
        parameter.requires_grad_(True)
    assert {follower.steps for follower in made.over.followers.values()} == {2, 4}
    save(made.path, made.model, made.over, step=4)
    resumed = reopened(made, adamw)
    resumed.over.detach()
    again = AdamW(rates(resumed.model))
    resumed.over.attach(again)
    assert same(cores(resumed.over), cores(made.over))
    for model, stepped in ((made.model, optimizer), (resumed.model, again)):
        train(model, stepped, range(4, 10))
    assert_alike(resumed, made)


# Embeddings


EMBEDDED: dict[str, dict[str, Any]] = {
    "gradient": {"block": 12},
    "calibration": {"short": "calibration", "long": "calibration", "block": 12},
    "trained": {"short": "calibration", "long": "calibration", "block": 12, "train_auxiliary": True},
}


@pytest.mark.parametrize("source", EMBEDDED)
def test_the_axis_of_tokens_has_no_basis(source: str, tmp_path: Path) -> None:
    config = LoraOverConfig(decomposition="eigen", options=EMBEDDED[source], seed=5)
    made = make_checkpoint(tmp_path, config=config, steps=4, target_modules=["embed_tokens", "q_proj"])
    name = next(name for name in made.over.sites if name.endswith("lora_embedding_A"))
    group, i = made.over.injected[name]
    r, _ = group.shape
    assert [tuple(group.core(k, i).shape) for k in range(len(group.stacks))] == [(r, r), group.shape]
    assert made.over.schedule.most_parameters[0] == made.over.num_parameters()[0]
    assert list(made.over.followers[group].blocks) == (["rows"] if source == "gradient" else [])

    found = read_checkpoint(made.path)
    with open_tensors(found.cores_path) as file:
        assert len(found.read_cores(file, found.sites[name])) == 2
    assert fold_checkpoint(made.path, tmp_path / "folded", check_error=True).verdict != "failed"

    resumed = reopened(made, adamw, config)
    for each in (made, resumed):
        train(each.model, each.optimizer, range(4, 6))
    assert torch.equal(resumed.logits(), made.logits())


# Damaged


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
    "one that holds none": (shares(V, {"2": OUT}), f"{V}: shares: {OUT} does not store core 2 itself"),
    "a circle": (shares(CORE, {"2": V}), "does not store core 2 itself"),
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
        r"gauge\.moment\.rows is torch\.float32 \(3, 3\), expected torch\.bfloat16 \(1, 10\)",
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
