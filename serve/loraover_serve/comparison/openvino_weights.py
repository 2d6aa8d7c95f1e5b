"""Weights in a model of OpenVINO, whose graph says how each is computed from the numbers that its file holds."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NoReturn
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import torch
from torch import Tensor

from loraover.common.errors import ConfigError

MODEL = "openvino_model.xml"

_STORED = {
    "u4": (torch.uint8, "int4"),
    "i4": (torch.uint8, "int4"),
    "u8": (torch.uint8, "int8"),
    "i8": (torch.int8, "int8"),
    "i32": (torch.int32, "int32"),
    "i64": (torch.int64, "int64"),
    "f8e4m3": (torch.float8_e4m3fn, "F8_E4M3"),
    "bf16": (torch.bfloat16, "bfloat16"),
    "f16": (torch.float16, "float16"),
    "f32": (torch.float32, "float"),
    "f64": (torch.float64, "double"),
}
"""PyTorch's data types of stored numbers, and their names in `format`, by OpenVINO's names."""

_OF_NUMBERS = {"Convert", "Subtract", "Multiply", "Reshape", "Transpose"}
"""Operations that make a weight of stored numbers."""

_USER = re.compile(r"__module\.(?P<module>[^/]+)/aten::(?P<kind>linear|addmm|embedding|layer_norm|mul|add)/\w+")
"""Names of the operations that read a parameter: its module, and PyTorch's operation."""

_OWN = re.compile(r"self\.(.+?)(?:_compressed)?")
"""Names of stored numbers that keep the name of their parameter."""
_LAST = {"MatMul": "weight", "Gather": "weight", "Multiply": "weight", "Add": "bias"}
"""Last part of a parameter's name, by the operation that reads it."""

_DEEPEST = 12


@dataclass(frozen=True)
class _Held:
    """A parameter: the operation's name, its constant, and whether the operation reads its columns as rows."""

    constant: str
    is_transposed: bool


class OpenVinoModel:
    """A model of OpenVINO whose tensors are read one at a time.

    Source: OpenVINO IR, version 11: `data` of a `Const` gives type, shape, and place in the file of numbers, of which
    the first of two in a byte is in its lower half.

    Args:
        path: The graph, an XML file; the numbers lie in the file beside it that ends in `.bin`.

    Attributes:
        files: The graph and the file of numbers.
        format: Format of most of its numbers.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._numbers = path, path.with_suffix(".bin")
        self.files = [path, self._numbers]
        if not self._numbers.is_file():
            raise ConfigError(f"{path}: its numbers are not in {self._numbers.name} beside it; export the model again.")
        root = self._parsed()
        layers, edges = root.find("layers"), root.find("edges")
        if layers is None or edges is None:
            raise ConfigError(f"{path}: has no layers and edges; expected a model of OpenVINO.")
        self._layers = {each.attrib["id"]: each for each in layers}
        self._inputs: dict[str, dict[int, str]] = {}
        for edge in edges:
            into = self._inputs.setdefault(edge.attrib["to-layer"], {})
            into[int(edge.attrib["to-port"])] = edge.attrib["from-layer"]
        self._constants: dict[str, bool] = {}
        self._held = self._find()
        self.format = f"OpenVINO {self._most_common()}"

    def _parsed(self) -> Element:
        try:
            content = self.path.read_bytes()
            if b"<!DOCTYPE" in content:
                raise ConfigError(f"{self.path}: declares a document type, as no model of OpenVINO does.")
            return ElementTree.fromstring(content)
        except ElementTree.ParseError as error:
            raise ConfigError(f"{self.path}: cannot be read as a model of OpenVINO: {error}") from error

    def names(self) -> set[str]:
        """Names of the parameters that are held, as transformers has them."""
        return {*self._held}

    def read(self, name: str) -> Tensor | None:
        """Return a parameter by transformers' name, in float32; None if the model holds none."""
        held = self._held.get(name)
        if held is None:
            return None
        found = self._evaluated(held.constant).float()
        if name.endswith(("norm.weight", ".bias")) or found.dim() > 2:
            found = found.reshape([size for size in found.shape if size != 1] or [1])
        return found.T.contiguous() if held.is_transposed else found

    def _find(self) -> dict[str, _Held]:
        """Parameters by the names of the operations that read them, or, where these are kept, by their own."""
        found: dict[str, _Held] = {}
        for layer, places in self._inputs.items():
            user, operation = _USER.fullmatch(self._name(layer)), self._type(layer)
            if user is None or operation not in _LAST:
                continue
            for place in (place for place in places.values() if self._is_constant(place)):
                largest = self._largest(place)
                if prod(self._shape(largest)) > 1:
                    own = _OWN.fullmatch(self._name(largest))
                    name = own[1] if own else f"{user['module']}.{_LAST[operation]}"
                    turned = operation == "MatMul" and (user["kind"] == "linear") != self._reads_rows(layer)
                    found.setdefault(name, _Held(place, turned))
        return found

    def _reads_rows(self, layer: str) -> bool:
        return self._data(layer).get("transpose_b", "false") == "true"

    def _is_constant(self, layer: str, depth: int = 0) -> bool:
        if layer not in self._constants:
            kind, inputs = self._type(layer), self._inputs.get(layer, {})
            if depth > _DEEPEST:
                return False
            self._constants[layer] = kind == "Const" or (
                kind in _OF_NUMBERS
                and 0 < len(inputs) <= 2
                and all(self._is_constant(i, depth + 1) for i in inputs.values())
            )
        return self._constants[layer]

    def _largest(self, layer: str) -> str:
        """The stored numbers of a weight that are most."""
        if self._type(layer) == "Const":
            return layer
        return max(map(self._largest, self._inputs[layer].values()), key=lambda each: prod(self._shape(each)))

    def _evaluated(self, layer: str) -> Tensor:
        """Numbers of a constant; products are not rounded to the 16 bits in which a graph may write them."""
        kind, inputs = self._type(layer), [place for _, place in sorted(self._inputs.get(layer, {}).items())]
        if kind == "Const":
            return self._stored(layer)
        first, *others = [self._evaluated(place) for place in inputs]
        match kind, others:
            case "Convert", []:
                return first if first.dtype == torch.float64 else first.float()
            case "Subtract", [second]:
                return first - second
            case "Multiply", [second]:
                return first * second
            case "Reshape", [second]:
                return first.reshape(self._target(layer, first, second.tolist()))
            case "Transpose", [second]:
                return first.permute(second.tolist())
        self._refuse(layer, f"has {len(inputs)} inputs")

    def _target(self, layer: str, numbers: Tensor, sizes: list[int]) -> list[int]:
        if self._data(layer).get("special_zero") == "true":
            return [numbers.shape[place] if size == 0 else size for place, size in enumerate(sizes)]
        return sizes

    def _stored(self, layer: str) -> Tensor:
        data, shape = self._data(layer), self._shape(layer)
        kind, number = data.get("element_type", ""), prod(shape)
        if kind not in _STORED:
            self._refuse(layer, f"holds numbers of the type {kind!r:.40}, which are not read")
        dtype, is_half = _STORED[kind][0], kind in ("u4", "i4")
        size, start = (number + 1) // 2 if is_half else number * dtype.itemsize, int(data["offset"])
        if int(data["size"]) != size or start < 0:
            self._refuse(layer, f"holds {data['size']} bytes, expected {size}")
        if start + size > (held := self._numbers.stat().st_size):
            self._refuse(layer, f"ends at byte {start + size} of {self._numbers.name}, which has {held}")
        with self._numbers.open("rb") as file:
            file.seek(start)
            content = bytearray(file.read(size))
        found = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        return (_halves(found, kind)[:number] if is_half else found).reshape(shape)

    def _most_common(self) -> str:
        sizes: Counter[str] = Counter()
        for held in self._held.values():
            largest = self._largest(held.constant)
            kind = self._data(largest).get("element_type", "")
            sizes[_STORED[kind][1] if kind in _STORED else kind] += prod(self._shape(largest))
        return sizes.most_common(1)[0][0] if sizes else "without weights"

    def _name(self, layer: str) -> str:
        return self._layers[layer].attrib["name"]

    def _type(self, layer: str) -> str:
        return self._layers[layer].attrib["type"]

    def _data(self, layer: str) -> Mapping[str, str]:
        found = self._layers[layer].find("data")
        return {} if found is None else found.attrib

    def _shape(self, layer: str) -> list[int]:
        return [int(size) for size in self._data(layer)["shape"].split(",") if size.strip()]

    def _refuse(self, layer: str, fault: str) -> NoReturn:
        raise ConfigError(f"{self.path}: {self._name(layer):.80} {fault}; export the model again.")


def _halves(content: Tensor, kind: str) -> Tensor:
    """Return the numbers of 4 bits of bytes."""
    found = torch.stack([content & 15, content >> 4], dim=-1).flatten().to(torch.int8)
    return torch.where(found > 7, found - 16, found) if kind == "i4" else found
