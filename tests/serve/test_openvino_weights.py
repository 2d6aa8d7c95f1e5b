"""Weights in models of OpenVINO: files that are written here by hand, and ones of optimum-intel that OpenVINO reads."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from loraover.common.errors import ConfigError
from loraover_serve.comparison.served_weights import open_served_weights
from loraover_serve.engines.openvino import CONVERT

from support.plain_adapter import tiny_decoder
from support.served_weights import parameters, save_wide

GROUP = 16
NORM = "model.layers.0.input_layernorm"
MATRIX = "model.layers.0.mlp.up_proj.weight"
Numbers = npt.NDArray[Any]


class Written:
    """A model of OpenVINO that is written layer by layer."""

    def __init__(self) -> None:
        self.root = ElementTree.Element("net", name="Model0", version="11")
        self.layers = ElementTree.SubElement(self.root, "layers")
        self.edges = ElementTree.SubElement(self.root, "edges")
        self.content = b""

    def layer(self, kind: str, name: str, inputs: Sequence[int], **data: object) -> int:
        number = len(self.layers)
        made = ElementTree.SubElement(self.layers, "layer", {"id": str(number), "name": name, "type": kind})
        ElementTree.SubElement(made, "data", {key: str(value) for key, value in data.items()})
        for port, origin in enumerate(inputs):
            ends = {"from-layer": origin, "from-port": 0, "to-layer": number, "to-port": port}
            ElementTree.SubElement(self.edges, "edge", {key: str(value) for key, value in ends.items()})
        return number

    def constant(self, name: str, kind: str, numbers: Numbers) -> int:
        content = packed(numbers) if kind in ("u4", "i4") else numbers.tobytes()
        place = {"offset": len(self.content), "size": len(content)}
        self.content += content
        shape = ", ".join(map(str, numbers.shape))
        return self.layer("Const", name, (), element_type=kind, shape=shape, **place)

    def matrix(self, name: str, kind: str, levels: Numbers, zeros: Numbers | None, scales: Numbers) -> int:
        """Groups (rows, groups, GROUP) of whole numbers, less zero points, times scales, as a matrix."""
        made = self.layer("Convert", "c", [self.constant(f"self.{name}", kind, levels)], destination_type="f16")
        if zeros is not None:
            zero = self.layer("Convert", "z", [self.constant("zero", kind, zeros)], destination_type="f16")
            made = self.layer("Subtract", "s", [made, zero])
        made = self.layer("Multiply", "m", [made, self.constant("scale", "f16", scales)])
        shape = self.constant("shape", "i64", np.array([len(levels), -1], np.int64))
        return self.layer("Convert", "f", [self.layer("Reshape", "r", [made, shape])], destination_type="f32")

    def save(self, folder: Path) -> Path:
        folder.mkdir()
        path = folder / "openvino_model.xml"
        path.write_bytes(ElementTree.tostring(self.root))
        path.with_suffix(".bin").write_bytes(self.content)
        return path


def packed(numbers: Numbers) -> bytes:
    """Numbers of 4 bits, two in a byte, the first in its lower half."""
    flat = numbers.astype(np.int64).ravel() & 15
    found: bytes = (flat[0::2] | flat[1::2] << 4).astype(np.uint8).tobytes()
    return found


def write(base: Path, folder: Path, *, kind: str = "u4", transposed: bool = False, added: float = 0.0) -> Any:
    """A model of OpenVINO with all that a base model has, and its matrices in float64.

    Args:
        kind: Type of the matrices' numbers.
        transposed: Products read the columns of matrices, which are stored in the other order.
        added: Number that is added to norms.
    """
    model, draw, expected = Written(), np.random.default_rng(0), {}
    activations = model.layer("Parameter", "input_ids", ())
    for name, tensor in load_file(base / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if tensor.ndim == 1:
            norm = model.constant("Constant_1", "f32", (tensor + np.float32(added))[None, None])
            model.layer("Multiply", f"__module.{module}/aten::mul/Multiply_1", [norm, activations])
            continue
        lowest, highest = (0, 16) if kind == "u4" else (-8, 8)
        is_turned = transposed and tensor.shape[0] % GROUP == 0
        shape = tensor.shape[::-1] if is_turned else tensor.shape
        levels = draw.integers(lowest, highest, shape).reshape(shape[0], -1, GROUP)
        zeros = draw.integers(0, 16, (*levels.shape[:2], 1)) if kind == "u4" else None
        scales = draw.normal(size=(*levels.shape[:2], 1)).astype(np.float16)
        weight = model.matrix(name, kind, levels, zeros, scales)
        reading = {"transpose_b": "false" if is_turned else "true"}
        model.layer("MatMul", f"__module.{module}/aten::linear/MatMul", [activations, weight], **reading)
        wide = ((levels - (0 if zeros is None else zeros)) * scales.astype(np.float64)).reshape(shape[0], -1)
        expected[name] = wide.T if is_turned else wide
    return model.save(folder), expected


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_wide(tmp_path_factory.mktemp("base") / "base")


@pytest.mark.parametrize("options", [{}, {"kind": "i4"}, {"transposed": True}, {"added": 1.0}])
def test_a_model_has_the_numbers_of_its_graph(options: dict[str, Any], base: Path, tmp_path: Path) -> None:
    path, expected = write(base, tmp_path / "openvino", **options)
    for where in (path, path.parent):
        found = {name: each.numpy() for name, each in parameters(where, base).items()}
        for name, wide in expected.items():
            assert np.abs(found[name] - wide).max() <= 2**-23 * np.abs(wide).max(), name
        norm = load_file(base / "model.safetensors")[f"{NORM}.weight"]
        assert np.abs(found[f"{NORM}.weight"] - norm).max() <= 2**-22
    with open_served_weights(path) as weights:
        assert (weights.format, weights.number_format) == ("OpenVINO int4", "int4")
        assert weights.file.paths == [path, path.with_suffix(".bin")]


def edited(change: Callable[[str], str]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.write_text(change(path.read_text()))

    return make


def cut_off(path: Path) -> None:
    numbers = path.with_suffix(".bin")
    numbers.write_bytes(numbers.read_bytes()[:-40])


def in_a_circle(path: Path) -> None:
    root = ElementTree.fromstring(path.read_text())
    edges, layers = root.find("edges"), root.find("layers")
    assert edges is not None
    assert layers is not None
    for layer in layers:
        if layer.get("type") == "Reshape":
            ends = {"from-layer": layer.attrib["id"], "from-port": "0", "to-layer": layer.attrib["id"], "to-port": "2"}
            ElementTree.SubElement(edges, "edge", ends)
    path.write_bytes(ElementTree.tostring(root))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.with_suffix(".bin").unlink(), "its numbers are not in openvino_model.bin beside it"),
        (cut_off, "ends at byte .* of openvino_model.bin, which has"),
        (edited(lambda text: text[:-40]), "cannot be read as a model of OpenVINO"),
        (edited(lambda text: "<!DOCTYPE a [<!ENTITY b 'c'>]>" + text), "declares a document type"),
        (edited(lambda text: "<net/>"), "has no layers and edges"),
        (edited(lambda text: text.replace('"u4"', '"nf4"')), "of the type 'nf4', which are not read"),
        (edited(lambda text: text.replace(f"self.{MATRIX}", "self.other.weight")), "holds no tensor for"),
        (
            edited(lambda text: text.replace(f"__module.{NORM}/", "__module.other_norm/")),
            "other_norm.weight belongs to no",
        ),
        (edited(lambda text: text.replace('shape="128, 4, 16"', 'shape="64, 8, 16"')), "do not fit together"),
        (edited(lambda text: text.replace('shape="128, 4, 16"', 'shape="a"')), "do not fit together"),
        (edited(lambda text: text.replace('size="', 'size="1')), "bytes, expected"),
        (edited(lambda text: text.replace('offset="', 'offset="-9')), "bytes, expected"),
        (edited(lambda text: text.replace('from-layer="', 'from-layer="9999')), "do not fit together"),
        (in_a_circle, "holds no tensor for"),
    ],
)
def test_broken_models_are_refused(damage: Callable[[Path], None], words: str, base: Path, tmp_path: Path) -> None:
    path, _ = write(base, tmp_path / "openvino")
    damage(path)
    with pytest.raises(ConfigError, match=words):
        parameters(path, base)


def test_a_weight_that_the_base_model_lacks_is_refused(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, other := tmp_path / "other")
    AutoModelForCausalLM.from_pretrained(base, num_hidden_layers=1).save_pretrained(other)
    path, _ = write(base, tmp_path / "openvino")
    with pytest.raises(ConfigError, match="belongs to no parameter of the base model"):
        parameters(path, other)


READ = """
import sys, numpy as np, openvino as ov
core = ov.Core(); model = core.read_model(sys.argv[1]); found = {}
for node in model.get_ops():
    module, _, operation = node.get_friendly_name().removeprefix("__module.").partition("/")
    if operation == "aten::linear/MatMul":
        found[module] = node.input_value(1)
whole = ov.Model([*found.values()], [])
given = core.compile_model(whole, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([])
np.savez(sys.argv[2], **{name: given[place] for place, name in enumerate(found)})
"""


@pytest.mark.parametrize(
    ("family", "form"),
    [("Llama", "int4 --group-size 32"), ("Phi3", "int4 --sym --group-size 32"), ("Qwen2", "int8"), ("Qwen3", "fp16")],
)
def test_openvino_dequantises_alike(family: str, form: str, tmp_path: Path) -> None:
    python = os.environ.get("LORAOVER_OPENVINO")
    if not python or not Path(python).exists():
        pytest.skip("no environment with openvino")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = tiny_decoder(family, **sizes)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms and biases, which are left out where they change nothing
            parameter.data.uniform_(0.5, 1.5)
    model.save_pretrained(tmp_path / "base")
    options = ["--task", "text-generation-with-past", "--disable-convert-tokenizer", "--weight-format", *form.split()]
    words = [python, "-I", "-c", CONVERT, "export", "openvino", *options, "--model", str(tmp_path / "base")]
    subprocess.run([*words, str(tmp_path / "openvino")], check=True, capture_output=True)
    graph = tmp_path / "openvino" / "openvino_model.xml"
    subprocess.run([python, "-c", READ, str(graph), str(tmp_path / "theirs.npz")], check=True, capture_output=True)
    found = {name: each.numpy() for name, each in parameters(graph, tmp_path / "base").items()}
    theirs = np.load(tmp_path / "theirs.npz")
    assert len(theirs.files) > 8
    for module in theirs.files:
        if f"{module}.weight" in found:
            mine = found[f"{module}.weight"]
            assert np.abs(mine - theirs[module]).max() <= 2**-10 * np.abs(mine).max(), module  # products of 16 bits
