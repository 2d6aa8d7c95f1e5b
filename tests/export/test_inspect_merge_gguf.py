"""What inspect-merge says of GGUF files that llama.cpp's own quantiser, and the gguf package, have written."""

from __future__ import annotations

import ctypes
import re
import shlex
from collections.abc import Callable
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from export.test_inspect_merge import verdicts
from gguf.quants import dequantize, quantize
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from loraover.common.command_line import run
from loraover.common.errors import CheckpointError, ConfigError
from loraover_export import inspect_merge, merge_adapter
from loraover_export.cli import cli
from loraover_export.formats.gguf.base import write_base
from loraover_export.formats.gguf.header import read_header
from loraover_export.merged.gguf import GRIDS

from support.make_checkpoint import edit_tensors
from support.plain_adapter import tiny_decoder
from support.tiny_experts import EXPERT_SIZES, PARAMETERS
from support.tiny_models import fill_b, with_lora

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL")


@cache
def ggml() -> Any:
    """llama.cpp's library, which has its quantiser."""
    found = pytest.importorskip("llama_cpp_py_sync", reason="llama-cpp-py-sync is not installed")
    library = ctypes.CDLL(str(Path(found.__file__).parent / "libggml-base.so.0"))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library


def by_llamacpp(rows: np.ndarray[Any, Any], kind: gguf.GGMLQuantizationType) -> np.ndarray[Any, Any]:
    """Quantise rows as llama-quantize does, without an importance matrix."""
    m, n = rows.shape
    block, size = gguf.GGML_QUANT_SIZES[kind]
    out = np.empty((m, n // block * size), np.uint8)
    source = np.ascontiguousarray(rows, np.float32)
    floats, data = source.ctypes.data_as(ctypes.c_void_p), out.ctypes.data_as(ctypes.c_void_p)
    sizes = [ctypes.c_int64(each) for each in (0, m, n)]
    written = ggml().ggml_quantize_chunk(ctypes.c_int(kind.value), floats, data, *sizes, None)
    assert written == out.nbytes
    return out


def to_gguf(model: Path) -> None:
    """Write a model's folder as an F32 file beside it."""
    write_base(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), model.with_suffix(".gguf"))


Change = Callable[[str, np.ndarray[Any, Any]], np.ndarray[Any, Any]]


def rewrite(source: Path, target: Path, type_name: str, change: Change = lambda name, rows: rows) -> Path:
    """Write an F32 file again with its matrices in another type."""
    kind = gguf.GGMLQuantizationType[type_name]
    reader = gguf.GGUFReader(source)
    with closing(gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())) as writer:
        for key, field in reader.fields.items():
            if not key.startswith("GGUF.") and key != "general.architecture":
                writer.add_key_value(key, field.contents(), field.types[0])
        for tensor in reader.tensors:
            rows = change(tensor.name, np.array(tensor.data))
            if rows.ndim == 1 or type_name == "F32":
                writer.add_tensor(tensor.name, rows.astype(np.float32))
            elif type_name in ("F16", "BF16"):
                writer.add_tensor(tensor.name, quantize(rows, kind), raw_dtype=kind)
            else:
                flat = by_llamacpp(rows.reshape(-1, rows.shape[-1]), kind)
                writer.add_tensor(tensor.name, flat.reshape(*rows.shape[:-1], -1), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return target


SIZES = {
    **{"hidden_size": 256, "intermediate_size": 512},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes a folder once by its family: base and adapter, their merge in F32, and both as F32 GGUF files."""

    @cache
    def make(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family)
        tiny_decoder(family, **SIZES).save_pretrained(folder / "base")
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        model = with_lora(base, draw_b=False, seed=1, r=4, lora_alpha=6, target_modules="all-linear")
        fill_b(model, seed=2)
        model.save_pretrained(folder / "adapter")
        assert merge_adapter(folder / "adapter", folder / "merged", model=folder / "base").passed
        for name in ("base", "merged"):
            to_gguf(folder / name)
        return folder

    return make


@pytest.mark.parametrize("type_name", TYPES)
def test_a_right_merge_passes_and_its_absence_never_does(
    type_name: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = made("Llama")
    for name, verdict in (("merged", "merged"), ("base", "not merged")):
        file = rewrite(folder / f"{name}.gguf", tmp_path / f"{name}-{type_name}.gguf", type_name)
        report = inspect_merge(folder / "adapter", file, model=folder / "base")
        assert set(verdicts(report)) == {verdict}, report.sentence
        assert {other.state for other in report.others} == ({"not compared"} if type_name == "IQ4_NL" else set())
        usual = {"merged": "passed", "not merged": "failed"}[verdict]
        assert report.verdict == ("inconclusive" if (type_name, name) == ("IQ4_NL", "merged") else usual)


@pytest.mark.parametrize("type_name", ["Q8_0", "Q4_K"])
def test_a_base_in_gguf_is_as_good(type_name: str, made: Callable[[str], Path], tmp_path: Path) -> None:
    folder = made("Llama")
    file = rewrite(folder / "merged.gguf", tmp_path / "merged.gguf", type_name)
    report = inspect_merge(folder / "adapter", file, model=folder / "base.gguf")
    assert report.verdict == "passed", (report.sentence, report.others)
    report = inspect_merge(folder / "adapter", folder / "base.gguf", model=folder / "base.gguf")
    assert set(verdicts(report)) == {"not merged"}


def test_a_quantised_base_is_refused(made: Callable[[str], Path], tmp_path: Path) -> None:
    folder = made("Llama")
    base = rewrite(folder / "base.gguf", tmp_path / "base-Q4_K.gguf", "Q4_K")
    with pytest.raises(ConfigError, match=r"base-Q4_K.gguf: .* is Q4_K\. .*name the unquantised base model"):
        inspect_merge(folder / "adapter", folder / "merged", model=base)


@pytest.mark.parametrize("type_name", ["F16", "Q4_K"])
@pytest.mark.parametrize("family", ["Qwen3", "Gemma", "Phi3", "Granite"])
def test_other_families_are_read(family: str, type_name: str, made: Callable[[str], Path], tmp_path: Path) -> None:
    folder = made(family)
    for name, verdict in (("merged", "merged"), ("base", "not merged")):
        file = rewrite(folder / f"{name}.gguf", tmp_path / f"{name}.gguf", type_name)
        report = inspect_merge(folder / "adapter", file, model=folder / "base")
        assert set(verdicts(report)) == {verdict}, report.sentence
        assert not report.others


@pytest.mark.parametrize("type_name", ["F32", "Q8_0", "Q4_K"])
@pytest.mark.parametrize(
    ("fault", "verdict"),
    [
        ("twice", "merged twice"),
        ("alpha left out", "another factor"),
        ("transposed", "transposed"),
        ("rows of the delta", "rows in another order"),
        ("rows of the weight", "rows in another order"),
        ("another base", "other changes"),
    ],
)
def test_faults_are_named(
    fault: str, verdict: str, type_name: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = made("Llama")
    before = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(folder / "base.gguf").tensors}
    stored = {name: load_file(folder / name / "model.safetensors") for name in ("base", "merged")}
    order = np.arange(256).reshape(4, 2, 32).swapaxes(1, 2).reshape(-1)
    affected = "blk.0.attn_q.weight"
    weights = [stored[name]["model.layers.0.self_attn.q_proj.weight"].numpy() for name in ("base", "merged")]
    delta = weights[1] - weights[0]

    def change(name: str, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if name != affected:
            return rows
        changed = {
            "twice": before[name] + 2 * delta[order],
            "alpha left out": before[name] + delta[order] / 1.5,
            "transposed": before[name] + delta.T[order],
            "rows of the delta": before[name] + delta,
            "rows of the weight": weights[1],
            "another base": rows + 0.05 * np.random.default_rng(0).standard_normal(rows.shape),
        }
        return np.asarray(changed[fault], np.float32)

    file = rewrite(folder / "merged.gguf", tmp_path / "changed.gguf", type_name, change)
    report = inspect_merge(folder / "adapter", file, model=folder / "base")
    found = verdicts(report)
    assert found[verdict] == {"model.layers.0.self_attn.q_proj"}, report.sentence
    assert len(found["merged"]) == 13
    assert report.exit_code == 1


@pytest.mark.parametrize("type_name", ["Q8_0", "Q4_K"])
@pytest.mark.parametrize(("size", "factor"), [(1.0, 3.0), (0.1, 0.5), (0.03, 0.5)])
def test_a_factor_is_measured_after_quantisation(
    size: float, factor: float, type_name: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = made("Llama")
    before, after = (
        {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(folder / f"{name}.gguf").tensors}
        for name in ("base", "merged")
    )

    def change(name: str, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.asarray(before[name] + size * factor * (after[name] - before[name]), np.float32)

    adapter = shrunk(folder / "adapter", tmp_path / "adapter", size)
    file = rewrite(folder / "base.gguf", tmp_path / "changed.gguf", type_name, change)
    report = inspect_merge(adapter, file, model=folder / "base")
    assert set(verdicts(report)) == {"another factor"}, report.sentence
    for module in report.modules:
        assert "alpha" not in module.reason
        found = float(module.reason.removeprefix("merged ").removesuffix(" times"))
        assert found == pytest.approx(factor, rel=0.15), module


def shrunk(adapter: Path, target: Path, size: float) -> Path:
    """Copy an adapter with its B matrices times a size."""
    target.mkdir()
    for file in adapter.iterdir():
        (target / file.name).write_bytes(file.read_bytes())

    def shrink(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({key: size * tensor for key, tensor in tensors.items() if "lora_B" in key})

    edit_tensors(target / "adapter_model.safetensors", shrink)
    return target


def test_experts_are_read_from_both_layouts(tmp_path: Path) -> None:
    """Fused in transformers' files, and gate and up apart in llama.cpp's."""
    sizes = SIZES | EXPERT_SIZES
    tiny_decoder("Qwen3Moe", **sizes).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lora = with_lora(
        model, draw_b=False, seed=1, r=4, lora_alpha=6, target_modules=["q_proj"], target_parameters=PARAMETERS
    )
    fill_b(lora, seed=2)
    lora.save_pretrained(tmp_path / "adapter")
    lora.merge_and_unload().save_pretrained(tmp_path / "merged")
    for name in ("base", "merged"):
        to_gguf(tmp_path / name)
    for merged in ("merged", "merged.gguf"):
        report = inspect_merge(tmp_path / "adapter", tmp_path / merged, model=tmp_path / "base")
        assert report.verdict == "passed", (report.sentence, report.others)
        assert any(".experts.1.gate_up_proj" in module.module for module in report.modules)
    for missing in ("base", "base.gguf"):
        report = inspect_merge(tmp_path / "adapter", tmp_path / missing, model=tmp_path / "base")
        assert set(verdicts(report)) == {"not merged"}


@pytest.mark.parametrize("type_name", GRIDS)
def test_a_blocks_numbers_are_evenly_spaced(type_name: str) -> None:
    """Whatever the bytes of a block are, decoding gives d q + m; the scales of random bytes may be any float16."""
    kind = gguf.GGMLQuantizationType[type_name]
    _, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 256, (64, size), dtype=np.uint8)
    grid = GRIDS[type_name]
    found = []
    for fill in (None, grid.least, grid.most):
        rows = raw.copy()
        if fill is not None:
            rows[:, grid.start : grid.stop] = fill
        with np.errstate(all="ignore"):
            found.append(dequantize(rows, kind).astype(np.float64))
    values, least, most = (each[np.isfinite(found).all(axis=(0, 2))] for each in found)
    assert len(values) > 30
    spacing = (most - least) / grid.steps
    number = np.rint((values - least) / np.where(spacing == 0, 1, spacing))
    floor = -1 if type_name == "Q8_0" else 0  # llama.cpp never writes -128, which a damaged file may have
    assert number.min() >= floor
    assert number.max() <= grid.steps
    size_of = np.abs(least) + np.abs(most) + 1e-30
    assert (np.abs(values - (least + number * spacing)) <= 1e-5 * size_of).all()


def test_what_is_no_merged_model_is_refused(made: Callable[[str], Path], tmp_path: Path) -> None:
    folder = made("Llama")
    content = (folder / "merged.gguf").read_bytes()
    for name, data in {"short": content[:-64], "empty": b"", "none": b"GGML" + content[4:]}.items():
        (tmp_path / f"{name}.gguf").write_bytes(data)
        with pytest.raises(ConfigError, match=rf"{name}.gguf: not a GGUF file, or not a complete one"):
            inspect_merge(folder / "adapter", tmp_path / f"{name}.gguf", model=folder / "base")
    other = (content.replace(b"llama", b"bloom"), "its architecture is 'bloom'.*known are gemma")
    (tmp_path / "other.gguf").write_bytes(other[0])
    with pytest.raises(ConfigError, match=other[1]):
        inspect_merge(folder / "adapter", tmp_path / "other.gguf", model=folder / "base")
    start = read_header(folder / "merged.gguf").tensors["blk.0.attn_q.weight"].start
    (tmp_path / "nan.gguf").write_bytes(content[:start] + np.float32(np.nan).tobytes() + content[start + 4 :])
    with pytest.raises(CheckpointError, match=r"attn_q.weight holds NaN or infinity"):
        inspect_merge(folder / "adapter", tmp_path / "nan.gguf", model=folder / "base")
    with pytest.raises(ConfigError, match=r"gone.gguf: cannot be read"):
        inspect_merge(folder / "adapter", tmp_path / "gone.gguf", model=folder / "base")


def test_the_commands_of_the_page_run(
    made: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = made("Llama")
    monkeypatch.chdir(tmp_path)
    for name, target in {"my-lora": "adapter", "merged": "merged", "base": "base"}.items():
        (tmp_path / name).symlink_to(folder / target)
    rewrite(folder / "merged.gguf", tmp_path / "merged-Q8_0.gguf", "Q8_0")
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "inspect-a-merge.md").read_text()
    assert len(page.split()) <= 300
    (block,) = re.findall(r"^```sh\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    for line in block.splitlines():
        assert run(cli, shlex.split(line)[2:]) == 0
        assert "inspect-merge passed: all 14 modules hold the adapter once" in " ".join(capsys.readouterr().out.split())
    html = (tmp_path / "merge.html").read_text()
    assert "Is this adapter in these weights?" in html
    assert html.count("self_attn.q_proj") == 2
    assert run(cli, [*shlex.split(line)[2:]]) == 2
    assert "merge.html: is there already" in capsys.readouterr().err


@pytest.mark.parametrize("size", [1.0, 0.1, 0.02, 0.004])
def test_a_young_adapter_that_bf16_has_erased_is_never_judged_wrongly(
    size: float, made: Callable[[str], Path], tmp_path: Path
) -> None:
    """Merged in bf16 and then quantised: a right merge may be undecided, but is never told from its strength alone."""
    folder = made("Llama")
    adapter = shrunk(folder / "adapter", tmp_path / "adapter", size)
    AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(tmp_path / "merged")
    for name, right in (("merged", "merged"), ("base", "not merged")):
        to_gguf(tmp_path / name)
        file = rewrite(tmp_path / f"{name}.gguf", tmp_path / f"{name}-Q8_0.gguf", "Q8_0")
        report = inspect_merge(adapter, file, model=tmp_path / "base")
        assert set(verdicts(report)) <= {right, "undecided", "rounded away"}, report.sentence
        assert size < 0.1 or set(verdicts(report)) == {right}, report.sentence
        assert not report.others
