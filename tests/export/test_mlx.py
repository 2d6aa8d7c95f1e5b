"""`loraover export mlx`: the written form, its certificate, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from loraover.common.command_line import run
from loraover.common.errors import ExportError
from loraover.models.load import resolve_model
from loraover_export import MlxReport, check_adapter, export_mlx
from loraover_export.cli import cli
from loraover_export.formats.mlx import SAME_NAMES, lost_settings, read_target

from support.gguf_export import adapted, tiny_base
from support.make_checkpoint import SERVABLE, edit_json, make_checkpoint
from support.refusals import Refused
from support.tiny_models import saved, tiny_bart, tiny_neox, with_lora
from support.vllm_damage import config

ATTENTION = frozenset(f"self_attn.{name}_proj" for name in "qkvo")
GATED = ATTENTION | {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
IN_MLX: dict[str, frozenset[str]] = dict.fromkeys(SAME_NAMES, GATED) | {
    "Glm4ForCausalLM": ATTENTION | {"mlp.gate_up_proj", "mlp.down_proj"},
    "Phi3ForCausalLM": frozenset({"self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"}),
    "PhiForCausalLM": ATTENTION - {"self_attn.o_proj"} | {"self_attn.dense", "mlp.fc1", "mlp.fc2"},
    "Starcoder2ForCausalLM": ATTENTION | {"mlp.c_fc", "mlp.c_proj"},
}
"""Linear layers in a layer of each class, as mlx-lm's model files name them."""

LAYERS = "base_model.model.model.layers"
SCALES = {"r": 4, "lora_alpha": 6, "use_rslora": True, "rank_pattern": {"q_proj": 6}, "alpha_pattern": {"v_proj": 3}}
TARGETS = ["q_proj", "v_proj", "down_proj", "embed_tokens"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_base("Llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("adapter") / "adapter", target_modules=TARGETS, **SCALES)


def make_adapter(base: Path, folder: Path, **lora: Any) -> Path:
    model = tiny_base("Llama")
    model.name_or_path = str(base)
    adapted(model, folder, **{"rank_pattern": {}, "alpha_pattern": {}} | lora)
    return folder


def test_b_a_with_its_scaling_is_in_the_file(adapter: Path, base: Path, tmp_path: Path) -> None:
    report = export_mlx(adapter, tmp_path / "out")
    assert (report.verdict, report.rank, report.base_model) == ("passed", 6, str(base))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapters.safetensors",
        "mlx_certificate.json",
    ]
    files = (tmp_path / "out" / "adapters.safetensors", adapter / "adapter_model.safetensors")
    written, given = map(load_file, files)
    q, v = (f"{LAYERS}.1.self_attn.{name}" for name in ("q_proj", "v_proj"))
    for path, rank, alpha in ((q, 6, 6), (v, 4, 3), (f"{LAYERS}.0.mlp.down_proj", 4, 6)):
        name = path.removeprefix("base_model.model.")
        a, b = (given[f"{path}.lora_{side}.weight"].double().numpy() for side in "AB")
        lora_a, lora_b = (written[f"{name}.lora_{side}"].double().numpy() for side in "ab")
        assert lora_a.shape == (a.shape[1], 6)
        assert np.allclose((lora_a @ lora_b).T, alpha / np.sqrt(rank) * (b @ a), rtol=0, atol=1e-6)
    tokens = written["model.embed_tokens.lora_a"]
    assert torch.equal(tokens[:, :4], given["base_model.model.model.embed_tokens.lora_embedding_A"].mT)
    assert report.left_out == ["base_model.model.model.embed_tokens.base_layer.weight"]
    assert len(written) == len(given) - 1


def test_the_configuration_names_each_module_by_its_path(adapter: Path, base: Path, tmp_path: Path) -> None:
    export_mlx(adapter, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    keys = config["lora_parameters"].pop("keys")
    assert config == {
        "model": str(base),
        "fine_tune_type": "lora",
        "num_layers": 2,
        "lora_parameters": {"rank": 6, "scale": 1.0, "dropout": 0.0},
    }
    projections = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    expected = {f"model.layers.{layer}.{name}" for layer in range(2) for name in projections}
    assert set(keys) == expected | {"model.embed_tokens"}


def test_a_checkpoint_is_folded_on_the_way(tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path, base_options=SERVABLE)
    assert run(cli, ["fold", str(made.path), "-o", str(tmp_path / "folded")]) == 0
    reports = [export_mlx(source, tmp_path / f"out{i}") for i, source in enumerate((made.path, tmp_path / "folded"))]
    assert all(report.passed for report in reports)
    one, other = (load_file(tmp_path / f"out{i}" / "adapters.safetensors") for i in range(2))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_the_report_is_printed_and_kept(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cli, ["mlx", str(adapter), "-o", str(tmp_path / "out"), "--dtype", "bf16", "--json"]) == 0
    shown = capsys.readouterr()
    report = MlxReport.model_validate_json(shown.out)
    assert report.dtype == "bf16"
    assert report == MlxReport.model_validate_json((tmp_path / "out" / "mlx_certificate.json").read_text())
    assert "run it: mlx_lm.generate --model" in shown.err


def test_rope_theta_that_mlx_lm_would_not_find_is_shown(
    adapter: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "rope_theta" not in json.loads((base / "config.json").read_text())
    assert export_mlx(adapter, tmp_path / "silent").lost_settings == {"rope_theta": 10000.0}
    assert run(cli, ["mlx", str(adapter), "-o", str(tmp_path / "out")]) == 0
    assert 'add them at the file\'s top level: {"rope_theta": 10000.0}' in capsys.readouterr().out


def test_settings_at_the_top_level_are_not_lost(base: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(base, tmp_path / "base")
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    edit_json(moved / "config.json", lambda config: config.update(rope_parameters=rope))
    assert lost_settings(resolve_model(str(moved))) == {"rope_theta": 500.0, "rope_scaling": rope}
    edit_json(moved / "config.json", lambda config: config.update(rope_theta=500.0, rope_scaling=rope))
    assert lost_settings(resolve_model(str(moved))) == {}


@pytest.mark.parametrize("family", ["Glm4", "Phi", "Phi3", "StableLm"])
def test_heads_that_are_rotated_in_part_are_not_lost(family: str, tmp_path: Path) -> None:
    """mlx-lm reads their share at the top level, and has a default for each family."""
    names = [f"{family}ForCausalLM"]
    getattr(transformers, f"{family}Config")(partial_rotary_factor=0.3, architectures=names).save_pretrained(tmp_path)
    found = json.loads((tmp_path / "config.json").read_text()) | lost_settings(resolve_model(str(tmp_path)))
    assert found["partial_rotary_factor"] == 0.3


def test_what_mlx_lm_cannot_hold_is_refused(adapter: Path, tmp_path: Path, refused: Refused) -> None:
    source = shutil.copytree(adapter, tmp_path / "in")
    config(use_dora=True)(source)
    refused("mlx", source, named=("DoRA",))


def test_another_base_model_is_refused(adapter: Path, tmp_path: Path) -> None:
    tiny_base("Llama", num_hidden_layers=1).save_pretrained(tmp_path / "flat")
    with pytest.raises(ExportError, match=r"adapts model.layers.1.* which is neither a linear layer nor an embedding"):
        export_mlx(adapter, tmp_path / "out", model=tmp_path / "flat")


@pytest.mark.parametrize("architecture", SAME_NAMES)
def test_the_modules_of_a_known_class_have_mlx_lms_names(architecture: str, tmp_path: Path) -> None:
    config = getattr(transformers, architecture).config_class(num_hidden_layers=1, architectures=[architecture])
    config.save_pretrained(tmp_path)
    inner = {f"model.layers.0.{name}" for name in IN_MLX[architecture]}
    assert set(read_target(resolve_model(str(tmp_path))).shapes()) <= inner | {"model.embed_tokens", "lm_head"}


@pytest.mark.parametrize("base", [tiny_neox, tiny_bart])
def test_a_class_with_other_names_is_refused(base: Callable[[], Any], tmp_path: Path) -> None:
    model = saved(base(), tmp_path / "base")
    with_lora(model).save_pretrained(tmp_path / "in")
    with pytest.raises(ExportError, match=f"is a {type(model).__name__}, whose modules may have other names"):
        export_mlx(tmp_path / "in", tmp_path / "out")
    exported = check_adapter(tmp_path / "in", engines="mlx").engines[0].exported
    assert (exported.verdict, [finding.feature for finding in exported.findings]) == ("refused", ["export"])


def test_a_tied_embedding_is_refused(adapter: Path, tmp_path: Path) -> None:
    tiny_base("Llama", tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    with pytest.raises(ExportError, match=r"one matrix, which mlx-lm adapts in both places or not at all"):
        export_mlx(adapter, tmp_path / "out", model=tmp_path / "tied")
