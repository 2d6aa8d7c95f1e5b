"""Training of experts through cores: a site for each expert's slice of PEFT's stacked matrices."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.func import functional_call

from loraover import Budget, LoraOverConfig, OverParameterization, read_checkpoint, restore, write_checkpoint
from loraover.checkpoint.source import read_source
from loraover.common.errors import CheckpointError, ConfigError
from loraover.overparam.probe import Probe
from loraover.reference import unfolded
from loraover_export import fold_checkpoint

from support.plain_adapter import write_adapter
from support.tiny_experts import EXPERT_LORA, EXPERTS, PARAMETERS, expert_lora, peft_deltas, tiny_llama4, tiny_moe
from support.tiny_models import lora_matrices, token_ids, trainable, update_norm, with_lora
from support.versions import needs_expert_stacks

pytestmark = needs_expert_stacks

RATE = 1e-2
FIRST = ["*.experts.0.*", "*.experts.1.*"]
"""Half of the experts."""


def moe(folder: Path, **lora: Any) -> PeftModel:
    """An adapter of attention and experts in float64, in training mode."""
    model = expert_lora(tiny_moe(), folder, **lora).double().train()
    model.get_base_model().set_experts_implementation("eager")  # others have no float64
    return model


def loss(model: Any, step: int) -> Tensor:
    ids = token_ids(seed=step)
    found: Tensor = model(input_ids=ids, labels=ids).loss
    return found


def train(model: Any, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        torch.autograd.backward(loss(model, step))
        optimizer.step()
        optimizer.zero_grad()


def adamw(model: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(trainable(model), lr=RATE, weight_decay=0.1)


def stacked(cores: dict[str, list[Tensor]], over: OverParameterization, names: dict[int, str]) -> dict[str, Tensor]:
    """PEFT's parameters by name, from cores by site."""
    found: dict[str, list[Tensor]] = {}
    for name, site in over.sites.items():
        group, _ = over.injected[name]
        matrix = group.decomposition.contract([core.unsqueeze(0) for core in cores[name]], *site.shape)[0]
        found.setdefault(names[id(site.parameter)], []).append(matrix)
    return {
        name: parts[0]
        if len(parts) == 1
        else torch.cat(parts)
        if "lora_A" in name
        else torch.stack(parts, -1).flatten(1)
        for name, parts in found.items()
    }


def test_steps_are_those_of_autograd_through_the_cores(tmp_path: Path) -> None:
    """AdamW on every core by itself, in a model whose stacks are functions of the cores, gives the same matrices."""
    model, twin = moe(tmp_path / "a"), moe(tmp_path / "a")
    over = OverParameterization(model, LoraOverConfig(seed=0))
    assert sum("experts" in name for name in over.sites) == 2 * 2 * 2 * EXPERTS
    cores = {
        name: [group.core(k, i).clone().requires_grad_() for k in range(len(group.stacks))]
        for name, (group, i) in over.injected.items()
    }
    names = {id(p): name for name, p in model.named_parameters()}
    theirs = torch.optim.AdamW([core for found in cores.values() for core in found], lr=RATE, weight_decay=0.0)
    optimizer = torch.optim.AdamW(trainable(model), lr=RATE, weight_decay=0.0)
    over.attach(optimizer)
    for step in range(3):
        train(model, optimizer, range(step, step + 1))
        ids = token_ids(seed=step)
        found = functional_call(twin, stacked(cores, over, names), (), {"input_ids": ids, "labels": ids}).loss
        found.backward()
        theirs.step()
        theirs.zero_grad()
    assert not optimizer.state
    for name, expected in stacked(cores, over, names).items():
        torch.testing.assert_close(dict(model.named_parameters())[name], expected, rtol=1e-9, atol=1e-12)


def test_other_experts_train_as_without_cores(tmp_path: Path) -> None:
    """In the first step, which a gradient of another slice would change, and an expert with cores follows its cores."""
    model, plain = moe(tmp_path / "a"), moe(tmp_path / "a")
    before = lora_matrices(model)
    over = OverParameterization(model, LoraOverConfig(seed=0, sites=FIRST))
    optimizer = adamw(model)
    over.attach(optimizer)
    train(model, optimizer, range(1))
    train(plain, adamw(plain), range(1))
    expected = lora_matrices(plain)
    for name, matrix in lora_matrices(model).items():
        assert not torch.equal(matrix, before[name])
        if "experts" in name:
            ours, theirs = (
                m.reshape(EXPERTS, -1, m.shape[1])
                if "lora_A" in name
                else m.reshape(len(m), -1, EXPERTS).permute(2, 0, 1)
                for m in (matrix, expected[name])
            )
            assert torch.equal(ours[2:], theirs[2:]), name
            assert not torch.equal(ours[:2], theirs[:2])
    for name, (group, i) in over.injected.items():
        assert torch.equal(group.contract()[i], over.sites[name].values)


EIGEN: dict[str, Any] = {"decomposition": "eigen", "options": {"block": 8, "growth": 1}}


@pytest.mark.parametrize("settings", [{}, {"sites": FIRST}, EIGEN], ids=["all", "half", "eigen"])
def test_a_resumed_run_is_the_whole_one(tmp_path: Path, settings: dict[str, Any]) -> None:
    config = LoraOverConfig(seed=0, **settings)
    model = moe(tmp_path / "a")
    over = OverParameterization(model, config)
    optimizer = adamw(model)
    over.attach(optimizer)
    train(model, optimizer, range(2))
    model.save_pretrained(tmp_path / "saved")
    write_checkpoint(tmp_path / "saved", over, step=2)
    plain = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, range(2, 4))

    base = tiny_moe().double()
    base.set_experts_implementation("eager")
    again = PeftModel.from_pretrained(base, tmp_path / "saved", is_trainable=True, autocast_adapter_dtype=False).train()
    resumed = OverParameterization(again, config, inject=False)
    restore(resumed, read_checkpoint(tmp_path / "saved"))
    optimizer = adamw(again)
    optimizer.load_state_dict(plain)
    resumed.attach(optimizer)
    train(again, optimizer, range(2, 4))
    expected = lora_matrices(model)
    for name, matrix in lora_matrices(again).items():
        assert torch.equal(matrix, expected[name]), name


def test_the_folded_adapter_is_the_unfolded_model(tmp_path: Path) -> None:
    """Of a model whose router is adapted too, whatever its class is called; PEFT runs the fold."""
    base = tiny_moe()
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    model = expert_lora(base, tmp_path / "a", target_parameters=[*PARAMETERS, "mlp.gate.weight"]).train()
    over = OverParameterization(model, LoraOverConfig(seed=0))
    optimizer = adamw(model)
    over.attach(optimizer)
    train(model, optimizer, range(2))
    model.save_pretrained(tmp_path / "saved")
    write_checkpoint(tmp_path / "saved", over, step=2)
    certificate = fold_checkpoint(tmp_path / "saved", tmp_path / "folded", check_error=True)
    assert certificate.passed
    assert sum("experts" in matrix.name for matrix in certificate.matrices) == 2 * 2 * 2 * EXPERTS
    served = PeftModel.from_pretrained(tiny_moe(), tmp_path / "folded").eval()
    ids = token_ids(seed=9)
    renamed = tiny_moe()
    for layer in renamed.model.layers:
        layer.mlp.gate.__class__ = type("Gate", (type(layer.mlp.gate),), {})
    with torch.no_grad(), unfolded(renamed, read_checkpoint(tmp_path / "saved")) as whole:
        expected = whole(input_ids=ids).logits
    plain = tiny_moe()(input_ids=ids).logits.detach()
    torch.testing.assert_close(served(input_ids=ids).logits.detach(), expected, rtol=0, atol=1e-5)
    assert float((expected - plain).abs().max()) > 1e-2


def test_a_weight_is_adapted_as_peft_adapts_it(tmp_path: Path) -> None:
    """Llama-4's router is a linear layer with two outputs; PEFT adds to its weight because the file names it."""
    model = expert_lora(tiny_llama4(), tmp_path, target_parameters=["feed_forward.router.weight"])
    ids = token_ids(seed=3)
    with torch.no_grad(), unfolded(tiny_llama4(), read_source(tmp_path)) as whole:
        torch.testing.assert_close(whole(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=1e-5)


def test_a_router_may_be_named_as_the_linear_layer_that_it_was(tmp_path: Path) -> None:
    """PEFT takes the target module `gate` for the parameter; a matrix elsewhere, of an unknown class, is refused."""
    expert_lora(tiny_moe(), tmp_path / "a", target_parameters=["mlp.gate.weight"])
    file = tmp_path / "a" / "adapter_config.json"
    targets = {"target_parameters": None, "target_modules": ["q_proj", "v_proj", "gate"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | targets))
    ids = token_ids(seed=3)
    served = PeftModel.from_pretrained(tiny_moe(), tmp_path / "a").eval()
    with torch.no_grad(), unfolded(tiny_moe(), read_source(tmp_path / "a")) as whole:
        torch.testing.assert_close(whole(input_ids=ids).logits, served(input_ids=ids).logits, rtol=0, atol=1e-5)
    write_adapter(tmp_path / "b", {"table": (torch.ones(2, 8), torch.ones(6, 2))})
    with (
        pytest.raises(CheckpointError, match="table is a Table; expected a linear layer or embedding"),
        unfolded(nn.ModuleDict({"table": Table()}), read_source(tmp_path / "b")),
    ):
        pass


def test_the_norm_of_the_update_is_that_of_all_experts(tmp_path: Path) -> None:
    model = expert_lora(tiny_moe(), tmp_path / "a", target_modules=[])
    squares = [delta.double().square().sum() for delta in peft_deltas(model).values()]
    assert update_norm(model) == pytest.approx(math.sqrt(sum(map(float, squares))), rel=1e-5)


class Table(nn.Module):
    """A layer with a matrix as its weight, which nothing says how to use."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6, 8))


class Fused(nn.Module):
    """A layer whose matrices are a parameter of another name."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = nn.Parameter(torch.ones(2, 4, 4))


def test_bases_of_experts_are_not_measured(tmp_path: Path) -> None:
    config = LoraOverConfig(decomposition="eigen", options={"long": "calibration"})
    model = moe(tmp_path / "a")
    with pytest.raises(ConfigError, match=r"several experts is a single layer; .* \{short: gradient, long: gradient\}"):
        OverParameterization(model, config, probe=Probe(model, [0], loss))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (
            lambda: with_lora(
                nn.ModuleDict({"layer": Fused()}), target_modules=[], target_parameters=["layer.kernels"]
            ),
            r"layer: LoRA through target_parameters is supported .*, not for kernels",
        ),
        (lambda: with_lora(tiny_moe(), **EXPERT_LORA), "loss_impact .* cannot switch off one expert"),
    ],
    ids=["another parameter", "loss_impact"],
)
def test_what_needs_a_whole_layer_is_refused(build: Callable[[], Any], reason: str) -> None:
    model = build()
    probe = Probe(model, [0], loss)
    with pytest.raises(ConfigError, match=reason):
        OverParameterization(
            model, LoraOverConfig(schedule="static", score="loss_impact", budget=Budget(sites=2)), probe=probe
        )
