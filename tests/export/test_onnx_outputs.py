"""Graphs exported earlier that do not fit, and outputs that cannot be: refused, with nothing written or overwritten."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from support.make_checkpoint import edit_json
from support.onnx_export import OTHER, OnnxMade, export, read_report, tiny_base, tiny_lora
from support.plain_adapter import write_adapter

pytestmark = pytest.mark.engine

MODULE = "model.layers.0.self_attn.q_proj"
MERGED, SWAPPABLE = ("--mode", "merged"), ("--mode", "swappable")
Refused = Callable[..., str]


# Graphs exported earlier


def test_a_graph_of_other_targets_is_named(source: Path, graph: Path, refused: Refused) -> None:
    refused(source, *SWAPPABLE, "--graph", str(graph), named=("no input for", "other target modules"))


def test_a_graph_of_another_base_model_is_named(made: OnnxMade, graph: Path, tmp_path: Path, refused: Refused) -> None:
    base = tiny_base(tmp_path / "other", "Llama", hidden_size=96)
    tiny_lora(base, tmp_path / "a", **OTHER)
    refused(
        tmp_path / "a",
        *SWAPPABLE,
        "--graph",
        str(graph),
        named=(str(graph), str(made.base), str(base), "--model"),
    )


@pytest.mark.parametrize("options", [("--precision", "fp16"), ("--device", "cuda"), ("--no-cache",)])
def test_a_graph_of_other_settings_is_named(
    options: tuple[str, ...], made: OnnxMade, graph: Path, refused: Refused
) -> None:
    refused(made.folder / "second", *SWAPPABLE, "--graph", str(graph), *options, named=(str(graph), " ".join(options)))


@pytest.mark.parametrize(("field", "found", "asked"), [("precision", "int4", "fp32"), ("device", "cuda", "cpu")])
def test_a_setting_that_is_usual_without_a_graph_is_compared(
    field: str, found: str, asked: str, made: OnnxMade, graph: Path, refused: Refused
) -> None:
    edit_json(graph / "onnx_report.json", lambda content: content.update({field: found}))
    options = (*SWAPPABLE, "--graph", str(graph), f"--{field}", asked)
    refused(made.folder / "second", *options, named=(f"exported with --{field} {found}; leave --{field} {asked} out",))


def test_the_recorded_command_names_what_the_graph_has(made: OnnxMade, graph: Path, tmp_path: Path) -> None:
    edit_json(graph / "onnx_report.json", lambda content: content.update(precision="int4"))
    assert export(made.folder / "second", tmp_path / "out", *SWAPPABLE, "--graph", str(graph), "--no-check") == 0
    assert "--precision int4 --device cpu" in (tmp_path / "out" / "README.md").read_text()
    report = read_report(tmp_path / "out")
    assert report.precision == "int4"
    assert (report.check_device, report.compute_dtype, report.checked_on) == (None, None, None)


def test_an_adapter_of_another_width_is_named(made: OnnxMade, graph: Path, tmp_path: Path, refused: Refused) -> None:
    """Even if nothing is checked, and it claims the graph's base model."""
    adapter = write_adapter(
        tmp_path / "a", {MODULE: (torch.ones(2, 96), torch.ones(64, 2))}, base_model_name_or_path=str(made.base)
    )
    options = (*SWAPPABLE, "--graph", str(graph), "--no-check")
    refused(adapter, *options, named=("96 features", "has 64", str(made.base)))


HOSTILE: dict[str, bytes] = {
    "nothing": b"",
    "deep": b"[" * 100_000,
    "a huge number": b'{"schema_version": ' + b"9" * 5001 + b"}",
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("file", ["swappable.json", "onnx_report.json"])
def test_a_hostile_graph_is_named(file: str, case: str, made: OnnxMade, graph: Path, refused: Refused) -> None:
    (graph / file).write_bytes(HOSTILE[case])
    options = (*SWAPPABLE, "--graph", str(graph), "--no-check")
    refused(made.folder / "second", *options, named=(str(graph / file),))


def place(**values: Any) -> dict[str, Any]:
    return {"places": {"a.lora_A": {"graph": "model.onnx", "input": "a", "features": 1} | values}}


WRONG_VALUES: dict[str, tuple[str, dict[str, Any]]] = {
    "no places": ("swappable.json", {"places": {}}),
    "features zero": ("swappable.json", place(features=0)),
    "another graph": ("swappable.json", place(graph="other.onnx")),
    "a graph elsewhere": ("swappable.json", place(graph="../model.onnx")),
    "dtype unknown": ("swappable.json", {"dtype": "fp8"}),
    "another schema": ("swappable.json", {"schema_version": 2}),
    "device unknown": ("onnx_report.json", {"device": "tpu"}),
    "a merged graph": ("onnx_report.json", {"mode": "merged"}),
}


@pytest.mark.parametrize("case", WRONG_VALUES)
def test_wrong_values_of_a_graph_are_named(case: str, made: OnnxMade, graph: Path, refused: Refused) -> None:
    file, values = WRONG_VALUES[case]
    edit_json(graph / file, lambda content: content.update(values))
    refused(made.folder / "second", *SWAPPABLE, "--graph", str(graph), named=(str(graph),))


def test_an_export_without_a_graph_is_named(made: OnnxMade, graph: Path, tmp_path: Path, refused: Refused) -> None:
    """Such a folder is left by an export that only added adapters to an earlier graph."""
    first = (*SWAPPABLE, "--graph", str(graph), "--no-check", "--name", "again")
    assert export(made.folder / "second", tmp_path / "later", *first) == 0
    options = (*SWAPPABLE, "--graph", str(tmp_path / "later"))
    refused(made.folder / "second", *options, named=(str(tmp_path / "later" / "swappable.json"), "no such file"))


def test_a_graph_that_is_cut_off_is_named(made: OnnxMade, graph: Path, refused: Refused) -> None:
    content = (graph / "model.onnx").read_bytes()
    (graph / "model.onnx").write_bytes(content[: len(content) // 2])
    refused(made.folder / "second", *SWAPPABLE, "--graph", str(graph), named=(str(graph / "model.onnx"),))


# Outputs that exist


def test_force_replaces_exports_only(made: OnnxMade, graph: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.onnx").write_text("mine")
    refused(made.folder / "second", *SWAPPABLE, output=graph, named=(str(graph), "exists already"))
    refused(made.folder / "second", *SWAPPABLE, "--force", output=tmp_path / "mine", named=(str(tmp_path / "mine"),))


def test_force_replaces_an_export_whole(made: OnnxMade, graph: Path, source: Path, tmp_path: Path) -> None:
    target = graph.rename(tmp_path / "out")
    (target / "stray").write_text("of the older export")
    assert export(source, target, *MERGED, "--no-check", "--force") == 0
    found = {path.name for path in target.iterdir()}
    assert not {"stray", "second.onnx_adapter", "swappable.json"} & found
    assert read_report(target).mode == "merged"
    assert {path.name for path in tmp_path.iterdir()} == {"out", "first"}


def test_a_failing_export_leaves_the_older_one(graph: Path, source: Path, tmp_path: Path, refused: Refused) -> None:
    target = graph.rename(tmp_path / "out")
    (source / "adapter_model.safetensors").write_bytes(b"")
    refused(source, *MERGED, "--force")
    assert json.loads((target / "onnx_report.json").read_text())["mode"] == "swappable"


def test_an_output_inside_an_input_is_refused(made: OnnxMade, source: Path, graph: Path, refused: Refused) -> None:
    refused(source, *SWAPPABLE, output=source / "out", named=("inside the input", str(source)))
    refused([made.folder / "second", source], *SWAPPABLE, output=source / "out", named=("inside the input",))
    options = (*SWAPPABLE, "--graph", str(graph))
    refused(made.folder / "second", *options, output=graph / "out", named=("inside the input", str(graph)))
    refused(made.folder / "second", *options, "--force", output=graph, named=(str(graph),))


def test_an_output_that_holds_an_input_is_not_replaced(
    graph: Path, source: Path, tmp_path: Path, refused: Refused
) -> None:
    inner = source.rename(graph / "first")
    refused(inner, *MERGED, "--force", output=graph, named=("holds the input", str(inner)))
