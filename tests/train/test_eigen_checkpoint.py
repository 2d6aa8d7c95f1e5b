"""Checkpoints of eigen: resumed bit for bit, folded, and refused where their bases cannot be those of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.optim import AdamW, NAdam
from transformers import AutoModelForCausalLM

from loraover import LoraOverConfig, OverParameterization, read_checkpoint
from loraover.checkpoint.error_bounds import orthogonality_error
from loraover.checkpoint.unfolded_model import unfolded
from loraover.common.command_line import run
from loraover.common.errors import CheckpointError
from loraover.overparam.block_bases import Blocks, eigenvectors
from loraover.overparam.eigenbases import BasisFollower
from loraover_export.cli import cli
from loraover_export.fold.certificate import FoldCertificate

from strategies import normal
from support.hooked_run import same
from support.make_checkpoint import (
    LINEAR,
    Made,
    adamw,
    cores_of,
    edit_json,
    edit_tensors,
    logits,
    make_checkpoint,
    nearest,
    numpy64,
    oracle_matrices,
    reopened,
    reseal,
    save,
    train,
)
from support.tiny_models import lora_matrices

OPTIONS: dict[str, dict[str, Any]] = {
    "gradient": {"block": 12},
    "calibration": {"short": "calibration", "long": "calibration", "block": 12},
    "both": {"long": "calibration", "block": 12, "growth": 1, "refresh": 2},
    "carried": {"second_moments": "carried", "growth": 1},
    "trained": {"short": "calibration", "long": "calibration", "train_auxiliary": True},
    "once": {"growth": None, "refresh": 3},
    "neither": {"short": "none", "long": "none"},
}
QKVO = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}


def made_of(folder: Path, kind: str, **options: Any) -> Made:
    config = LoraOverConfig(decomposition="eigen", options=OPTIONS[kind], seed=5)
    return make_checkpoint(folder, config=config, **({"steps": 3} | QKVO | options))


def follower_states(over: OverParameterization) -> dict[str, Any]:
    return {name: over.followers[group].site_state(i) for name, (group, i) in over.injected.items()}


def states(over: OverParameterization) -> dict[str, Any]:
    return {
        f"{name}.{k}": dict(group.core_state(k, group.owner(k, i)))
        for name, (group, i) in over.injected.items()
        for k in group.trained
    }


def assert_alike(one: Made, other: Made) -> None:
    assert same(cores_of(one.over), cores_of(other.over))
    assert same(states(one.over), states(other.over))
    assert same(follower_states(one.over), follower_states(other.over))
    assert same(lora_matrices(one.model), lora_matrices(other.model))


# Resumed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", OPTIONS)
def test_a_resumed_run_is_the_uninterrupted_one(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    made = made_of(tmp_path, kind, dtype=dtype)
    resumed = reopened(made, adamw)
    assert_alike(resumed, made)
    refreshes: list[BasisFollower] = []
    with pytest.MonkeyPatch.context() as patch:
        turn = BasisFollower._turn

        def watched(self: BasisFollower, *args: Any) -> None:
            refreshes.append(self)
            turn(self, *args)

        patch.setattr(BasisFollower, "_turn", watched)
        for each in (made, resumed):
            train(each.model, each.optimizer, range(3, 12))
    assert bool(refreshes) is (kind in ("gradient", "both", "carried", "once"))
    assert_alike(resumed, made)


@pytest.mark.parametrize("fault", ["moments", "schedule"])
def test_a_resume_that_forgets_what_bases_follow_is_noticed(fault: str, tmp_path: Path) -> None:
    made = made_of(tmp_path, "gradient")
    load = BasisFollower.load_site_state

    def mutant(self: BasisFollower, i: int, state: Any) -> None:
        steps, due = self.steps, self.due
        moments = {side: moment.clone() for side, moment in self.moments.items()}
        load(self, i, state)
        if fault == "moments":
            self.moments = moments
        else:
            self.steps, self.due = steps, due

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BasisFollower, "load_site_state", mutant)
        resumed = reopened(made, adamw)
    for each in (made, resumed):
        train(each.model, each.optimizer, range(3, 12))
    with pytest.raises(AssertionError):
        assert_alike(resumed, made)


@pytest.mark.parametrize("kind", ["gradient", "both", "carried"])
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
    assert same(follower_states(resumed.over), follower_states(made.over))
    for model, stepped in ((made.model, optimizer), (resumed.model, again)):
        train(model, stepped, range(4, 10))
    assert_alike(resumed, made)


def test_another_rotated_optimizer_resumes_too(tmp_path: Path) -> None:
    made = made_of(tmp_path, "carried", make_optimizer=lambda p: NAdam(p, lr=1e-2))
    resumed = reopened(made, lambda p: NAdam(p, lr=1e-2))
    for each in (made, resumed):
        train(each.model, each.optimizer, range(3, 7))
    assert_alike(resumed, made)


def test_a_shared_basis_is_stored_once(tmp_path: Path) -> None:
    made = made_of(tmp_path, "both", target_modules=LINEAR)
    keys = [key for key in load_file(made.path / "loraover.safetensors") if key.endswith("lora_A.core.2")]
    assert sorted(key.split(".")[4] for key in keys) == sorted(2 * ["down_proj", "gate_proj", "o_proj", "q_proj"])


# Folded


@pytest.mark.parametrize("kind", ["gradient", "both", "trained", "neither"])
def test_a_fold_is_the_oracles_contraction_with_its_certificate(kind: str, tmp_path: Path) -> None:
    made = made_of(tmp_path, kind, steps=5)
    assert run(cli, ["fold", str(made.path), "-o", str(tmp_path / "folded")]) == 0
    folded = load_file(tmp_path / "folded" / "adapter_model.safetensors")
    expected = oracle_matrices(made.path)
    assert folded.keys() == expected.keys()
    for key, matrix in folded.items():
        difference = abs(numpy64(matrix) - nearest(expected[key], "fp32"))
        assert (difference <= 2.0**-23 * abs(expected[key])).all(), key  # a float64 sum that lies at a tie
        assert (difference == 0).mean() > 0.99
    certificate = FoldCertificate.model_validate_json((tmp_path / "folded" / "fold_certificate.json").read_bytes())
    assert {matrix.name for matrix in certificate.matrices} == set(made.over.injected)
    assert all(matrix.passed for matrix in certificate.matrices)


def test_the_unfolded_forward_is_the_adapters(tmp_path: Path) -> None:
    made = made_of(tmp_path, "both", steps=5)
    base = AutoModelForCausalLM.from_pretrained(made.base).eval()
    plain = logits(base)
    with unfolded(base, read_checkpoint(made.path)) as model:
        found = logits(model)
    assert (found - made.logits()).abs().max() < 1e-5
    assert (found - plain).abs().max() > 1e-2


# Refused

CORE = "model.layers.0.self_attn.q_proj.lora_A"
Change = Callable[[dict[str, Tensor]], object]


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


def _two_equal_columns(cores: dict[str, Tensor]) -> None:
    cores[f"{CORE}.core.0"][:, 1] = cores[f"{CORE}.core.0"][:, 0]


def _zero(cores: dict[str, Tensor]) -> None:
    cores[f"{CORE}.core.0"].zero_()


def _padding_mixed_in(cores: dict[str, Tensor]) -> None:
    """Orthogonal, but a turn would lose what it moves into the padding: 32 = 11 + 11 + 10."""
    basis = cores[f"{CORE}.core.2"].view(3, 11, 11)
    basis[2] = torch.linalg.qr(normal(0, 11, 11).float())[0]


@pytest.mark.parametrize(
    "change", [_scaled, _one_bit, _two_equal_columns, _zero, _padding_mixed_in], ids=lambda change: change.__name__
)
def test_bases_that_are_not_orthogonal_are_refused(change: Change, tmp_path: Path) -> None:
    made = made_of(tmp_path, "gradient")
    damaged(made, change)
    with pytest.raises(CheckpointError, match=rf"the bases of {CORE} are not orthogonal: V\^T V is \S+ away"):
        reopened(made, adamw)
    assert run(cli, ["fold", str(made.path), "-o", str(tmp_path / "folded")]) == 0  # a contraction needs no more


def test_trained_bases_need_not_be_orthogonal(tmp_path: Path) -> None:
    made = made_of(tmp_path, "trained")
    damaged(made, _scaled)
    reopened(made, adamw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1, 2, 8, 64, 256])
def test_the_bound_of_orthogonality_holds_with_room_and_is_not_loose(size: int, dtype: torch.dtype) -> None:
    factor = normal(size, 1, 1, size, size).to(dtype)
    basis = eigenvectors(factor @ factor.mT, Blocks(1, size, 1)).double()
    error = float((basis.mT @ basis - torch.eye(size)).abs().max())
    assert error <= orthogonality_error(size, dtype) / 2
    assert orthogonality_error(size, dtype) < (1e-2 if dtype == torch.float32 else 1e-11)


def shares(name: str, value: dict[str, str]) -> Callable[[dict[str, Any]], None]:
    def change(meta: dict[str, Any]) -> None:
        next(site for site in meta["sites"] if site["name"] == name)["shares"] = value

    return change


V, OUT, B = (f"model.layers.0.self_attn.{rest}" for rest in ("v_proj.lora_A", "o_proj.lora_A", "q_proj.lora_B"))
HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "another core": (shares(V, {"0": CORE}), f"{V}: shares: core 0 cannot be shared"),
    "the centre": (shares(V, {"1": CORE}), f"{V}: shares: core 1 cannot be shared"),
    "no such core": (shares(V, {"7": CORE}), f"{V}: shares: core 7 cannot be shared"),
    "a negative core": (shares(V, {"-1": CORE}), f"{V}: shares: core -1 cannot be shared"),
    "no such site": (shares(V, {"2": "nothing"}), f"{V}: shares: there is no site 'nothing'"),
    "another shape": (shares(V, {"2": B}), f"{V}: shares: {B} has another shape or step"),
    "one that holds none": (shares(V, {"2": OUT}), f"{V}: shares: {OUT} does not hold it itself"),
    "a circle": (shares(CORE, {"2": V}), "does not hold it itself"),
    "a number": (shares(V, {"2": 3}), r"sites\.\d+\.shares"),  # type: ignore[dict-item]
    "a key that is none": (shares(V, {"two": CORE}), r"sites\.\d+\.shares"),
    "absent": (lambda meta: meta["sites"][0].pop("shares"), r"sites\.0\.shares"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_shares_that_no_run_writes_are_refused(case: str, tmp_path: Path) -> None:
    made = made_of(tmp_path, "both")
    change, message = HOSTILE[case]
    edit_json(made.path / "loraover.json", change)
    reseal(made.path)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(made.path)


@pytest.mark.parametrize("kind", ["gradient", "trained"])
def test_what_follows_gradients_or_is_trained_is_not_shared(kind: str, tmp_path: Path) -> None:
    made = made_of(tmp_path, kind)
    edit_json(made.path / "loraover.json", shares(V, {"2": CORE}))
    edit_json(made.path / "loraover.json", shares(CORE, {"2": CORE}))
    reseal(made.path)
    with pytest.raises(CheckpointError, match="shares: core 2 cannot be shared"):
        read_checkpoint(made.path)


def test_a_core_of_another_decomposition_is_not_shared(tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path)
    edit_json(made.path / "loraover.json", shares(V, {"2": CORE}))
    reseal(made.path)
    with pytest.raises(CheckpointError, match="shares: core 2 cannot be shared"):
        read_checkpoint(made.path)


GAUGE: dict[str, tuple[Change, str]] = {
    "no counts": (lambda t: t.pop(f"{CORE}.gauge.counts"), "no tensor"),
    "no moment": (lambda t: t.pop(f"{CORE}.gauge.moment.rows"), "no tensor"),
    "another shape": (
        lambda t: t.update({f"{CORE}.gauge.moment.rows": torch.ones(3, 3)}),
        r"gauge\.moment\.rows is torch\.float32 \(3, 3\), expected torch\.float32 \(1, 4, 4\)",
    ),
    "another type": (lambda t: t.update({f"{CORE}.gauge.started.rows": torch.ones(())}), r"expected torch\.bool"),
    "short counts": (
        lambda t: t.update({f"{CORE}.gauge.counts": torch.tensor([1, 1])}),
        r"expected \S+ \(3,\)",
    ),
    "counts without a shape": (lambda t: t.update({f"{CORE}.gauge.counts": torch.tensor(3)}), r"expected torch\.int64"),
    "not finite": (lambda t: t[f"{CORE}.gauge.moment.rows"].fill_(torch.nan), "holds NaN"),
    "state of a basis": (
        lambda t: t.update({f"{CORE}.core.0.exp_avg": torch.ones(4, 4)}),
        r"core\.0 has optimizer state \(exp_avg\), but is not trained",
    ),
}


@pytest.mark.parametrize("case", GAUGE)
def test_moments_that_bases_cannot_follow_are_refused(case: str, tmp_path: Path) -> None:
    made = made_of(tmp_path, "gradient")
    change, message = GAUGE[case]
    edit_tensors(made.path / "loraover.safetensors", change)
    reseal(made.path)
    with pytest.raises(CheckpointError, match=message):
        reopened(made, adamw)


# The end of a run


def test_a_finished_run_leaves_plain_lora_and_readable_cores(tmp_path: Path) -> None:
    made = made_of(tmp_path, "both")
    before = lora_matrices(made.model)
    made.over.finish()
    assert [len(group["params"]) for group in made.optimizer.param_groups] == [16]
    train(made.model, made.optimizer, range(3, 4))
    assert not same(lora_matrices(made.model), before)
    for group in made.over.groups:
        for i, site in enumerate(group.sites):
            key = next(key for key in before if site.module in key and f"lora_{site.matrix}" in key)
            torch.testing.assert_close(group.contract()[i], before[key], rtol=0, atol=1e-6)


def test_adopted_matrices_survive_a_checkpoint(tmp_path: Path) -> None:
    made = made_of(tmp_path, "both")
    made.over.sites[V].parameter.data.fill_(0.25)
    assert made.over.adopt_matrices() == [V]
    save(made.path, made.model, made.over, step=3)
    resumed = reopened(made, adamw)
    assert_alike(resumed, made)
    for each in (made, resumed):
        train(each.model, each.optimizer, range(3, 8))
    assert_alike(resumed, made)
