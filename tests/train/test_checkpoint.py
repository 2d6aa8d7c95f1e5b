"""What is written is what is read: cores and optimizer state."""

from __future__ import annotations

import shutil
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.optim import SGD, AdamW, RMSprop
from transformers import Adafactor, AutoModelForCausalLM

from loraover import LoraOverConfig, OverParameterization, read_checkpoint, write_checkpoint
from loraover.checkpoint.checkpoint import Checkpoint
from loraover.checkpoint.peft_adapter import KEY_PREFIX, site_key, site_name
from loraover.checkpoint.tensor_file import open_tensors
from loraover.checkpoint.training_state import restore
from loraover.common.arrays import as_array, as_tensor
from loraover.common.errors import CheckpointError, ConfigError
from loraover.overparam.decompositions import DECOMPOSITIONS

from strategies import SEEDS, expansions, sizes
from support.hooked_run import same
from support.make_checkpoint import (
    MakeOptimizer,
    cores_of,
    edit_tensors,
    lora_model,
    make_checkpoint,
    reopened,
    reseal,
    save,
    train,
    tree,
)
from support.optimizers import adamw_8bit
from support.parallel_run import cores as everything
from support.speed import examples
from support.tiny_models import fill_b
from tolerances import UNIT, gamma

OPTIMIZERS: dict[str, MakeOptimizer] = {
    "adamw": lambda p: AdamW(p, lr=1e-2, amsgrad=True),
    "adamw-fused": lambda p: AdamW(p, lr=1e-2, fused=True),
    "adamw-8bit": adamw_8bit,
    "adafactor": lambda p: Adafactor(p, lr=1e-2, relative_step=False, scale_parameter=False),
    "sgd": lambda p: SGD(p, lr=1e-2, momentum=0.9),
    "rmsprop": lambda p: RMSprop(p, lr=1e-3, centered=True),
}
FEW = examples(20, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read_cores(found: Checkpoint) -> dict[str, Tensor]:
    with open_tensors(found.cores_path) as file:
        return {
            site.core_key(k): as_tensor(core[0])
            for site in found.meta.sites
            for k, core in enumerate(found.read_cores(file, site))
        }


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [key for key in one if one[key].dtype != other[key].dtype or not torch.equal(one[key], other[key])]
    assert different == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_cores_and_metadata_are_read_as_they_were_written(dtype: torch.dtype, tmp_path: Path) -> None:
    config = LoraOverConfig(sites=["*.q_proj.*", "*.v_proj.lora_A"], seed=11)
    made = make_checkpoint(tmp_path, config=config, dtype=dtype, steps=3)
    found = read_checkpoint(made.path)
    assert_equal(read_cores(found), cores_of(made.over))
    assert found.sites.keys() == made.over.injected.keys()
    assert len(found.sites) == 6
    assert len(found.matrices) == 8
    assert found.meta.config == config
    assert found.meta.step == 3
    assert found.meta.base_model == str(made.base)
    assert found.meta.core_dtype == ("float64" if dtype == torch.float64 else "float32")


class Pair(nn.Module):
    """One layer to adapt."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.layer = nn.Linear(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


OPTIONS: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "mpo": st.fixed_dictionaries({"num_cores": st.integers(2, 4)}, optional={"expansion": expansions()}),
    "svd": st.just({}),
    "chain": st.fixed_dictionaries({"depth": st.integers(2, 4), "expansion": expansions()}),
    "eigen": st.fixed_dictionaries(
        {
            "short": st.sampled_from(["gradient", "none"]),
            "long": st.sampled_from(["gradient", "none"]),
            "block": st.sampled_from([1, 3, 4, 64]),
        }
    ),
}


@pytest.mark.parametrize("name", DECOMPOSITIONS)
@given(data=st.data(), in_features=sizes(), out_features=sizes(), r=st.integers(1, 5), seed=SEEDS)
@FEW
def test_write_then_read_is_identity_for_every_shape(
    name: str,
    data: st.DataObject,
    in_features: int,
    out_features: int,
    r: int,
    seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    model = get_peft_model(Pair(in_features, out_features), LoraConfig(r=r, target_modules=["layer"]))
    fill_b(model, seed)
    config = LoraOverConfig(decomposition=name, options=data.draw(OPTIONS[name]), seed=seed)
    over = OverParameterization(model, config)
    path = tmp_path_factory.mktemp("pair")
    model.save_pretrained(path)
    write_checkpoint(path, over, step=0)
    found = read_checkpoint(path)
    assert_equal(read_cores(found), cores_of(over))
    assert found.meta.config == config
    shutil.rmtree(path)


@pytest.mark.parametrize(
    ("decomposition", "optimizer"),
    [*((name, "adamw") for name in DECOMPOSITIONS), *(("mpo", name) for name in OPTIMIZERS if name != "adamw")],
)
def test_resumed_training_is_uninterrupted_training(decomposition: str, optimizer: str, tmp_path: Path) -> None:
    config = LoraOverConfig(decomposition=decomposition, seed=5)
    made = make_checkpoint(tmp_path, config=config, make_optimizer=OPTIMIZERS[optimizer])
    before = tree(made.path)
    resumed = reopened(made, OPTIMIZERS[optimizer])
    assert tree(made.path) == before
    for each in (made, resumed):
        train(each.model, each.optimizer, range(2, 5))
    assert same(everything(resumed.over), everything(made.over))
    assert len(everything(made.over)) >= len(cores_of(made.over)) + 8
    assert torch.equal(resumed.logits(), made.logits())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_adapter_that_peft_has_widened_resumes(dtype: torch.dtype, tmp_path: Path) -> None:
    """PEFT loads 16-bit matrices as float32, unless it is told not to; then the run repeats the same steps."""
    made = make_checkpoint(tmp_path, dtype=dtype, make_optimizer=OPTIMIZERS["adamw"])
    exact = reopened(made, OPTIMIZERS["adamw"])
    widened = reopened(made, OPTIMIZERS["adamw"], autocast_adapter_dtype=True)
    assert {site.parameter.dtype for site in widened.over.sites.values()} == {torch.float32}
    assert_equal(cores_of(widened.over), cores_of(made.over))
    kept = {name: site.values.to(dtype) for name, site in widened.over.sites.items()}
    assert all(torch.equal(kept[name], site.values) for name, site in made.over.sites.items())
    for each in (made, exact, widened):
        train(each.model, each.optimizer, range(2, 4))
    assert torch.equal(exact.logits(), made.logits())
    over = OverParameterization(reopened(made, OPTIMIZERS["adamw"]).model, made.over.config, inject=False)
    site = next(iter(over.sites.values()))
    site.values[0, 0] *= 1 + 4 * torch.finfo(dtype).eps
    with pytest.raises(CheckpointError, match="contradicts its cores"):
        restore(over, read_checkpoint(made.path))


@pytest.mark.parametrize(("option", "device"), [("fused", "meta"), ("capturable", "meta"), ("foreach", "cpu")])
def test_a_resumed_step_count_lies_where_the_optimizer_looks_for_it(option: str, device: str, tmp_path: Path) -> None:
    """The stacks of cores lie on another device than the file's tensors, as they do on a GPU."""
    made = make_checkpoint(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(made.base)
    model: Any = PeftModel.from_pretrained(base, made.path, is_trainable=True)
    over = OverParameterization(model, made.over.config, inject=False)
    restore(over, read_checkpoint(made.path))
    for group in over.groups:
        group.stacks = [stack.to("meta") for stack in group.stacks]
    options: dict[str, Any] = {option: True}
    over.attach(AdamW([p for p in model.parameters() if p.requires_grad], **options))
    states = [state for group in over.groups for state in group.state.values()]
    assert {state["step"].device.type for state in states} == {device}


@pytest.mark.parametrize("options", [{"modes": {4: (2, 2, 1)}}, {"bonds": (32, 32)}], ids=["modes", "bonds"])
def test_a_run_resumes_with_options_that_json_writes_in_another_way(options: dict[str, Any], tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path, config=LoraOverConfig(options=options, seed=5))
    assert_equal(cores_of(reopened(made, OPTIMIZERS["adamw"]).over), cores_of(made.over))


def test_cores_of_several_adapters_are_not_restored(tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path, steps=0)
    made.model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    made.model.base_model.set_adapter(["default", "second"])
    over = OverParameterization(made.model, made.over.config, inject=False)
    with pytest.raises(ConfigError, match=r"2 adapters are trained at once \(default, second\)"):
        restore(over, read_checkpoint(made.path))


def test_each_adapter_gets_its_own_cores(tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path, steps=0)
    model = lora_model(made.base)
    with torch.random.fork_rng(devices=[]):
        model.add_adapter("second", LoraConfig(r=2, target_modules=["k_proj", "q_proj"]))
    fill_b(model, seed=4)
    model.base_model.set_adapter(["default", "second"])
    over = OverParameterization(model, LoraOverConfig(seed=5))
    over.attach(optimizer := OPTIMIZERS["adamw"]([p for p in model.parameters() if p.requires_grad]))
    train(model, optimizer, range(2))
    path = tmp_path / "both"
    save(path, model, over, step=2)
    for folder, prefix, modules in ((path, "", "qv"), (path / "second", "second:", "qk")):
        found = read_checkpoint(folder)
        expected = {
            key.removeprefix(prefix): core for key, core in cores_of(over).items() if (":" in key) == bool(prefix)
        }
        assert_equal(read_cores(found), expected)
        assert {name.split("_proj")[0][-1] for name in found.sites} == set(modules)


@pytest.mark.parametrize("name", ["m.q_proj.lora_A", "m.lora_B.lora_B", "embed.lora_embedding_A", "e.lora_embedding_B"])
def test_site_names_and_tensor_keys_are_one_to_one(name: str) -> None:
    assert site_name(site_key(name)) == name
    assert site_key(name).startswith(KEY_PREFIX)
    assert site_key(name).endswith(".weight") == ("embedding" not in name)


@pytest.mark.parametrize("key", ["m.q_proj.lora_B.bias", "lm_head.weight", "m.lora_A", "e.lora_embedding_A.weight"])
def test_other_tensors_are_no_sites(key: str) -> None:
    assert site_name(KEY_PREFIX + key) is None


def test_writing_beside_no_adapter_is_refused(tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path, steps=0)
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "absent"):
        with pytest.raises(CheckpointError, match=folder.name):
            write_checkpoint(folder, made.over, step=0)
    assert list((tmp_path / "empty").iterdir()) == []


def test_an_adapter_without_cores_is_refused(tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path, steps=0)
    with pytest.raises(CheckpointError, match="'other' has no over-parameterised site"):
        write_checkpoint(made.path, made.over, step=0, adapter="other")


def test_an_optimizer_that_keeps_lists_is_refused_when_it_is_saved(tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path)
    group = made.over.groups[0]
    group.state[group.parameters(group.centre)[0]]["history"] = [1.0]
    with pytest.raises(CheckpointError, match="the optimizer's state 'history' is a list"):
        write_checkpoint(made.path, made.over, step=2)


@pytest.mark.parametrize("matrix", ["A", "B"])
def test_resuming_a_model_whose_matrices_contradict_the_cores_is_refused(matrix: str, tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path, steps=0)
    key = site_key(f"model.layers.1.self_attn.v_proj.lora_{matrix}")

    def flip(tensors: dict[str, Tensor]) -> None:
        tensors[key][1, 1] *= -1

    edit_tensors(made.path / "adapter_model.safetensors", flip)
    reseal(made.path)
    with pytest.raises(CheckpointError, match=rf"{key} contradicts its cores: element \(1, 1\)"):
        reopened(made, OPTIMIZERS["adamw"])


def test_stored_products_may_be_flushed_to_zero_but_differ_by_no_more(tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path)
    checkpoint = read_checkpoint(made.path)
    site, decomposition = checkpoint.meta.sites[0], checkpoint.decomposition
    with open_tensors(checkpoint.cores_path) as file:
        first, *others = map(as_tensor, checkpoint.read_cores(file, site))
    cores = [first * 2.0**-125, *others]
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor flushes no subnormals to zero")
    try:
        stored = decomposition.contract(cores, site.m, site.n)[0]
    finally:
        torch.set_flush_denormal(False)
    arrays = list(map(as_array, cores))
    found, _ = checkpoint.check_stored(as_array(stored), arrays, site)
    matrix = as_tensor(found)
    assert (stored != matrix.float()).any()
    sums, terms = len(cores) - 1, decomposition.contraction_terms(site.m, site.n)
    largest = prod(max(1.0, float(core.abs().max())) for core in cores)
    lost = 2 * len(cores) * (terms / sums) ** sums * largest * 2.0**-126
    checkpoint.check_stored(as_array((matrix + 0.99 * lost).float()), arrays, site)
    with pytest.raises(CheckpointError, match="contradicts its cores"):
        checkpoint.check_stored(as_array((matrix + 1.01 * lost).float()), arrays, site)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_stored_element_may_be_off_by_both_roundings_and_by_no_more(sign: float, tmp_path: Path) -> None:
    """gamma_k(u) times the product of absolute values for the contraction, and u times the element for the cast."""
    made = make_checkpoint(tmp_path)
    checkpoint = read_checkpoint(made.path)
    site, decomposition, u = checkpoint.meta.sites[0], checkpoint.decomposition, UNIT[torch.float32]
    with open_tensors(checkpoint.cores_path) as file:
        arrays = checkpoint.read_cores(file, site)
    cores = [as_tensor(core).double() for core in arrays]
    matrix, magnitude = (decomposition.contract(each, site.m, site.n)[0] for each in (cores, [c.abs() for c in cores]))
    allowed = gamma(decomposition.contraction_terms(site.m, site.n), u) * magnitude * (1 + u) + u * matrix.abs()
    checkpoint.check_stored(as_array((matrix + sign * 0.8 * allowed).float()), arrays, site)
    with pytest.raises(CheckpointError, match="contradicts its cores"):
        checkpoint.check_stored(as_array((matrix + sign * 1.2 * allowed).float()), arrays, site)
