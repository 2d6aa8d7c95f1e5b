"""Adapters of a LoRA-Over checkpoint in one graph: what their files hold, and how others join them later."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import helper, numpy_helper

from loraover.checkpoint.tensor_file import sha256_of
from loraover_export.formats.onnx.swappable import open_inputs

from oracles.contraction import Array
from support.make_checkpoint import Made, nearest, oracle_matrices, tree
from support.onnx_export import LINEAR, OTHER, export, exported, llama_checkpoint, read_report, tiny_lora
from support.onnx_graph import Graph, worst_error

pytestmark = pytest.mark.engine

BLOCKS = {"q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn", "o_proj": "self_attn"}
SCALING = {"q_proj": 5 / 4, "k_proj": 12 / 1}
"""Of the checkpoint's modules, from its ranks and alphas; 12 / 4 elsewhere, but for one of rank 8."""


@dataclass(frozen=True)
class Exported:
    """A checkpoint and two PEFT adapters of other ranks and targets, of which the second joined the graph later."""

    folder: Path
    made: Made
    models: dict[str, Any]

    @property
    def graph(self) -> Path:
        return self.folder / "graph"

    @property
    def later(self) -> Path:
        return self.folder / "later"


@pytest.fixture(scope="module")
def swappable(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("llama")
    made = llama_checkpoint(folder)
    models = {"checkpoint": made.model, "other": tiny_lora(made.base, folder / "other", **OTHER)}
    exported("Llama", [made.path, folder / "other"], folder / "graph", "--mode", "swappable")
    models["late"] = tiny_lora(made.base, folder / "late", r=2, rank_pattern={"up_proj": 3}, alpha_pattern={})
    options = ("--mode", "swappable", "--graph", str(folder / "graph"))
    exported("Llama", folder / "late", folder / "later", *options)
    return Exported(folder, made, models)


def parameters(file: Path) -> dict[str, Array]:
    """What an adapter's file holds, by input of the graph."""
    adapter = ort.AdapterFormat.read_adapter(str(file))  # owns what its values show
    return {name: value.numpy().copy() for name, value in adapter.get_parameters().items()}


def expected_parameters(made: Made) -> dict[str, Array]:
    """The oracle's A^T and (scaling B)^T in float64, by the names that onnxruntime-genai's builder gives."""
    exact, found = oracle_matrices(made.path), {}
    for layer in range(2):
        for name in LINEAR:
            module = f"model.layers.{layer}.{BLOCKS.get(name, 'mlp')}.{name}"
            a, b = (exact[f"base_model.model.{module}.lora_{matrix}.weight"] for matrix in "AB")
            scaling = 12 / 8 if (layer, name) == (1, "down_proj") else SCALING.get(name, 12 / 4)
            short = module.replace("self_attn", "attn")
            found[f"{short}.lora_A.MatMul.weight"] = a.T
            found[f"{short}.lora_B.MatMul.weight"] = scaling * b.T
    return found


def test_the_file_holds_the_oracles_matrices_with_the_scaling_in_b(swappable: Exported) -> None:
    found = parameters(swappable.graph / "checkpoint.onnx_adapter")
    expected = expected_parameters(swappable.made)
    assert found.keys() == expected.keys()
    for name, matrix in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name].astype(np.float64), nearest(matrix, "fp32"), err_msg=name)


def test_matrices_that_begin_alike_are_told_apart(tmp_path: Path) -> None:
    drawn = {"first.lora_A": torch.tensor([[1.5, 1.25]]), "second.lora_A": torch.tensor([[1.5, 1.75]])}
    held = [numpy_helper.from_array(marker.mT.numpy(), name) for name, marker in reversed(drawn.items())]
    model = helper.make_model(helper.make_graph([], "graph", [], [], held))
    places = open_inputs(model, tmp_path / "model.onnx", drawn)
    assert {name: place.input for name, place in places.items()} == {name: name for name in drawn}


def test_every_adapter_gives_pefts_outputs(swappable: Exported) -> None:
    graph = swappable.graph / "model.onnx"
    for folder, name in ((swappable.graph, "checkpoint"), (swappable.graph, "other"), (swappable.later, "late")):
        errors = worst_error(Graph(graph, folder / f"{name}.onnx_adapter"), swappable.models[name])
        assert max(errors.values()) <= 1, (name, errors)
    with swappable.models["checkpoint"].disable_adapter():
        errors = worst_error(Graph(graph), swappable.models["checkpoint"])
    assert max(errors.values()) <= 1, errors


def test_a_later_export_holds_the_adapter_alone(swappable: Exported) -> None:
    files = {"late.onnx_adapter", "onnx_report.json", "README.md"}
    assert {path.name for path in swappable.later.iterdir()} == files
    found = read_report(swappable.later)
    assert found.output == {"late.onnx_adapter": sha256_of(swappable.later / "late.onnx_adapter")}
    assert [check.adapter for check in found.checks] == [None, "late"]
    assert found.base_model == str(swappable.made.base)
    assert found.precision == "fp32"
    assert "ONNX graphs, with their LoRA adapters, of" in (swappable.later / "README.md").read_text()


def test_a_later_export_leaves_the_graph_alone(swappable: Exported, tmp_path: Path) -> None:
    before = tree(swappable.graph)
    options = ("--mode", "swappable", "--graph", str(swappable.graph), "--no-check", "--name", "again")
    assert export(swappable.made.path, tmp_path / "out", *options) == 0
    assert tree(swappable.graph) == before
    again, first = tmp_path / "out" / "again.onnx_adapter", swappable.graph / "checkpoint.onnx_adapter"
    assert again.read_bytes() == first.read_bytes()
    assert read_report(tmp_path / "out").verdict == "not checked"


def test_a_rebuilt_graph_repeats_bit_for_bit(swappable: Exported, tmp_path: Path) -> None:
    sources = [swappable.made.path, swappable.folder / "other"]
    assert export(sources, tmp_path / "out", "--mode", "swappable", "--no-check") == 0
    one, two = tree(swappable.graph), tree(tmp_path / "out")
    assert {name for name in one if one[name] != two[name]} == {"README.md", "onnx_report.json"}


def test_a_saved_head_on_a_tied_model_is_merged(tmp_path: Path) -> None:
    """The head is trained apart from the embedding, and stays apart in the graph."""
    made = llama_checkpoint(tmp_path, modules_to_save=["lm_head"], base_options={"tie_word_embeddings": True})
    exported("Llama", made.path, tmp_path / "merged", "--mode", "merged")
    errors = worst_error(Graph(tmp_path / "merged" / "model.onnx"), made.model)
    assert max(errors.values()) <= 1, errors
