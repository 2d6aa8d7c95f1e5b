"""Graphs exported earlier that do not fit, and outputs that cannot be: refused, with nothing written or overwritten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from support.make_checkpoint import edit_json
from support.onnx_export import OTHER, OnnxMade, export, read_report, tiny_base, tiny_lora
from support.plain_adapter import write_adapter
from support.refusals import Refused

pytestmark = pytest.mark.engine

MODULE = "model.layers.0.self_attn.q_proj"
MERGED, SWAPPABLE = ("--mode", "merged"), ("--mode", "swappable")


# Graphs exported earlier


def test_a_graph_of_other_targets_or_another_base_is_named(
    onnx_made: OnnxMade, source: Path, graph: Path, tmp_path: Path, refused: Refused
) -> None:
    options = (*SWAPPABLE, "--graph", graph)
    refused("onnx", source, *options, named=("no input for", "other target modules"))
    base = tiny_base(tmp_path / "other", "Llama", hidden_size=96)
    tiny_lora(base, tmp_path / "a", **OTHER)
    refused("onnx", tmp_path / "a", *options, named=(str(graph), str(onnx_made.base), str(base), "--model"))


def test_a_graph_of_other_settings_is_named(onnx_made: OnnxMade, graph: Path, refused: Refused) -> None:
    """Settings that are usual without a graph are compared too, where they are asked for."""
    request = ("onnx", onnx_made.folder / "second", *SWAPPABLE, "--graph", graph)
    for options in (("--precision", "fp16"), ("--device", "cuda"), ("--no-cache",)):
        refused(*request, *options, named=(str(graph), " ".join(options)))
    edit_json(graph / "onnx_report.json", lambda content: content.update(precision="int4", device="cuda"))
    for field, found, asked in (("precision", "int4", "fp32"), ("device", "cuda", "cpu")):
        named = (f"exported with --{field} {found}; leave --{field} {asked} out",)
        refused(*request, f"--{field}", asked, named=named)


def test_the_recorded_command_names_what_the_graph_has(onnx_made: OnnxMade, graph: Path, tmp_path: Path) -> None:
    edit_json(graph / "onnx_report.json", lambda content: content.update(precision="int4"))
    assert export(onnx_made.folder / "second", tmp_path / "out", *SWAPPABLE, "--graph", str(graph), "--no-check") == 0
    assert "--precision int4 --device cpu" in (tmp_path / "out" / "README.md").read_text()
    report = read_report(tmp_path / "out")
    assert report.precision == "int4"
    assert (report.check_device, report.compute_dtype, report.checked_on) == (None, None, None)


def test_an_adapter_of_another_width_is_named(
    onnx_made: OnnxMade, graph: Path, tmp_path: Path, refused: Refused
) -> None:
    """Even if nothing is checked, and it claims the graph's base model."""
    matrices = {MODULE: (torch.ones(2, 96), torch.ones(64, 2))}
    adapter = write_adapter(tmp_path / "a", matrices, base_model_name_or_path=str(onnx_made.base))
    named = ("96 features", "has 64", str(onnx_made.base))
    refused("onnx", adapter, *SWAPPABLE, "--graph", graph, "--no-check", named=named)


WRONG_VALUES: dict[str, tuple[str, dict[str, Any]]] = {
    "no places": ("swappable.json", {"places": {}}),
    "another graph": ("swappable.json", {"places": {"a.lora_A": {"graph": "other.onnx", "input": "a", "features": 1}}}),
    "another schema of the report": ("onnx_report.json", {"schema_version": 2}),
    "a merged graph": ("onnx_report.json", {"mode": "merged"}),
}


def test_files_of_a_graph_that_cannot_be_used_are_named(onnx_made: OnnxMade, graph: Path, refused: Refused) -> None:
    request = ("onnx", onnx_made.folder / "second", *SWAPPABLE, "--graph", graph)
    for file, values in WRONG_VALUES.values():
        right = (graph / file).read_bytes()
        edit_json(graph / file, lambda content, values=values: content.update(values))  # type: ignore[misc]
        refused(*request, named=(str(graph),))
        (graph / file).write_bytes(right)
    file = graph / "model.onnx"
    file.write_bytes(file.read_bytes()[:1000])
    refused(*request, named=(str(file),))


def test_an_export_without_a_graph_is_named(onnx_made: OnnxMade, graph: Path, tmp_path: Path, refused: Refused) -> None:
    """Such a folder is left by an export that only added adapters to an earlier graph."""
    first = (*SWAPPABLE, "--graph", str(graph), "--no-check", "--name", "again")
    assert export(onnx_made.folder / "second", tmp_path / "later", *first) == 0
    named = (str(tmp_path / "later" / "swappable.json"), "no such file")
    refused("onnx", onnx_made.folder / "second", *SWAPPABLE, "--graph", tmp_path / "later", named=named)


# Outputs that exist


def test_force_replaces_an_export_whole_and_nothing_else(
    onnx_made: OnnxMade, graph: Path, source: Path, tmp_path: Path, refused: Refused
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.onnx").write_text("mine")
    refused("onnx", source, *MERGED, output=graph, named=(str(graph), "exists already"))
    refused("onnx", source, *MERGED, "--force", output=tmp_path / "mine", named=(str(tmp_path / "mine"),))
    (graph / "stray").write_text("of the older export")
    assert export(source, graph, *MERGED, "--no-check", "--force") == 0
    assert not {"stray", "second.onnx_adapter", "swappable.json"} & {path.name for path in graph.iterdir()}
    assert read_report(graph).mode == "merged"
    assert {path.name for path in tmp_path.iterdir()} == {"graph", "first", "mine"}


def test_an_output_inside_an_input_or_around_it_is_refused(
    onnx_made: OnnxMade, source: Path, graph: Path, refused: Refused
) -> None:
    second = onnx_made.folder / "second"
    refused("onnx", second, source, *SWAPPABLE, output=source / "out", named=("inside the input", str(source)))
    options = (*SWAPPABLE, "--graph", graph)
    refused("onnx", second, *options, output=graph / "out", named=("inside the input", str(graph)))
    refused("onnx", second, *options, "--force", output=graph, named=(str(graph),))
    inner = source.rename(graph / "first")
    refused("onnx", inner, *MERGED, "--force", output=graph, named=("holds the input", str(inner)))
