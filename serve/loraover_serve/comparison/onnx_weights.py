"""Weights in an ONNX graph of a decoder, of which the operator MatMulNBits holds the quantised ones."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraover.common.errors import ConfigError
from loraover.common.extras import install

GRAPH = "model.onnx"

_NORMS = (
    (re.compile(r"model\.layers\.\d+\.final_norm_layernorm\.(weight|bias)"), r"model.norm.\1"),
    (re.compile(r"(.+\.self_attn\.[qk]_norm)\.layernorm\.(weight|bias)"), r"\1.\2"),
    (re.compile(r"(.+)\.(?:MatMul|Add)\.(weight|bias)"), r"\1.\2"),
)
"""Names of onnxruntime-genai's builder, and the parts of transformers' names."""

_PACKED = re.compile(r"(?P<owner>.+\.self_attn)\.(?P<part>[qkv])_proj\.(?P<last>weight|bias)")

Floats = NDArray[np.float32]


class OnnxGraph:
    """A graph whose tensors are read one at a time.

    Args:
        path: The graph.

    Attributes:
        files: The graph, and the files of its tensors.
        format: Format of its matrices.
    """

    def __init__(self, path: Path) -> None:
        try:
            import onnx
        except ImportError as error:
            raise ConfigError(f"{path} needs the package onnx: {install('export')}") from error
        try:
            graph = onnx.load(str(path), load_external_data=False).graph
        except Exception as error:  # protobuf's errors have no common class of their own
            raise ConfigError(f"{path}: cannot be read as an ONNX graph: {error!s:.200}") from error
        self.path, self._tensors = path, {tensor.name: tensor for tensor in graph.initializer}
        self._floats = {_named(name): name for name in self._tensors}
        self._quantised: dict[str, Any] = {}
        for node in graph.node:
            if node.op_type == "MatMulNBits":
                module = node.name.strip("/").rpartition("/MatMul")[0]  # "model/layers.0/mlp/up_proj/MatMul_Q4"
                self._quantised[module.replace("/", ".").replace(".attn.", ".self_attn.")] = node
        self._gathered = any(node.op_type == "GatherBlockQuantized" for node in graph.node)
        places = {each.value for t in graph.initializer for each in t.external_data if each.key == "location"}
        self.files = [path, *(self._beside(name) for name in sorted(places))]
        self.format = f"ONNX {self._most_common()}"

    def _beside(self, location: str) -> Path:
        """File of tensors in the graph's folder."""
        place = PurePosixPath(location)
        if place.is_absolute() or ".." in place.parts or not (found := self.path.parent / location).is_file():
            raise ConfigError(
                f"{self.path}: names {location!r:.80} as a file of its tensors, expected a file in its own folder; "
                "export the model again."
            )
        return found

    def _most_common(self) -> str:
        import onnx

        kinds = Counter(f"int{_settings(node)['bits']}" for node in self._quantised.values())
        if not kinds:
            kinds = Counter(onnx.TensorProto.DataType.Name(t.data_type).lower() for t in self._tensors.values())
        return kinds.most_common(1)[0][0] if kinds else "without tensors"

    def read(self, name: str, rows: dict[str, int]) -> Floats | None:
        """Return a parameter by transformers' name, in float32; None if the graph holds none.

        Args:
            rows: Number of rows of each parameter of the model, by which a matrix of several projections is divided.
        """
        found = self._own(name)
        if found is None and name == "model.embed_tokens.weight" and (self._gathered or name not in self._floats):
            return self._own("lm_head.weight")  # whose rows the embedding looks up
        packed = _PACKED.fullmatch(name)
        if found is not None or packed is None:
            return found
        every = self._own(f"{packed['owner']}.qkv_proj.{packed['last']}")
        if every is None:
            return None
        sizes = [rows[f"{packed['owner']}.{part}_proj.{packed['last']}"] for part in "qkv"]
        if sum(sizes) != len(every):
            raise ConfigError(f"{self.path}: {packed['owner']}.qkv_proj has {len(every)} rows, expected {sum(sizes)}.")
        at = "qkv".index(packed["part"])
        return every[sum(sizes[:at]) : sum(sizes[: at + 1])]

    def _own(self, name: str) -> Floats | None:
        module = name.removesuffix(".weight")
        if module in self._quantised and name.endswith(".weight"):
            return self._dequantised(module, self._quantised[module])
        key = self._floats.get(name)
        if key is None:
            return None
        found = self._array(key).astype(np.float32)
        return np.ascontiguousarray(found.T) if key.endswith(".MatMul.weight") else found

    def _dequantised(self, module: str, node: Any) -> Floats:
        """Matrix (out_features, in_features) of a node.

        Source: ONNX Runtime, contrib operator MatMulNBits: (whole number - zero point) times a scale, for blocks of a
        row; the lower bits come first, and a missing zero point is the middle.
        """
        settings, inputs = _settings(node), [*node.input, "", "", "", ""]
        bits, block, rows, columns = (settings[key] for key in ("bits", "block_size", "N", "K"))
        if bits not in (2, 4, 8) or inputs[4] or settings.get("weight_prepacked", 0):
            raise ConfigError(
                f"{self.path}: {node.name} has {bits} bits, indices of groups or a layout of a GPU; only blocks of 2, "
                "4 or 8 bits are read."
            )
        blocks = -(-columns // block)
        numbers = _unpacked(self._array(inputs[1]).reshape(rows, blocks, -1), bits)[..., :block].astype(np.float32)
        scales = self._array(inputs[2]).astype(np.float32).reshape(rows, blocks, 1)
        zeros: Any = np.float32(2 ** (bits - 1))
        if inputs[3]:
            given = self._array(inputs[3])
            if given.dtype == np.uint8:
                given = _unpacked(given.reshape(rows, -1), bits)[:, :blocks]
            zeros = given.astype(np.float32).reshape(rows, blocks, 1)
        if numbers.shape[-1] != block:
            raise ConfigError(f"{self.path}: {module} has blocks of {numbers.shape[-1]} numbers, expected {block}.")
        found: Floats = ((numbers - zeros) * scales).reshape(rows, -1)[:, :columns]
        return np.ascontiguousarray(found)

    def _array(self, name: str) -> NDArray[Any]:
        from onnx import numpy_helper

        if name not in self._tensors:
            raise ConfigError(f"{self.path}: {name!r:.80} is not stored in the graph, but computed.")
        try:
            return np.asarray(numpy_helper.to_array(self._tensors[name], str(self.path.parent)))
        except Exception as error:  # of its files, its names and its sizes
            raise ConfigError(f"{self.path}: {name:.80} cannot be read: {error!s:.200}") from error


def _settings(node: Any) -> dict[str, int]:
    return {"bits": 4, "block_size": 32} | {each.name: each.i for each in node.attribute}


def _unpacked(packed: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Return the numbers of a row of bytes, the lowest bits first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    found: NDArray[np.uint8] = (packed.astype(np.uint8)[..., None] >> shifts) & (2**bits - 1)
    return found.reshape(*packed.shape[:-1], -1)


def _named(initializer: str) -> str:
    """Name by transformers of a tensor of the graph."""
    name = initializer.replace(".attn.", ".self_attn.")
    for pattern, new in _NORMS:
        name = pattern.sub(new, name) if pattern.fullmatch(name) else name
    return name
