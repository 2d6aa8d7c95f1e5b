"""Weighted sums of adapters, against NumPy's sums of dense deltas and PEFT's own model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from loraover.adapters.combine.combine import add_deltas
from loraover.adapters.numerics.delta import Delta
from loraover.adapters.uniform.write_lora import Approximation, LoraOutput, write_lora
from loraover.checkpoint.exact_tensors import Exact
from loraover.common.command_line import run
from loraover.common.errors import ExportError
from loraover_export import combine_adapters, shrink_adapter
from loraover_export.cli import cli

from strategies import matrices, normal, sizes
from support.adapters_on_disk import deltas, save_base, save_lora
from support.make_checkpoint import edit_json, edit_tensors
from support.merge_cases import outputs
from support.refusals import Refused
from support.speed import examples
from support.tiny_models import fill_b
from support.vllm_damage import config
from tolerances import UNIT

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model and adapters that tests only read."""
    folder = tmp_path_factory.mktemp("made")
    base = save_base(folder / "base")
    save_lora(base, folder / "one", 1)
    save_lora(base, folder / "rslora", 2, use_rslora=True, r=3, target_modules=["q_proj", "down_proj"])
    save_lora(base, folder / "patterns", 3, rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 7})
    save_lora(base, folder / "embedding", 4, target_modules=["embed_tokens", "v_proj"])
    save_lora(base, folder / "bf16", 5, torch.bfloat16, r=1)
    return folder


def added(folders: list[Path], weights: list[float]) -> dict[str, Any]:
    total: dict[str, Any] = {}
    for folder, weight in zip(folders, weights, strict=True):
        for module, delta in deltas(folder).items():
            total[module] = total.get(module, 0) + weight * delta
    return total


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_sum_of_many_kinds(dtype: str, made: Path, tmp_path: Path) -> None:
    names = ["one", "rslora", "patterns", "embedding", "bf16"]
    weights = [0.7, -0.3, 1.0, 2.0, 0.5]
    folders = [made / name for name in names]
    certificate = combine_adapters(folders, tmp_path / "out", weights=weights, dtype=dtype)
    found, expected = deltas(tmp_path / "out"), added(folders, weights)
    assert found.keys() == expected.keys()
    assert certificate.passed
    for module in certificate.modules:
        truth = expected[module.module]
        distance = float(np.linalg.norm(found[module.module] - truth))
        assert module.norm == pytest.approx(float(np.linalg.norm(truth)), rel=1e-12)
        assert distance <= module.error_bound + 1e-14 * module.norm
        assert distance >= 0.9 * module.storage_error - 1e-14 * module.norm
        assert (
            module.relative_error_bound
            <= 8 * UNIT[{"fp32": torch.float32, "bf16": torch.bfloat16}.get(dtype, torch.float16)]
        )
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config["r"] == config["lora_alpha"] == certificate.rank == 4 + 4 + 4 + 1
    assert (config["rank_pattern"], config["alpha_pattern"], config["use_rslora"]) == ({}, {}, False)
    assert config["base_model_name_or_path"] == certificate.base_model == str(made / "base")
    assert [record.path for record in certificate.sources] == list(map(str, folders))
    assert all(set(record.sha256) == {CONFIG, TENSORS} for record in certificate.sources)


def test_peft_adds_the_adapters_alike(made: Path, tmp_path: Path) -> None:
    """Its model with both adapters active is the base model with the sum."""
    combine_adapters([made / "one", made / "embedding"], tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(made / "base")
    plain = outputs(model)
    both = PeftModel.from_pretrained(model, made / "one", adapter_name="one")
    both.load_adapter(made / "embedding", adapter_name="other")
    both.base_model.set_adapter(["one", "other"])
    expected = outputs(both)
    ours = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(made / "base"), tmp_path / "out")
    allowed = 256 * UNIT[torch.float32] * float(expected.abs().max())
    assert float((outputs(ours) - expected).abs().max()) <= allowed
    assert float((plain - expected).abs().max()) > 1000 * allowed


@pytest.mark.parametrize("name", ["one", "rslora", "patterns", "embedding", "bf16"])
def test_one_adapter_keeps_its_delta_exactly(name: str, made: Path, tmp_path: Path) -> None:
    """A is the stored one bit for bit, and B is scaled by alpha / r: here by a power of two, so that it is exact."""
    source = shutil.copytree(made / name, tmp_path / name)
    r = json.loads((source / CONFIG).read_text())["r"]
    alpha = 2.0 * r if name != "rslora" else 2.0 * r**0.5
    edit_json(source / CONFIG, lambda config: config.update(lora_alpha=alpha, alpha_pattern={}))
    combine_adapters([source], tmp_path / "out", weights=[1.0])
    stored, written = load_file(source / TENSORS), load_file(tmp_path / "out" / TENSORS)
    for key, tensor in written.items():
        if key.endswith("base_layer.weight"):
            assert torch.equal(tensor, stored[key])
            continue
        before = stored[key].float()
        rank = before.shape[0 if "_A" in key else 1]
        factor = 1.0 if "_A" in key else alpha / (rank**0.5 if name == "rslora" else rank)
        kept = tensor[:rank] if "_A" in key else tensor[:, :rank]
        assert torch.equal(kept, factor * before)
        assert int(tensor.count_nonzero()) == int(kept.count_nonzero()) > 0
    assert any("embed" in key for key in written) == (name == "embedding")


def test_a_weight_of_zero_leaves_an_adapter_out(made: Path, tmp_path: Path) -> None:
    """As at the end of a sweep over weights; of the embedding, neither matrices nor its base weights are left."""
    certificate = combine_adapters([made / "one", made / "embedding"], tmp_path / "out", weights=[0.5, 0])
    combine_adapters([made / "one"], tmp_path / "alone", weights=[0.5])
    found, expected = (load_file(tmp_path / name / TENSORS) for name in ("out", "alone"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())
    assert len(certificate.sources) == 2


@pytest.fixture
def resized(made: Path, tmp_path: Path) -> Any:
    """A PEFT model of 66 tokens on a base model of 64, saved as "resized"; its file has the only copy of two rows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_pretrained(made / "base")
        model.resize_token_embeddings(66)
        options = {"target_modules": ["embed_tokens", "lm_head"], "task_type": "CAUSAL_LM"}
        peft = get_peft_model(model, LoraConfig(r=4, **options))
    fill_b(peft, 1)
    peft.save_pretrained(tmp_path / "resized")
    return peft


@torch.no_grad()
def test_rows_of_new_tokens_are_taken_over(resized: Any, made: Path, tmp_path: Path) -> None:
    certificate = combine_adapters([tmp_path / "resized"], tmp_path / "out")
    shrink_adapter(tmp_path / "resized", tmp_path / "smaller", rank=2)
    assert any("taken over as they are: base_model.model.lm_head.base_layer" in note for note in certificate.notes)
    stored = load_file(tmp_path / "resized" / TENSORS)
    for folder in ("out", "smaller"):
        held = {key: t for key, t in load_file(tmp_path / folder / TENSORS).items() if "base_layer" in key}
        assert held.keys() == {key for key in stored if "base_layer" in key}
        assert all(torch.equal(tensor, stored[key]) for key, tensor in held.items())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        other = AutoModelForCausalLM.from_pretrained(made / "base")
        other.resize_token_embeddings(66)
    ids = torch.tensor([[5, 64, 65, 9]])
    plain = other(input_ids=ids).logits
    expected = resized.eval()(input_ids=ids).logits
    found = PeftModel.from_pretrained(other, tmp_path / "out").eval()(input_ids=ids).logits
    allowed = 256 * UNIT[torch.float32] * float(expected.abs().max())
    assert float((found - expected)[..., 64:].abs().max()) <= allowed
    assert float((plain - expected)[..., 64:].abs().max()) > 1000 * allowed


def test_different_rows_of_one_embedding_are_refused(made: Path, tmp_path: Path) -> None:
    other = shutil.copytree(made / "embedding", tmp_path / "other")
    edit_tensors(other / TENSORS, lambda found: next(t for key, t in found.items() if "base_layer" in key)[3].add_(1))
    with pytest.raises(ExportError, match=r"hold different weights as .*embed_tokens\.base_layer"):
        combine_adapters([made / "embedding", other], tmp_path / "out")
    assert combine_adapters([made / "embedding", made / "embedding"], tmp_path / "out").passed


def test_equal_subspaces_are_merged(made: Path, tmp_path: Path) -> None:
    """Two adapters with the same A, as after one seed, need no more rank than one of them."""
    other = shutil.copytree(made / "one", tmp_path / "other")
    edit_tensors(
        other / TENSORS, lambda found: found.update({k: -0.3 * v.flip(0) for k, v in found.items() if "lora_B" in k})
    )
    certificate = combine_adapters([made / "one", other], tmp_path / "out", weights=[0.5, 2])
    expected = added([made / "one", other], [0.5, 2])
    assert certificate.rank == 4
    for module, delta in deltas(tmp_path / "out").items():
        assert np.linalg.norm(delta - expected[module]) <= 1e-6 * np.linalg.norm(expected[module])


def test_modules_that_cancel_are_written_as_zero_and_named(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(made / "one", tmp_path / "other")
    edit_tensors(
        other / TENSORS, lambda found: found.update({k: 2 * v for k, v in found.items() if "k_proj.lora_B" in k})
    )
    command = ["combine", str(made / "one"), str(other), "-o", str(tmp_path / "out"), "--weights", "1,-1", "--json"]
    assert run(cli, command) == 0
    out, err = capsys.readouterr()
    assert "12 modules have a delta of zero" in err
    assert {m["module"].rpartition(".")[2] for m in json.loads(out)["modules"] if m["rank"]} == {"k_proj"}
    for module, delta in deltas(tmp_path / "out").items():
        assert bool(delta.any()) == module.endswith("k_proj")


def mirror(found: dict[str, Tensor]) -> None:
    found.update({key: tensor.flip(0, 1) for key, tensor in found.items()})


def to_other_shape(folder: Path) -> None:
    wide = {"q_proj.lora_A": (4, 31)}
    edit_tensors(
        folder / TENSORS,
        lambda found: found.update({k: torch.ones(s) for k in found for part, s in wide.items() if part in k}),
    )


def nothing(folder: Path) -> None:
    pass


REFUSED: dict[str, tuple[Callable[[Path], object], list[str], str]] = {
    "another base": (
        config(base_model_name_or_path="owner/other"),
        [],
        "other: trained on owner/other. Deltas fit one base model only",
    ),
    "no base": (config(base_model_name_or_path=None), [], "names no base model"),
    "another revision": (config(revision="abc"), [], "@abc"),
    "another shape": (to_other_shape, [], "q_proj is 32 x 32 in"),
    "cancelling": (nothing, ["--weights=0.3,-0.3"], "their weights cancel"),
    "cancelling by rounding": (config(lora_alpha=10), ["--weights=0.6,-0.3"], "their weights cancel"),
    "a weight too many": (nothing, ["--weights=1,1,1"], "--weights has 3 numbers for 2 adapters"),
    "weights of zero": (nothing, ["--weights=0,0"], "or change --weights"),
    "an infinite weight": (nothing, ["--weights=1,inf"], "--weights: inf cannot be used; give finite numbers"),
    "a saved module": (
        config(modules_to_save=["lm_head"]),
        [],
        "merge it into its base model with `loraover export merge`",
    ),
    "trained tokens": (
        config(trainable_token_indices=[1, 2]),
        [],
        "or make it a plain LoRA with `loraover export convert`.",
    ),
    "beyond the type": (
        lambda folder: edit_tensors(folder / TENSORS, mirror),
        ["--weights=1,1e9", "--dtype", "fp16"],
        "exceeds the largest float16 number",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input(case: str, made: Path, tmp_path: Path, refused: Refused) -> None:
    change, options, message = REFUSED[case]
    other = shutil.copytree(made / "one", tmp_path / "other")
    change(other)
    refused("combine", made / "one", other, *options, named=(message,))


def test_a_revision_that_is_not_named_is_main(made: Path, tmp_path: Path) -> None:
    other = shutil.copytree(made / "one", tmp_path / "other")
    edit_json(other / CONFIG, lambda config: config.update(revision="main"))
    assert combine_adapters([made / "one", other], tmp_path / "out").passed


@st.composite
def sums(draw: Any) -> list[tuple[Delta, float]]:
    """Deltas of one module; some share their A or their B, or are the same."""
    m, n = draw(sizes()), draw(sizes())
    found: list[tuple[Delta, float]] = []
    for _ in range(draw(st.integers(1, 3))):
        r = draw(sizes())
        a, b = draw(matrices(r, n))[0], draw(matrices(m, r))[0]
        if found and draw(st.sampled_from([True, False])):
            a = found[0][0].a.value
            b = draw(matrices(m, len(a)))[0]
        zeros = [x.new_zeros(()).expand_as(x) for x in (a, b)]
        weight = draw(st.sampled_from([1.0, -1.0, 0.3, 2.0**-20, 1e6]))
        found.append((Delta("m", False, Exact(a, zeros[0], None), Exact(b, zeros[1], None)), weight))
    return found


@examples(80)
@given(weighted=sums())
def test_the_sum_is_within_its_bound_and_has_no_needless_rank(weighted: list[tuple[Delta, float]]) -> None:
    found = add_deltas(weighted)
    pieces = [weight * (delta.b.value.numpy() @ delta.a.value.numpy()) for delta, weight in weighted]
    size = sum(abs(w) * float(d.b.value.norm() * d.a.value.norm()) for d, w in weighted)
    product = found.delta.b.value.double().numpy() @ found.delta.a.value.double().numpy()
    distance = float(np.linalg.norm(product - sum(pieces)))
    assert distance <= found.arithmetic_bound + 200 * UNIT[torch.float64] * size + 1e-300
    assert found.arithmetic_bound <= 1e-11 * size + 1e-300
    if len(weighted) > 1:
        m, n = product.shape
        assert found.delta.rank <= min(m, n, sum(delta.rank for delta, _ in weighted))


def test_two_deltas_of_one_module_are_refused(tmp_path: Path) -> None:
    """The file would keep the last one only."""
    deltas = [Delta.of_factors("layer", False, normal(k, 5, 2), normal(k + 10, 2, 3)) for k in range(2)]
    work = [partial(Approximation.exact, delta) for delta in deltas]
    target = LoraOutput(tmp_path / "out", "command", "title", {}, [tmp_path / "source"], None)
    with pytest.raises(ExportError, match="source: two deltas belong to layer"):
        write_lora(work, len(work), target)
    assert list(tmp_path.iterdir()) == []
