"""Weights that servers have: each reader against the arithmetic of its format, and verdicts on four bits."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from loraover.common.errors import ConfigError, LoraOverError
from loraover.models.load import load_model, resolve_model
from loraover_export.formats.gguf.base import write_base
from loraover_serve import verify_adapter
from loraover_serve.comparison import weight_files
from loraover_serve.comparison.served_weights import ServedWeights, open_served_weights
from loraover_serve.judge.limits import PLAIN
from loraover_serve.judge.names import OTHER_BASE
from loraover_serve.judge.reference import read_reference

from benchmarks.verify_noise import quantise
from support.openai_server import openai_server
from support.recorded import record
from support.served_weights import change_config, parameters, save_wide
from support.verified import Planted, Served, Tensors, plant, save_adapter, save_base

Wide = npt.NDArray[np.float64]
LAYER = "model.layers.1.mlp.down_proj"
QUERY = "model.layers.0.self_attn.q_proj.weight"


def scaled(factor: float) -> Planted:
    """An adapter whose deltas are multiplied by a factor."""

    def change(tensors: Tensors) -> Tensors:
        return {key: factor * t if "lora_B" in key else t for key, t in tensors.items()}

    return Planted("", "", {}, change)


def to_gguf(base: Path, folder: Path, kind: str) -> Path:
    write_base(load_model(resolve_model(str(base))), folder / "exact.gguf")
    quantise(folder / "exact.gguf", folder / f"{kind}.gguf", kind)
    return folder / f"{kind}.gguf"


def q4_0(blocks: Wide) -> Wide:
    """Blocks of 32 numbers, of which the largest becomes -8 times a scale of 16 bits."""
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)
    exact = largest.astype(np.float32) / np.float32(-8)
    scale = exact.astype(np.float16).astype(np.float64)
    inverse = np.divide(np.float32(1), exact, out=np.zeros_like(exact), where=exact != 0)
    levels = np.clip(np.trunc(blocks.astype(np.float32) * inverse + np.float32(8.5)), 0, 15)
    found: Wide = (levels.astype(np.float64) - 8) * scale
    return found


def test_a_gguf_file_has_the_numbers_of_its_format(tmp_path: Path) -> None:
    """Of queries, whose rows llama.cpp has in another order, too."""
    base = save_wide(tmp_path / "base")
    exact = {name: p.detach().double().numpy() for name, p in load_model(resolve_model(str(base))).named_parameters()}
    found = parameters(to_gguf(base, tmp_path, "Q4_0"), base)
    for name in (QUERY, f"{LAYER}.weight", "lm_head.weight"):
        expected = q4_0(exact[name].reshape(len(exact[name]), -1, 32)).reshape(exact[name].shape)
        assert np.array_equal(found[name].double().numpy(), expected.astype(np.float32).astype(np.float64)), name
        assert not np.array_equal(expected, exact[name])
    assert torch.equal(found["model.norm.weight"].double(), torch.from_numpy(exact["model.norm.weight"]))


@pytest.mark.parametrize("kind", ["Q4_1", "Q5_0", "Q8_0"])
def test_a_gguf_file_is_dequantised_as_its_package_does(kind: str, tmp_path: Path) -> None:
    import gguf
    from gguf.quants import dequantize

    base = save_wide(tmp_path / "base")
    file = to_gguf(base, tmp_path, kind)
    found = parameters(file, base)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    down = stored["blk.1.ffn_down.weight"]
    assert np.array_equal(found[f"{LAYER}.weight"].numpy(), dequantize(down.data, down.tensor_type))


def test_a_gguf_file_is_read_in_blocks_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_wide(tmp_path / "base")
    file = to_gguf(base, tmp_path, "Q4_1")
    whole = parameters(file, base)
    monkeypatch.setattr(weight_files, "READ_AT_ONCE_BYTES", 300)
    assert all(torch.equal(whole[name], tensor) for name, tensor in parameters(file, base).items())


def write_mlx(base: Path, folder: Path, bits: int, group: int = 32) -> tuple[Path, dict[str, Wide]]:
    """A folder as mlx-lm quantises it, and its matrices in float64."""
    shutil.copytree(base, folder)
    tensors, expected = load_file(base / "model.safetensors"), {}
    draw = np.random.default_rng(0)
    for key, tensor in [*tensors.items()]:
        if tensor.ndim != 2:
            continue
        rows, columns = tensor.shape
        numbers = draw.integers(0, 2**bits, (rows, columns), dtype=np.uint64)
        packed = numbers.reshape(rows, -1, 32 // bits) << (np.arange(32 // bits, dtype=np.uint64) * np.uint64(bits))
        words = packed.sum(-1).astype(np.uint32)
        scales, biases = (draw.normal(size=(rows, columns // group)).astype(np.float16) for _ in range(2))
        path = key.removesuffix(".weight")
        tensors[key] = torch.from_numpy(words.view(np.int32)).view(torch.uint32)
        tensors[f"{path}.scales"], tensors[f"{path}.biases"] = map(torch.from_numpy, (scales, biases))
        grouped = numbers.astype(np.float64).reshape(rows, -1, group)
        expected[key] = (grouped * scales[..., None] + biases[..., None]).reshape(rows, columns)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    change_config(folder, quantization={"group_size": group, "bits": bits})
    return folder, expected


@pytest.mark.parametrize("bits", [4, 8])
def test_a_folder_of_mlx_has_the_numbers_of_its_formula(bits: int, tmp_path: Path) -> None:
    base = save_wide(tmp_path / "base")
    folder, expected = write_mlx(base, tmp_path / "mlx", bits)
    found = parameters(folder, base)
    for key, wide in expected.items():
        assert np.abs(found[key].double().numpy() - wide).max() <= 2**-23 * np.abs(wide).max(), key


def test_mlx_dequantises_alike(tmp_path: Path) -> None:
    python = os.environ.get("LORAOVER_MLX")
    if not python or not Path(python).exists():
        pytest.skip("no environment with mlx")
    base = save_wide(tmp_path / "base")
    folder, _ = write_mlx(base, tmp_path / "mlx", 4)
    program = (
        "import sys, numpy as np, mlx.core as mx; w = mx.load(sys.argv[1]); p = sys.argv[2]; "
        "f = lambda n: w[f'{p}.{n}'].astype(mx.float32); "
        "np.save(sys.argv[3], np.array(mx.dequantize(w[p + '.weight'], f('scales'), f('biases'), 32, 4)))"
    )
    words = [python, "-c", program, str(folder / "model.safetensors"), LAYER, str(tmp_path / "w.npy")]
    subprocess.run(words, check=True, capture_output=True)
    theirs = np.load(tmp_path / "w.npy")
    found = parameters(folder, base)[f"{LAYER}.weight"].numpy()
    assert np.abs(found - theirs).max() <= 2**-23 * np.abs(theirs).max()


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_bitsandbytes_dequantises_alike(form: str, tmp_path: Path) -> None:
    """A model that transformers loads in this form is the oracle."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from bitsandbytes import functional
    from transformers import BitsAndBytesConfig

    how: dict[str, Any] = {"load_in_8bit": True}
    if form == "nf4":
        how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    base = save_base(tmp_path / "base", hidden_size=128, intermediate_size=256)
    config = BitsAndBytesConfig(**how)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, device_map={"": "cpu"})
    module = model.get_submodule(LAYER)
    if form == "nf4":
        expected = functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    else:
        expected = module.weight.data * module.weight.SCB[:, None] / 127
    model.save_pretrained(tmp_path / "quantised")
    found = parameters(tmp_path / "quantised", base)[f"{LAYER}.weight"]
    assert torch.allclose(found, expected.float(), rtol=2**-22, atol=0)


def write_awq(base: Path, folder: Path, group: int = 32) -> tuple[Path, Wide]:
    """A folder with one matrix of AWQ, and this matrix in float64."""
    shutil.copytree(base, folder)
    tensors, draw = load_file(base / "model.safetensors"), np.random.default_rng(0)
    rows, columns = tensors.pop(f"{LAYER}.weight").shape
    numbers, zeros = (draw.integers(0, 16, size) for size in ((columns, rows), (columns // group, rows)))
    scales = draw.normal(size=zeros.shape).astype(np.float16)
    places = np.array([0, 2, 4, 6, 1, 3, 5, 7])  # column of each nibble, the lowest first

    def packed(each: Any) -> Tensor:
        nibbles = each.reshape(len(each), -1, 8)[..., places].astype(np.uint64)
        words = (nibbles << (4 * np.arange(8, dtype=np.uint64))).sum(-1).astype(np.uint32)
        return torch.from_numpy(words.view(np.int32))

    parts = {"qweight": packed(numbers), "qzeros": packed(zeros), "scales": torch.from_numpy(scales)}
    save_file(tensors | {f"{LAYER}.{name}": part for name, part in parts.items()}, folder / "model.safetensors")
    method = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    change_config(folder, quantization_config=method)
    levels = numbers.astype(np.float64) - np.repeat(zeros, group, axis=0)
    return folder, (levels * np.repeat(scales.astype(np.float64), group, axis=0)).T


def test_a_matrix_of_awq_has_the_numbers_of_its_layout(tmp_path: Path) -> None:
    base = save_wide(tmp_path / "base")
    folder, expected = write_awq(base, tmp_path / "awq")
    assert np.array_equal(parameters(folder, base)[f"{LAYER}.weight"].double().numpy(), expected)


def test_compressed_tensors_reads_awq_alike(tmp_path: Path) -> None:
    converters = pytest.importorskip("compressed_tensors.entrypoints.convert.converters")
    base = save_wide(tmp_path / "base")
    folder, expected = write_awq(base, tmp_path / "awq")
    parts = {key: part for key, part in load_file(folder / "model.safetensors").items() if key.startswith(LAYER)}
    converter = converters.AutoAWQConverter(group_size=32)
    config = converter.update_config(None).model_dump(mode="json")
    converted = converter.process(parts)
    tensors = load_file(base / "model.safetensors")
    del tensors[f"{LAYER}.weight"]
    shutil.copytree(base, tmp_path / "ct")
    save_file(tensors | converted, tmp_path / "ct" / "model.safetensors")
    scheme = config["config_groups"]["config_group_0"] | {"targets": ["re:.*1.mlp.down_proj"]}
    config |= {"config_groups": {"config_group_0": scheme}, "quant_method": "compressed-tensors"}
    change_config(tmp_path / "ct", quantization_config=config)
    found = parameters(tmp_path / "ct", base)[f"{LAYER}.weight"].double().numpy()
    assert np.abs(found - expected).max() <= 2**-10 * np.abs(expected).max()  # its products are of 16 bits


def write_graph(folder: Path, zeros: str, block: int = 16, rows: int = 8, columns: int = 40) -> Path:
    """A graph whose only node multiplies by a matrix of four bits, with a last block that is not full."""
    draw, blocks = np.random.default_rng(1), -(-columns // block)
    numbers = draw.integers(0, 256, (rows, blocks, block // 2)).astype(np.uint8)
    scales = draw.normal(size=rows * blocks).astype(np.float32)
    tensors: dict[str, Any] = {"model.layers.0.attn.q_proj.MatMul.weight_Q4": numbers, "scales": scales}
    if zeros == "packed":
        tensors["zeros"] = draw.integers(0, 256, rows * -(-blocks // 2)).astype(np.uint8)
    if zeros == "float":
        tensors["zeros"] = draw.normal(size=rows * blocks).astype(np.float32)
    settings: Any = {"K": columns, "N": rows, "bits": 4, "block_size": block, "domain": "com.microsoft"}
    node = helper.make_node("MatMulNBits", ["x", *tensors], ["y"], "/model/layers.0/attn/q_proj/MatMul_Q4", **settings)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, columns])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, rows])
    stored = [numpy_helper.from_array(value, key) for key, value in tensors.items()]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "g", [x], [y], stored)
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), folder / "model.onnx")
    return folder / "model.onnx"


@pytest.mark.parametrize("zeros", ["none", "packed", "float"])
def test_onnx_runtime_multiplies_by_the_dequantised_matrix(zeros: str, tmp_path: Path) -> None:
    from onnxruntime import InferenceSession

    from loraover_serve.comparison.onnx_weights import OnnxGraph

    path = write_graph(tmp_path, zeros)
    session = InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (theirs,) = session.run(None, {"x": np.eye(40, dtype=np.float32)})
    found = OnnxGraph(path).read("model.layers.0.self_attn.q_proj.weight", {})
    assert found is not None
    assert np.abs(found - theirs.T).max() <= 2**-20 * np.abs(theirs).max()


def dequantised(where: Path, base: Path, folder: Path) -> Path:
    """The model that a server has, as a folder in float32."""
    model = load_model(resolve_model(str(base)))
    with open_served_weights(where) as weights:
        weights.put_into(model)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


class FourBits:
    """A base model, its adapter, and what servers with two forms of four bits have."""

    def __init__(self, folder: Path) -> None:
        self.base = save_wide(folder / "base")
        self.adapter = save_adapter(folder / "adapter", self.base)
        self.files = [to_gguf(self.base, folder, kind) for kind in ("Q4_0", "Q4_1")]
        self.models = [dequantised(file, self.base, folder / file.stem) for file in self.files]
        (folder / "one").mkdir()
        (folder / "both").mkdir()
        self.one = record(self.base, self.adapter, folder / "one", base_weights=self.files[:1])
        self.both = record(self.base, self.adapter, folder / "both", base_weights=[self.base, *self.files])

    def judged(self, reference: Path, base: Path, adapter: Path | None = None, **options: Any) -> Any:
        served = Served(base, {"base": None, "shop": adapter or self.adapter})
        with openai_server(served, ("base", "shop")) as server:
            report = verify_adapter(
                references=[reference], endpoint=server.url, served_name="shop", repeats=1, **options
            )
        return report.engines[0]


@pytest.fixture(scope="module")
def four_bits(tmp_path_factory: pytest.TempPathFactory) -> FourBits:
    return FourBits(tmp_path_factory.mktemp("four bits"))


def test_a_right_adapter_on_four_bits_is_as_trained(four_bits: FourBits) -> None:
    found = four_bits.judged(four_bits.one, four_bits.models[0])
    assert found.verdict == "as trained", found.reason
    assert abs(found.strength.value - 1) < 1e-3
    assert found.weights.startswith("GGUF Q4_0")


@pytest.mark.parametrize("factor", [0.8, 1.2])
def test_a_scaled_adapter_on_four_bits_differs(factor: float, four_bits: FourBits, tmp_path: Path) -> None:
    wrong = plant(scaled(factor), four_bits.adapter, tmp_path / "wrong")
    found = four_bits.judged(four_bits.one, four_bits.models[0], wrong)
    assert found.verdict == "differs", found.reason


def test_weights_of_another_form_are_told(four_bits: FourBits) -> None:
    """The server has float weights where Q4_0 was recorded."""
    found = four_bits.judged(four_bits.one, four_bits.base)
    assert found.verdict == "inconclusive"
    assert found.number_format not in PLAIN
    assert "the server has other weights than the recorded ones (GGUF Q4_0" in found.reason


def test_of_several_weights_those_of_the_server_are_taken(four_bits: FourBits) -> None:
    for served, name in zip(
        [four_bits.base, *four_bits.models], ["safetensors F32", "GGUF Q4_0", "GGUF Q4_1"], strict=True
    ):
        found = four_bits.judged(four_bits.both, served, served_format="int4")
        assert found.verdict == "as trained", found.reason
        assert found.weights.startswith(name)
        assert name in found.reason


def test_coarser_weights_than_declared_do_not_pass(four_bits: FourBits) -> None:
    """They are recorded beside those in float32, which the server had before."""
    found = four_bits.judged(four_bits.both, four_bits.models[1])
    assert found.verdict == "inconclusive", found.reason
    assert "GGUF Q4_1" in found.reason
    assert "--served-format" in found.reason or "served_format" in found.reason


def test_a_quick_check_names_no_weights(four_bits: FourBits) -> None:
    found = four_bits.judged(four_bits.both, four_bits.models[1], quick=True)
    assert found.weights is None
    assert "which weights the server has" in found.not_checked


def test_another_base_model_fits_none_of_several_weights(four_bits: FourBits, tmp_path: Path) -> None:
    other = save_wide(tmp_path / "other", seed=5)
    found = four_bits.judged(four_bits.both, other)
    assert (found.verdict, found.fault) == ("differs", OTHER_BASE), found.reason


def test_what_bases_have_in_common_is_held_once(four_bits: FourBits) -> None:
    content = json.loads(gzip.decompress(four_bits.both.read_bytes()))
    assert content["schema_version"] == 2
    assert len(content["bases"]) == 2
    assert all("texts" not in each and "chats" not in each for each in content["bases"])
    known = read_reference(four_bits.both)
    assert known.other_bases == 2
    digests = [known.on_other(index).weights_sha256 for index in range(2)]
    assert [known.on_weights(each).weights_sha256 for each in digests] == digests
    assert known.on_weights(None) is known


def test_a_base_of_several_is_recorded_as_it_is_alone(four_bits: FourBits) -> None:
    """But for the texts of tokens, which are those of all bases."""
    both, one = (json.loads(gzip.decompress(path.read_bytes())) for path in (four_bits.both, four_bits.one))
    found = {key: value for key, value in (both | both["bases"][0]).items() if key not in ("bases", "made")}
    assert found.pop("texts").items() >= one["texts"].items()
    assert json.dumps(found, sort_keys=True) == json.dumps(
        {key: value for key, value in one.items() if key not in ("texts", "made")}, sort_keys=True
    )


def test_one_base_is_in_memory_at_a_time(four_bits: FourBits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put, made = ServedWeights.put_into, dict[Path, Any]()

    def counted(self: ServedWeights, model: Any) -> None:
        assert not [where for where, known in made.items() if where != self.where and known() is not None]
        made[self.where] = weakref.ref(model)
        put(self, model)

    monkeypatch.setattr(ServedWeights, "put_into", counted)
    record(four_bits.base, four_bits.adapter, tmp_path, base_weights=[four_bits.base, *four_bits.files])
    assert len(made) == 3


def not_a_model(base: Path, folder: Path) -> Path:
    folder.mkdir()
    return folder


def unknown_method(base: Path, folder: Path) -> Path:
    shutil.copytree(base, folder)
    change_config(folder, quantization_config={"quant_method": "quip", "bits": 4})
    return folder


def with_nan(base: Path, folder: Path) -> Path:
    shutil.copytree(base, folder)
    tensors = load_file(base / "model.safetensors")
    tensors[QUERY][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def without_a_matrix(base: Path, folder: Path) -> Path:
    shutil.copytree(base, folder)
    tensors = {key: t for key, t in load_file(base / "model.safetensors").items() if key != QUERY}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def with_one_more(base: Path, folder: Path) -> Path:
    shutil.copytree(base, folder)
    tensors = load_file(base / "model.safetensors") | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def of_other_shapes(base: Path, folder: Path) -> Path:
    return save_base(folder, hidden_size=64, intermediate_size=96)


def of_other_heads(base: Path, folder: Path) -> Path:
    """Of the same shapes."""
    shutil.copytree(base, folder)
    change_config(folder, num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    return folder


def with_a_tied_head(base: Path, folder: Path) -> Path:
    shutil.copytree(base, folder)
    change_config(folder, tie_word_embeddings=True)
    return folder


def with_a_group_missing(base: Path, folder: Path) -> Path:
    write_mlx(base, folder, 4)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{LAYER}.scales"] = tensors[f"{LAYER}.scales"][:, :-1].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def with_a_list_for_a_method(base: Path, folder: Path) -> Path:
    shutil.copytree(base, folder)
    change_config(folder, quantization_config={"quant_method": ["awq"]})
    return folder


def without_scales(base: Path, folder: Path) -> Path:
    write_awq(base, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{LAYER}.scales"] = tensors[f"{LAYER}.scales"][:0].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def graph_of_other_files(base: Path, folder: Path) -> Path:
    folder.mkdir()
    (folder.parent / "secret").write_bytes(bytes(4096))
    path = write_graph(folder, "none")
    graph = onnx.load(path)
    tensor = graph.graph.initializer[1]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    path.write_bytes(graph.SerializeToString())
    return folder


def graph_of_an_unknown_type(base: Path, folder: Path) -> Path:
    folder.mkdir()
    graph = helper.make_graph([], "g", [], [], [numpy_helper.from_array(np.ones(3, np.float32), "x")])
    graph.initializer[0].data_type = 999
    onnx.save(helper.make_model(graph), folder / "model.onnx")
    return folder


def broken_graph(base: Path, folder: Path) -> Path:
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"\xff" * 40)
    return folder


def broken_gguf(base: Path, folder: Path) -> Path:
    file = folder.with_suffix(".gguf")
    file.write_bytes(b"GGUF" + b"\xff" * 40)
    return file


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda base, folder: folder, "no such file"),
        (not_a_model, "config.json"),
        (unknown_method, "quantised by 'quip', which is not read"),
        (with_nan, "q_proj.weight holds NaN"),
        (without_a_matrix, "holds no tensor for model.layers.0.self_attn.q_proj.weight"),
        (with_one_more, "q_proj.bias belongs to no parameter"),
        (of_other_shapes, "has the shape"),
        (of_other_heads, "has num_attention_heads 8, num_key_value_heads 4, head_dim 8, and the adapter's base"),
        (with_a_tied_head, "has tie_word_embeddings True, and the adapter's base model has tie_word_embeddings False"),
        (with_a_group_missing, "do not fit together"),
        (with_a_list_for_a_method, "which is not read here"),
        (without_scales, "do not fit together"),
        (graph_of_other_files, "expected a file in its own folder"),
        (graph_of_an_unknown_type, "do not fit together"),
        (broken_graph, "cannot be read as an ONNX graph"),
        (broken_gguf, "Expected a GGUF file"),
    ],
)
def test_weights_that_do_not_fit_are_refused(make: Callable[[Path, Path], Path], words: str, tmp_path: Path) -> None:
    base = save_wide(tmp_path / "base")
    with pytest.raises(LoraOverError, match=words.replace("(", ".")):
        parameters(make(base, tmp_path / "hostile"), base)


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": None},
        {"head_dim": 16},
        {"model_type": None},
        {"rope_parameters": None, "rope_theta": 10000.0, "torch_dtype": "float16", "rope_scaling": None},
        {"quantization_config": None, "use_cache": False, "num_key_value_heads": None},
    ],
)
def test_a_config_that_says_the_same_otherwise_is_read(changes: dict[str, Any], tmp_path: Path) -> None:
    """Qwen2's class has no head_dim, and files may leave out whatever has a default."""
    sizes = {"hidden_size": 512, "num_attention_heads": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    Qwen2ForCausalLM(Qwen2Config(vocab_size=64, **sizes)).save_pretrained(tmp_path / "base")
    folder = shutil.copytree(tmp_path / "base", tmp_path / "folder")
    change_config(folder, **changes)
    (folder / "config.json").write_text(
        json.dumps({name: value for name, value in json.loads((folder / "config.json").read_text()).items() if value})
    )
    assert parameters(folder, tmp_path / "base")


def test_a_config_of_images_is_compared_by_that_of_its_text(tmp_path: Path) -> None:
    """Conversions of the text model alone may keep the configuration of the whole."""
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    config = Gemma3TextConfig(vocab_size=64, intermediate_size=32, num_hidden_layers=1, **sizes)
    Gemma3ForCausalLM(config).save_pretrained(tmp_path / "base")
    folder, file = shutil.copytree(tmp_path / "base", tmp_path / "folder"), tmp_path / "folder" / "config.json"
    text = json.loads(file.read_text())
    for heads, is_read in ((2, True), (1, False)):
        whole = {"model_type": "gemma3", "text_config": text | {"num_attention_heads": heads}}
        file.write_text(json.dumps(whole))
        with nullcontext() if is_read else pytest.raises(ConfigError, match="has num_attention_heads 1"):
            assert parameters(folder, tmp_path / "base")


@pytest.mark.parametrize(("added", "is_read"), [(0.0, True), (1.0, True), (0.5, False)])
def test_the_base_model_shows_what_a_norm_lacks(added: float, is_read: bool, tmp_path: Path) -> None:
    base = save_wide(tmp_path / "base")
    model, name = load_model(resolve_model(str(base))), "model.layers.0.input_layernorm.weight"
    expected = model.get_parameter(name).detach()
    stored = [numpy_helper.from_array((expected + added).numpy(), "model.layers.0.input_layernorm.weight")]
    onnx.save(helper.make_model(helper.make_graph([], "g", [], [], stored)), tmp_path / "model.onnx")
    with open_served_weights(tmp_path / "model.onnx") as weights:
        weights.file.prepare(model)
        if is_read:
            found = weights.file.read(name)
            assert found is not None
            assert torch.equal(found, expected)
        else:
            with pytest.raises(ConfigError, match="expected 0, or 1"):
                weights.file.read(name)


def test_too_many_weights_are_refused_before_anything_is_recorded(four_bits: FourBits, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="17, expected 16 at most"):
        record(four_bits.base, four_bits.adapter, tmp_path, base_weights=[tmp_path / str(at) for at in range(17)])
    shutil.copy(four_bits.files[0], copied := tmp_path / "copied.gguf")
    with pytest.raises(ConfigError, match="hold the same weights"):
        record(four_bits.base, four_bits.adapter, tmp_path, base_weights=[four_bits.files[0], copied])


def test_engines_with_other_weights_are_refused_by_name(four_bits: FourBits) -> None:
    with pytest.raises(ConfigError, match="onnx would be started on the base model's own weights"):
        verify_adapter(four_bits.adapter, engines=["onnx"], base_weights=four_bits.files[0])


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    base = save_wide(tmp_path / "base")
    shutil.copytree(base, folder := tmp_path / "nf4")
    change_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match="pip install bitsandbytes"):
        parameters(folder, base)


def test_weights_belong_to_a_base_model_in_memory(four_bits: FourBits, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="need a base model in memory"):
        record(four_bits.base, four_bits.adapter, tmp_path, base_weights=four_bits.files, max_memory_gib=1e-9)
