"""Files of served weights: GGUF files, folders of safetensors files, ONNX graphs, and models of OpenVINO."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from loraover.adapters.base_weights import is_conv1d, open_files, stored_keys
from loraover.checkpoint.tensor_file import FLOATS, INTEGERS, TensorFile
from loraover.common.errors import ConfigError, LoraOverError
from loraover.common.extras import install
from loraover.models.load import resolve_model
from loraover_export.merged.gguf import GgufRows, GgufWeights, is_gguf
from loraover_export.merged.matrices import StoredMatrix
from loraover_export.merged.weights import BUFFERS, EXPERT_PARTS, HEAD, STACK
from loraover_serve.comparison.onnx_weights import GRAPH, OnnxGraph
from loraover_serve.comparison.openvino_weights import MODEL as OPENVINO
from loraover_serve.comparison.openvino_weights import OpenVinoModel
from loraover_serve.comparison.quantisers import QUANTISERS, Quantiser


class WeightFile(ABC):
    """Weights in a file or a folder.

    Attributes:
        format: Format of most of their matrices, such as "GGUF Q4_1".
        paths: Files that hold them.
    """

    format: str
    paths: Sequence[Path]

    def prepare(self, model: nn.Module) -> None:
        """Find out by which names the file has the parameters of a model."""
        return

    @abstractmethod
    def read(self, name: str) -> Tensor | None:
        """Return a parameter by transformers' name, in float32 or wider; None if the file holds none of this name."""

    def unused(self, names: Collection[str]) -> list[str]:
        """Return the names of weights that are none of these parameters."""
        return []


class GgufFile(WeightFile):
    """A GGUF file of a family whose order of rows is known."""

    def __init__(self, path: Path, files: ExitStack) -> None:
        try:
            self._weights = GgufWeights(path, files)
        except ImportError as error:
            raise ConfigError(f"{path} needs the package gguf: {install('llamacpp')}") from error
        counts: Counter[str] = Counter()
        for tensor in self._weights.header.tensors.values():
            if len(tensor.shape) > 1:
                counts[tensor.type_name] += prod(tensor.shape)
        self.paths, self.format = [path], f"GGUF {max(counts, key=lambda name: counts[name])}" if counts else "GGUF"

    def read(self, name: str) -> Tensor | None:
        if STACK.fullmatch(name) is not None:
            return self._experts(name)
        found = self._weights.find(name)
        if found is None:
            return None
        assert isinstance(found, GgufRows)
        return _dequantised(found).reshape(found.stored.shape)

    def _experts(self, name: str) -> Tensor | None:
        number, (owner, _, parameter) = self._weights.stacks().get(name), name.rpartition(".")
        if number is None:
            return None
        each = (self._weights.module(f"{owner}.{index}.{parameter}", (0, 0)) for index in range(number))
        return torch.stack([torch.cat([_dequantised(piece.matrix) for piece in pieces]) for pieces in each])

    def unused(self, names: Collection[str]) -> list[str]:
        held = {*self._weights.names(), *self._weights.stacks()} - {*names}
        return sorted(name for name in held if not name.endswith(BUFFERS))


def _dequantised(matrix: StoredMatrix) -> Tensor:
    """Return a matrix of a GGUF file as gguf-py dequantises it."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    if matrix.unreadable is not None:
        raise ConfigError(f"{matrix.name}: {matrix.unreadable}, which the package gguf cannot dequantise.")
    numbers = np.empty(matrix.shape, np.float32)
    rows = max(1, READ_AT_ONCE_BYTES // (matrix.row_bytes * matrix.step)) * matrix.step
    for start in range(0, matrix.shape[0], rows):
        raw, part = matrix.raw(start, min(start + rows, matrix.shape[0])), numbers[start : start + rows]
        if matrix.is_quantised:
            part[...] = dequantize(raw, GGMLQuantizationType[matrix.type_name]).reshape(part.shape)
        else:
            matrix.decode(raw, part)
    return torch.from_numpy(numbers)


READ_AT_ONCE_BYTES = 1 << 26
"""Bytes of a tensor that are read at once; one call of Linux reads less than 2 GiB."""


STORED = FLOATS | INTEGERS | {"U32": "uint32", "F8_E4M3": "float8_e4m3fn"}
"""PyTorch's names of data types that folders hold, by those of safetensors."""


TIED = "tie_word_embeddings"
OF_MEANING = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    TIED,
)
"""Fields of config.json that decide what tensors mean: other heads, for example, may have the same shapes."""


def meaning_of(config: Any) -> dict[str, Any]:
    """Fields of a model's configuration by OF_MEANING; heads that it leaves out have the values that models use."""
    found = {name: getattr(config, name, None) for name in OF_MEANING}
    heads, size = found["num_attention_heads"], found["hidden_size"]
    if isinstance(heads, int) and isinstance(size, int):
        found["num_key_value_heads"] = found["num_key_value_heads"] or heads
        found["head_dim"] = found["head_dim"] or size // heads
    return found


class Folder(WeightFile):
    """A folder of safetensors files, plain or quantised.

    Args:
        path: The folder.
        files: Stack that closes the files.
    """

    def __init__(self, path: Path, files: ExitStack) -> None:
        opened = open_files(resolve_model(str(path)), files, may_be_quantised=True)
        self._where, self.paths = path, [path / name for name in opened.shards]
        self._files = {key: file for file in opened.shards.values() for key in file.keys}
        self._config, self._quantiser = opened.config, self._find_quantiser(opened.config)
        self._quantised = {} if self._quantiser is None else self._quantiser.modules(self._files)
        self.format = self._format() if self._quantiser is None else self._quantiser.format
        self._keys: dict[str, str] = {}

    def _find_quantiser(self, config: Mapping[str, Any]) -> Quantiser | None:
        settings = config.get("quantization_config") or config.get("quantization")
        if not isinstance(settings, dict):
            return None
        method = settings.get("quant_method", "mlx" if "group_size" in settings else "an unnamed method")
        if not isinstance(method, str) or method not in QUANTISERS:
            known = ", ".join(sorted(QUANTISERS))
            raise ConfigError(
                f"{self._where}: quantised by {method!r:.80}, which is not read here; known are {known}, and GGUF and "
                "ONNX files."
            )
        return QUANTISERS[method](self._where, settings)

    def _format(self) -> str:
        sizes: Counter[str] = Counter()
        for key, file in self._files.items():
            sizes[file.dtype(key)] += file.size(key)
        return f"safetensors {max(sizes, key=lambda name: sizes[name])}" if sizes else "safetensors"

    def _names(self) -> set[str]:
        """Names of the tensors, each of which may be stored in several parts."""
        inner = {key for keys in self._quantised.values() for key in keys}
        return ({*self._files} - inner) | {f"{path}.weight" for path in self._quantised}

    def prepare(self, model: nn.Module) -> None:
        self._keys = stored_keys(model, self._names())
        self._check_config(model)
        if self._quantised and any(is_conv1d(module) for module in model.modules()):
            raise ConfigError(f"{self._where}: quantised layers of this model keep their weights transposed; not read.")

    def _check_config(self, model: Any) -> None:
        """Refuse a folder whose config.json gives the same shapes another meaning than the base model's."""
        found, expected = self._meaning(model.config), meaning_of(model.config.get_text_config())
        differing = {name: (found[name], expected[name]) for name in OF_MEANING if found[name] != expected[name]}
        if differing.get(TIED) == (False, True) and self._keys.get(HEAD, HEAD) in self._names():
            del differing[TIED]  # some quantisers write the head of a model that ties it
        if differing:
            mine, right = (", ".join(f"{name} {pair[k]}" for name, pair in differing.items()) for k in (0, 1))
            raise ConfigError(
                f"{self._where}: config.json has {mine}, and the adapter's base model has {right}; name weights of "
                "this model."
            )

    def _meaning(self, expected: Any) -> dict[str, Any]:
        """Fields of config.json by OF_MEANING, where the base model's class fills in what the file leaves out."""
        from huggingface_hub.errors import StrictDataclassError

        content, kind = self._config, expected
        if content.get("model_type", kind.model_type) != kind.model_type:  # as of a text model and one of images
            content, kind = content.get("text_config") or content, expected.get_text_config()
        name = content.get("model_type", kind.model_type)
        if name != kind.model_type:
            return dict.fromkeys(OF_MEANING) | {"model_type": name}
        try:
            return meaning_of(type(kind).from_dict(copy.deepcopy(dict(content))).get_text_config())
        except StrictDataclassError as error:
            raise ConfigError(f"{self._where}: config.json cannot be used: {error}") from error

    def read(self, name: str) -> Tensor | None:
        key = self._keys.get(name, name)
        found = self._read(key)
        return self._experts(name) if found is None and STACK.fullmatch(name) is not None else found

    def _read(self, key: str) -> Tensor | None:
        path = key.removesuffix(".weight")
        if path in self._quantised and self._quantiser is not None:
            parts = {part.removeprefix(f"{path}."): self._tensor(part) for part in self._quantised[path]}
            with as_broken(f"{self._where}: {path}"):
                return self._quantiser.dequantise(path, parts).float()
        return None if key not in self._files else self._float(key)

    def _float(self, key: str) -> Tensor:
        found = self._tensor(key)
        if not found.is_floating_point():
            raise ConfigError(
                f"{self._where}: {key} is {self._files[key].dtype(key)}, and config.json names no method by which it "
                "is quantised."
            )
        return found if found.dtype == torch.float64 else found.float()

    def _experts(self, name: str) -> Tensor | None:
        """Return the matrices of all experts, which files keep apart, as one parameter."""
        owner, _, parameter = name.rpartition(".")
        for place in (owner, owner.replace(".mlp.", ".block_sparse_moe.")):
            for parts in EXPERT_PARTS[parameter]:
                experts: list[Tensor] = []
                while (first := self._read(f"{place}.{len(experts)}.{parts[0]}.weight")) is not None:
                    others = (self._read(f"{place}.{len(experts)}.{part}.weight") for part in parts[1:])
                    experts.append(torch.cat([first, *(other for other in others if other is not None)]))
                if experts:
                    return torch.stack(experts)
        return None

    def _tensor(self, key: str) -> Tensor:
        file: TensorFile = self._files[key]
        kind, shape = file.dtype(key), file.shape(key)
        if kind not in STORED:
            raise ConfigError(f"{self._where}: {key} is {kind}, which is not read here.")
        data, dtype = file.bytes(key), getattr(torch, STORED[kind])
        return torch.frombuffer(data, dtype=dtype).reshape(shape) if data else torch.empty(shape, dtype=dtype)

    def unused(self, names: Collection[str]) -> list[str]:
        left = self._names() - {*self._keys.values()} - {HEAD, *names}
        return sorted(key for key in left if not key.endswith(BUFFERS) and ".experts." not in key)


class OnnxFile(WeightFile):
    """An ONNX graph of a decoder, as onnxruntime-genai's builder writes them."""

    def __init__(self, path: Path) -> None:
        self._graph = OnnxGraph(path)
        self.paths, self.format = self._graph.files, self._graph.format
        self._rows: dict[str, int] = {}
        self._parameters: dict[str, nn.Parameter] = {}

    def prepare(self, model: nn.Module) -> None:
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._rows = {name: len(parameter) for name, parameter in self._parameters.items()}

    def read(self, name: str) -> Tensor | None:
        with as_broken(f"{self._graph.path}: {name}"):
            found = self._graph.read(name, self._rows)
        if found is None:
            return None
        tensor = torch.from_numpy(np.array(found))
        return as_in_file(self._graph.path, name, tensor, self._parameters[name])


class OpenVinoFile(WeightFile):
    """A model of OpenVINO, as optimum-intel exports them."""

    def __init__(self, path: Path) -> None:
        with as_broken(str(path)):
            self._model = OpenVinoModel(path)
        self.paths, self.format = self._model.files, self._model.format
        self._parameters: dict[str, nn.Parameter] = {}

    def prepare(self, model: nn.Module) -> None:
        self._parameters = dict(model.named_parameters(remove_duplicate=False))

    def read(self, name: str) -> Tensor | None:
        found, own = self._model.read(name), self._parameters[name]
        if found is None:
            return own.detach().float() if _changes_nothing(name, own) else None
        return as_in_file(self._model.path, name, found, own)

    def unused(self, names: Collection[str]) -> list[str]:
        return sorted(name for name in self._model.names() - {*names} if not name.endswith(BUFFERS))


def _changes_nothing(name: str, parameter: Tensor) -> bool:
    """Whether exporters leave the operation out that reads a parameter: a bias of zeros, or a norm's factors of 1."""
    values = {*parameter.tolist()} if parameter.dim() == 1 else set()
    return values == {0.0} if name.endswith(".bias") else name.endswith("norm.weight") and values in ({0.0}, {1.0})


def as_in_file(path: Path, name: str, stored: Tensor, parameter: Tensor) -> Tensor:
    """Return a tensor of a graph without the 1 that families such as Gemma add to norms, which the base model shows."""
    own = parameter.detach().float().cpu()
    if not name.endswith("norm.weight") or own.shape != stored.shape:
        return stored  # the caller refuses another shape
    found = float((stored - own).median())
    added = next((each for each in (0.0, 1.0) if abs(found - each) < NEAR), None)
    if added is None:
        raise ConfigError(
            f"{path}: {name} differs by {found:.3g} from the base model's, expected 0, or 1 for families that store "
            "norms minus 1; name weights of this model."
        )
    return stored - added


NEAR = 0.25
"""Largest distance of the median of a norm's elements from the base model's, but for an added 1."""


@contextmanager
def as_broken(place: str) -> Iterator[None]:
    """Name what does not fit together, or cannot be read, in the errors of a library.

    Args:
        place: File and tensor, for the message.

    Raises:
        ConfigError: An error of a library.
    """
    try:
        yield
    except LoraOverError:
        raise
    except OSError as error:
        raise ConfigError(f"{place}: cannot be read: {error.strerror or error}.") from error
    except (
        ValueError,
        LookupError,
        RuntimeError,
        TypeError,
        AttributeError,
        AssertionError,
        ArithmeticError,
    ) as error:
        raise ConfigError(f"{place}: its parts do not fit together ({error!s:.200}); quantise it again.") from error


def open_weight_file(where: Path, files: ExitStack) -> WeightFile:
    """Open served weights by what lies at a place, for as long as a stack of contexts lasts."""
    if not where.exists():
        raise ConfigError(f"{where}: no such file or folder of weights.")
    if is_gguf(where.name):
        return GgufFile(where, files)
    graph = where / GRAPH if where.is_dir() else where
    if graph.suffix == ".onnx" and graph.is_file():
        return OnnxFile(graph)
    graph = where / OPENVINO if where.is_dir() else where
    if graph.suffix == ".xml" and graph.is_file():
        return OpenVinoFile(graph)
    if where.is_dir():
        return Folder(where, files)
    raise ConfigError(
        f"{where}: no GGUF file, ONNX graph, model of OpenVINO (.xml) or folder of a model; others are not read."
    )
