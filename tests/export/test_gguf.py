"""The GGUF adapter: its bytes, its row order, its certificate, and faults that the check finds."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from loraover.adapters.uniform import folder as uniform_module
from loraover.checkpoint.exact_tensors import ExactArray
from loraover_export import GgufReport, export_gguf
from loraover_export.formats.gguf import target as target_module
from loraover_export.formats.gguf.base import write_base
from loraover_export.formats.gguf.target import interleave

from strategies import SEEDS, normal
from support.gguf_export import (
    GgufMade,
    apart,
    engine_logits,
    export,
    large_weights,
    logits,
    make_gguf,
    read_tensors,
    rewrite,
    tiny_base,
)
from support.make_checkpoint import make_checkpoint, nearest, numpy64, tree
from support.plain_adapter import tiny_decoder, write_adapter
from support.speed import examples

ALLOWED = 1e-4


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> GgufMade:
    """Tests read it only."""
    return make_gguf(tmp_path_factory.mktemp("llama"), "Llama", use_rslora=True)


def checked(made: GgufMade, output: Path, **options: Any) -> GgufReport:
    return export_gguf(made.adapter, output, **{"base_gguf": made.base_gguf, "threads": 1, **options})


# The row order


@examples(100)
@given(SEEDS, st.integers(1, 5), st.integers(1, 6), st.integers(1, 3))
def test_interleaving_keeps_what_rotation_makes_of_it(seed: int, heads: int, half: int, columns: int) -> None:
    """Rotating halves and then interleaving is interleaving and then rotating neighbours, for each head."""
    rows = normal(seed, heads * 2 * half, columns)
    angles = normal(seed + 1, half, 1)
    cos, sin = angles.cos(), angles.sin()
    x, y = rows.reshape(heads, 2, half, columns).unbind(1)
    halves = torch.stack([x * cos - y * sin, x * sin + y * cos], 1).reshape(rows.shape)
    x, y = interleave(rows, heads).reshape(heads, half, 2, columns).unbind(2)
    neighbours = torch.stack([x * cos - y * sin, x * sin + y * cos], 2).reshape(rows.shape)
    assert torch.equal(interleave(halves, heads), neighbours)


def test_queries_and_keys_have_their_own_numbers_of_heads(tmp_path: Path) -> None:
    """Four heads of queries, two of keys, in an adapter of rank 1 whose B counts its rows."""
    changes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    tiny_decoder("Llama", **changes).save_pretrained(tmp_path / "base")
    attention = "model.layers.0.self_attn"
    matrices = {
        f"{attention}.{name}": (torch.ones(1, 64), torch.arange(float(rows)).reshape(-1, 1))
        for name, rows in (("q_proj", 32), ("k_proj", 16), ("v_proj", 16))
    }
    source = write_adapter(tmp_path / "in", matrices, lora_alpha=1, base_model_name_or_path=str(tmp_path / "base"))
    report = export_gguf(source, tmp_path / "out.gguf")
    assert report.reordered == [f"{attention}.k_proj", f"{attention}.q_proj"]
    found = {name: tensor.flatten().tolist() for name, tensor in read_tensors(tmp_path / "out.gguf").items()}
    head = [0, 4, 1, 5, 2, 6, 3, 7]
    assert found["blk.0.attn_q.weight.lora_b"] == [8 * h + row for h in range(4) for row in head]
    assert found["blk.0.attn_k.weight.lora_b"] == [8 * h + row for h in range(2) for row in head]
    assert found["blk.0.attn_v.weight.lora_b"] == list(range(16))


# The file


def test_an_embeddings_a_of_rank_1(tmp_path: Path) -> None:
    """It is transposed, and one row has the same bytes as one column, but not the same strides."""
    made = make_gguf(tmp_path, "Llama", r=1, rank_pattern={}, alpha_pattern={}, target_modules=["embed_tokens"])
    export_gguf(made.adapter, tmp_path / "out.gguf")
    stored = load_file(made.adapter / "adapter_model.safetensors")
    found = read_tensors(tmp_path / "out.gguf")["token_embd.weight.lora_a"]
    assert torch.equal(found, stored["base_model.model.model.embed_tokens.lora_embedding_A"].mT)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_every_element_is_rounded_once(dtype: str, made: GgufMade, tmp_path: Path) -> None:
    """The oracle scales in float64, pads with zeros, and rounds by `rint`; values are bit for bit its own."""
    report = export_gguf(made.adapter, tmp_path / "out.gguf", dtype=dtype)
    assert report.verdict == "not checked"
    assert all(matrix.passed for matrix in report.matrices)
    found = read_tensors(tmp_path / "out.gguf")
    stored = load_file(made.adapter / "adapter_model.safetensors")
    assert len(found) == len(stored) == len(report.matrices)
    for layer in range(2):
        path = f"base_model.model.model.layers.{layer}.mlp.down_proj"
        a, b = (numpy64(stored[f"{path}.lora_{side}.weight"]) for side in "AB")
        scaling = (5 if layer == 1 else 12) / np.sqrt(len(a))
        assert report.scaling[path.removeprefix("base_model.model.")] == scaling
        name = f"blk.{layer}.ffn_down.weight"
        np.testing.assert_array_equal(found[f"{name}.lora_a"][:1].numpy(), nearest(a, dtype))
        np.testing.assert_array_equal(found[f"{name}.lora_b"][:, :1].numpy(), nearest(scaling * b, dtype))
        assert not found[f"{name}.lora_a"][1:].any()
        assert not found[f"{name}.lora_b"][:, 1:].any()


def test_the_bytes_are_those_of_the_specification(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A query of one head with rank 2 and scaling 2, put together here without the gguf package."""
    monkeypatch.chdir(tmp_path)
    changes = {"vocab_size": 8, "hidden_size": 4, "num_hidden_layers": 1, "head_dim": 4, "num_attention_heads": 1}
    tiny_decoder("Llama", **changes).save_pretrained("base")
    a, b = torch.tensor([[1.0, 2, 3, 4], [0, 1, 0, -1]]), torch.arange(8.0).reshape(4, 2) / 4
    write_adapter(Path("in"), {"model.layers.0.self_attn.q_proj": (a, b)}, lora_alpha=4, base_model_name_or_path="base")
    export_gguf("in", "golden.gguf")

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    def entry(key: str, value: str | int | float) -> bytes:
        if isinstance(value, str):
            return text(key) + struct.pack("<I", 8) + text(value)
        return text(key) + (struct.pack("<II", 4, value) if isinstance(value, int) else struct.pack("<If", 6, value))

    def info(name: str, columns: int, rows: int, offset: int) -> bytes:
        return text(name) + struct.pack("<IQQIQ", 2, columns, rows, 0, offset)

    header = b"GGUF" + struct.pack("<IQQ", 3, 2, 8)
    header += entry("general.architecture", "llama") + entry("general.file_type", 0) + entry("general.type", "adapter")
    header += entry("general.name", "golden") + entry("general.base_model.count", 1)
    header += entry("general.base_model.0.name", "base")
    header += entry("adapter.type", "lora") + entry("adapter.lora.alpha", 2.0)
    header += info("blk.0.attn_q.weight.lora_a", 4, 2, 0) + info("blk.0.attn_q.weight.lora_b", 2, 4, 32)
    header += bytes(-len(header) % 32)
    data = struct.pack("<8f", 1, 2, 3, 4, 0, 1, 0, -1)
    data += struct.pack("<8f", 0, 0.5, 2, 2.5, 1, 1.5, 3, 3.5)  # 2 B, and rows 0 2 1 3
    assert Path("golden.gguf").read_bytes() == header + data


def test_a_checkpoint_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_checkpoint(tmp_path, base_options={"head_dim": 8}).path
    before = tree(source)
    assert export(source, tmp_path / "out.gguf", "--json") == 0
    out, err = capsys.readouterr()
    report = GgufReport.model_validate(json.loads(out))
    assert tree(source) == before
    assert all(matrix.over_parameterised for matrix in report.matrices)
    assert "--base-gguf FILE compares its logits" in err
    assert f"--lora {tmp_path / 'out.gguf'}" in err


# The check by llama.cpp


@pytest.mark.engine
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_llama_cpp_runs_every_data_type(dtype: str, made: GgufMade, tmp_path: Path) -> None:
    report = checked(made, tmp_path / "out.gguf", dtype=dtype)
    assert report.verdict == "passed"
    assert report.check is not None
    assert report.check.error <= (ALLOWED if dtype == "fp32" else 0.1 * report.check.adapter_effect)


@pytest.mark.engine
@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head", "q_proj"]])
def test_embeddings_and_heads_that_are_not_tied(targets: list[str], tmp_path: Path) -> None:
    made = make_gguf(tmp_path, "Llama", target_modules=targets, rank_pattern={"q_proj": 2}, use_rslora=True)
    assert checked(made, tmp_path / "out.gguf").verdict == "passed"
    found = engine_logits(made.base_gguf, tmp_path / "out.gguf")
    assert apart(found, made.logits()) <= ALLOWED
    assert apart(made.logits(), made.base_logits()) > 100 * ALLOWED


@pytest.mark.engine
def test_a_checkpoint_is_compared_with_its_unfolded_model(tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path, base_options={"head_dim": 8})
    write_base(made.model.get_base_model().__class__.from_pretrained(made.base), tmp_path / "base.gguf")
    report = export_gguf(made.path, tmp_path / "out.gguf", base_gguf=tmp_path / "base.gguf", threads=1)
    assert report.verdict == "passed"
    assert apart(engine_logits(tmp_path / "base.gguf", tmp_path / "out.gguf"), logits(made.model)) <= ALLOWED


def scaling_forgotten(exact: ExactArray, scaling: float) -> ExactArray:
    return exact


FAULTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "scaling dropped": (uniform_module, "scale", scaling_forgotten),
    "layers swapped": (
        target_module.GgufTarget,
        "tensor_name",
        lambda self, adapted, side: (
            f"blk.{1 - int(adapted.path.split('.')[2])}.{self.modules[adapted.path].tensor[6:]}.lora_{side.lower()}"
        ),
    ),
}


@pytest.mark.engine
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_fails_and_leaves_nothing(
    fault: str, made: GgufMade, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(*FAULTS[fault])
    assert export(made.adapter, tmp_path / "out.gguf", "--base-gguf", str(made.base_gguf), "--threads", "1") == 1
    assert "nothing was written" in capsys.readouterr().out
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("mutant", ["an element", "the name", "a field"])
def test_a_file_that_holds_something_else_is_noticed(
    mutant: str, made: GgufMade, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(fields: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        if mutant == "an element":
            tensors["blk.1.attn_v.weight.lora_b"][3, 1] += 1e-6
        elif mutant == "the name":
            tensors["blk.0.attn_v.weight.lora_a"] = tensors.pop("blk.1.attn_v.weight.lora_a")
        else:
            fields["adapter.lora.alpha"] = 8.0

    right = gguf.GGUFWriter.close

    def wrong(writer: Any) -> None:
        right(writer)
        monkeypatch.undo()  # `rewrite` has a writer too
        path = Path(writer.path)
        rewrite(path, path.with_suffix(".new"), change).replace(path)

    monkeypatch.setattr(gguf.GGUFWriter, "close", wrong)
    assert export(made.adapter, tmp_path / "out.gguf") == 2
    assert "does not hold what was written" in capsys.readouterr().err
    assert tree(tmp_path) == {}


@pytest.mark.engine
def test_quantisation_has_its_own_distance(made: GgufMade, tmp_path: Path) -> None:
    """The coarser the base, the larger the distance of base from base, and what the check allows."""
    distances = [0.0]
    for name in ("F16", "Q8_0", "Q4_0"):
        kind = gguf.GGMLQuantizationType[name]
        base = rewrite(made.base_gguf, tmp_path / f"{name}.gguf", lambda *_: None, matrices_as=kind)
        report = checked(made, tmp_path / f"adapter-{name}.gguf", base_gguf=base)
        assert report.check is not None
        assert name in report.check.weight_types
        assert report.verdict in ("passed", "inconclusive")
        assert report.check.error <= report.check.bound
        distances.append(report.check.base_distance)
    assert distances == sorted(distances)
    assert distances[1] > ALLOWED


@pytest.mark.engine
def test_another_models_weights_prove_nothing(
    made: GgufMade, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same shapes, but other weights: the distance of the bases is large, and exit code 3 says so."""
    other = write_base(large_weights(tiny_base("Llama", seed=5)), tmp_path / "other.gguf")
    assert export(made.adapter, tmp_path / "out.gguf", "--base-gguf", str(other), "--threads", "1") == 3
    out = capsys.readouterr().out
    assert "export inconclusive" in out
    assert "it holds another model's weights" in out
    assert (tmp_path / "out.gguf").exists()
