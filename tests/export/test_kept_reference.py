"""References and chat templates travel: exports keep those of the adapter which they read, and not those of another."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from loraover.checkpoint.carried_files import KEPT_FILE, misfit
from loraover.checkpoint.files import REFERENCE_FILE, TEMPLATE_FILE
from loraover.common.command_line import run
from loraover.models.load import load_model, resolve_model
from loraover_export import prepare_adapter
from loraover_export.cli import cli
from loraover_export.formats.gguf.base import write_base
from loraover_serve.judge.reference import read_reference

from benchmarks.verify_noise import quantise
from support.exports import ADAPTERS
from support.make_checkpoint import SERVABLE, edit_json, make_checkpoint
from support.plain_adapter import make_adapter
from support.recorded import write_reference
from support.verified import save_adapter, save_base

pytestmark = pytest.mark.usefixtures("quick_builder")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with its reference, which tests copy before they change it."""
    made = make_checkpoint(tmp_path_factory.mktemp("kept"), tokenizer=True, base_options=SERVABLE)
    write_reference(made.path)
    return made.path


EXPORTS: dict[str, tuple[Sequence[str], str, str]] = {
    **{verb: ([verb], "out", "") for verb in ("fold", *ADAPTERS)},
    "gguf": (["gguf"], "out/shop.gguf", "shop."),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_an_export_keeps_the_reference(name: str, first: Path, tmp_path: Path) -> None:
    words, output, stem = EXPORTS[name]
    assert run(cli, [*words, str(first), "-o", str(tmp_path / output)]) == 0
    kept = tmp_path / "out" / f"{stem}{REFERENCE_FILE}"
    assert kept.read_bytes() == (first / REFERENCE_FILE).read_bytes()
    assert misfit(kept) is None
    files = json.loads((tmp_path / "out" / f"{stem}{KEPT_FILE}").read_text())["files"]
    changed = tmp_path / "out" / list(files)[-1]
    changed.write_bytes(changed.read_bytes() + b"\0")
    assert misfit(kept) is not None


TEMPLATES = EXPORTS | {
    "merged graph": (["onnx", "--mode", "merged", "--no-check"], "out", ""),
    "swappable graph": (["onnx", "--mode", "swappable", "--no-check"], "out", "shop."),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.engine if "graph" in name else ()) for name in TEMPLATES]
)
def test_an_export_keeps_the_chat_template(name: str, first: Path, tmp_path: Path) -> None:
    """That of the base model, which graphs have beside them, gives way to the adapter's."""
    words, output, stem = TEMPLATES[name]
    source = shutil.copytree(first, tmp_path / "shop")
    (source / TEMPLATE_FILE).write_text("{{ messages }}")
    kept = tmp_path / "out" / f"{stem}{TEMPLATE_FILE}"
    words = [*words, str(source), "-o", str(tmp_path / output)]
    assert run(cli, words) == 0
    assert kept.read_text() == "{{ messages }}"
    if "graph" in name:
        digests = json.loads((kept.parent / "onnx_report.json").read_text())["output"]
        assert digests[kept.name] == hashlib.sha256(kept.read_bytes()).hexdigest()
    if name == "gguf":  # whose folder is not replaced
        (source / TEMPLATE_FILE).unlink()
        assert run(cli, [*words, "--force"]) == 0
        assert not kept.exists()


def test_a_reference_comes_along_from_an_address(first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fold's is a kept one, of which both files are fetched; the working directory is not where it lies."""
    pytest.importorskip("fsspec", reason="fsspec is in the extra remote")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert run(cli, ["fold", str(first), "-o", str(tmp_path / "folded"), "--dtype", "bf16"]) == 0
    assert run(cli, ["vllm", f"file://{tmp_path / 'folded'}", "-o", str(tmp_path / "served")]) == 0
    assert misfit(tmp_path / "served" / REFERENCE_FILE) is None


def test_the_reference_of_another_adapter_is_left_out(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(cli, ["fold", str(first), "-o", str(tmp_path / "folded")]) == 0
    edit_json(tmp_path / "folded" / "adapter_config.json", lambda config: config.update(lora_alpha=99))
    assert run(cli, ["vllm", str(tmp_path / "folded"), "-o", str(tmp_path / "served")]) == 0
    shown = "".join(capsys.readouterr())
    assert "the reference is left out" in shown
    assert not {REFERENCE_FILE, KEPT_FILE} & {path.name for path in (tmp_path / "served").iterdir()}


def test_a_kept_reference_that_names_what_cannot_be_read_is_none(first: Path, tmp_path: Path) -> None:
    assert run(cli, ["fold", str(first), "-o", str(tmp_path / "folded")]) == 0
    edit_json(tmp_path / "folded" / KEPT_FILE, lambda kept: kept.update(files={"x" * 300: "00"}))
    assert "names a file that cannot be read: File name too long" in str(misfit(tmp_path / "folded" / REFERENCE_FILE))


def test_a_file_that_is_replaced_loses_the_reference_of_its_predecessor(first: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(first, tmp_path / "bare")
    (bare / REFERENCE_FILE).unlink()
    output = tmp_path / "shop.gguf"
    assert run(cli, ["gguf", str(first), "-o", str(output)]) == 0
    assert (tmp_path / f"shop.{REFERENCE_FILE}").exists()
    assert run(cli, ["gguf", str(bare), "-o", str(output), "--force"]) == 0
    assert sorted(path.name for path in tmp_path.glob("shop.*")) == ["shop.gguf"]


def test_files_whose_names_begin_alike_each_keep_their_own(first: Path, tmp_path: Path) -> None:
    names = ("support.fp32", "support.fp16", "support.v2.gguf")
    for name in names:
        assert run(cli, ["gguf", str(first), "-o", str(tmp_path / name)]) == 0
    for name in names:
        kept = tmp_path / f"{name.removesuffix('.gguf')}.{KEPT_FILE}"
        assert list(json.loads(kept.read_text())["files"]) == [name]


def test_a_prepared_adapter_has_the_reference(first: Path, tmp_path: Path) -> None:
    source, base = shutil.copytree(first, tmp_path / "source"), first.parent / "base"
    (source / REFERENCE_FILE).unlink()
    before = prepare_adapter(source, tmp_path / "cache", model=base)
    assert not (before.path / REFERENCE_FILE).exists()
    write_reference(source)
    after = prepare_adapter(source, tmp_path / "cache", model=base)
    assert not after.cached
    assert misfit(after.path / REFERENCE_FILE) is None
    write_reference(source, "0" * 64)
    stale = prepare_adapter(source, tmp_path / "cache", model=base)
    assert "the reference was left out" in stale.notes[-1]
    assert not (stale.path / REFERENCE_FILE).exists()


@pytest.mark.process
def test_fold_records_beside_what_it_writes(first: Path, tmp_path: Path) -> None:
    words = ["fold", str(first), "-o", str(tmp_path / "folded"), "--record", "--device", "cpu"]
    assert run(cli, words) == 0
    assert misfit(tmp_path / "folded" / REFERENCE_FILE) is None
    assert not (tmp_path / "folded" / KEPT_FILE).exists()
    assert (tmp_path / "folded" / REFERENCE_FILE).stat().st_size > 1000


def weights_of(reference: Path) -> str | None:
    """Weights on which a reference that an export wrote was recorded, in words."""
    assert misfit(reference) is None
    return read_reference(reference).weights


@pytest.mark.engine
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_a_swappable_graph_is_recorded_on_its_own_weights(precision: str, first: Path, tmp_path: Path) -> None:
    words = ["onnx", str(first), "-o", str(tmp_path / "graph"), "--mode", "swappable", "--precision", precision]
    assert run(cli, [*words, "--name", "shop", "--no-check", "--record", "--check-device", "cpu"]) == 0
    found = weights_of(tmp_path / "graph" / f"shop.{REFERENCE_FILE}")
    assert found is None if precision == "fp32" else str(found).startswith("ONNX int4 (")


def test_a_merged_graph_is_not_recorded(first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["onnx", str(first), "-o", str(tmp_path / "graph"), "--mode", "merged", "--record"]
    assert run(cli, words) == 2
    assert "--record: for --mode swappable only, since a merged graph has no base model" in capsys.readouterr().err
    assert not (tmp_path / "graph").exists()


@pytest.mark.engine
def test_a_gguf_adapter_is_recorded_on_the_file_of_its_base_model(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp_py_sync", reason="llama.cpp is not installed")
    base = save_base(tmp_path / "base", hidden_size=64, intermediate_size=128)
    adapter = save_adapter(tmp_path / "adapter", base)
    write_base(load_model(resolve_model(str(base))), tmp_path / "F32.gguf")
    quantise(tmp_path / "F32.gguf", tmp_path / "Q4_0.gguf", "Q4_0")
    for kind, expected in (("F32", None), ("Q4_0", "GGUF Q4_0 (")):
        words = ["gguf", str(adapter), "-o", str(tmp_path / f"{kind}-shop.gguf"), "--record"]
        assert run(cli, [*words, "--base-gguf", str(tmp_path / f"{kind}.gguf"), "--threads", "1"]) in (0, 3)
        found = weights_of(tmp_path / f"{kind}-shop.{REFERENCE_FILE}")
        assert found is expected or str(found).startswith(str(expected))


@pytest.mark.engine
def test_a_graphs_adapters_each_keep_their_own(first: Path, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "one.1", "two")]
    for folder in folders:
        assert run(cli, ["fold", str(first), "-o", str(folder)]) == 0
    (tmp_path / "two" / REFERENCE_FILE).unlink()
    words = ["--mode", "swappable", "--no-check"]
    assert run(cli, ["onnx", *map(str, folders), "-o", str(tmp_path / "graph"), *words]) == 0
    graph, kept = tmp_path / "graph", ("one", "one.1")
    assert {path.name for path in graph.glob(f"*{REFERENCE_FILE}")} == {f"{name}.{REFERENCE_FILE}" for name in kept}
    for name in kept:
        assert misfit(graph / f"{name}.{REFERENCE_FILE}") is None
        assert list(json.loads((graph / f"{name}.{KEPT_FILE}").read_text())["files"]) == [f"{name}.onnx_adapter"]


def test_an_exact_conversion_keeps_the_reference(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path, "Llama", rank_pattern={"q_proj": 6})
    write_reference(adapter)
    for rank, is_kept in ((None, True), (2, False)):
        output = tmp_path / f"rank-{rank}"
        words = [] if rank is None else ["--approximate-to-rank", str(rank)]
        assert run(cli, ["convert", str(adapter), "-o", str(output), *words]) == 0
        assert (output / REFERENCE_FILE).is_file() == is_kept
    assert misfit(tmp_path / "rank-None" / REFERENCE_FILE) is None
