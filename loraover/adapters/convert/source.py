"""An adapter of any kind that PEFT saves: its folder, read and checked without PEFT, and each adapted module."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from pydantic import BaseModel, ConfigDict

from loraover.adapters.base_weights import BaseWeights, is_conv1d, is_embedding
from loraover.adapters.convert.request import ConvertRequest
from loraover.checkpoint.adapter_config import Task
from loraover.checkpoint.files import CONFIG_FILE, TENSORS_FILE
from loraover.checkpoint.peft_adapter import KEY_PREFIX
from loraover.checkpoint.target_modules import if_missing
from loraover.checkpoint.tensor_file import FLOATS, TensorFile, open_tensors
from loraover.common.errors import CheckpointError, ExportError
from loraover.common.paths import kind_of
from loraover.common.strict_json import read_json

if TYPE_CHECKING:
    from torch import Tensor


class MethodConfig(BaseModel):
    """Fields that every PEFT configuration has; those of a method that change its delta are in its own class."""

    model_config = ConfigDict(extra="allow", frozen=True)

    peft_type: str
    task_type: Task | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"


Config = TypeVar("Config", bound=MethodConfig)


@dataclass(frozen=True)
class AdapterLayout(Generic[Config]):
    """Contents of an adapter's files, before any tensor is read.

    Args:
        path: Folder of the adapter.
        config: Contents of `adapter_config.json`.
        modules: Names of the tensors of each adapted module, such as hada_w1_a, by the module's path.
        shared: Names of tensors that belong to all modules, such as vera_A.
        others: Keys of all other tensors.
        keys: Keys under which tensors are read, by their keys in the file, where these are others.
        stored: Paths of modules in the file, by their paths in the base model, where these are others.
        below: Prefix of the part of the base model that the adapter was trained as; "" stands for all of it.
    """

    path: Path
    config: Config
    modules: Mapping[str, frozenset[str]]
    shared: frozenset[str]
    others: tuple[str, ...]
    keys: Mapping[str, str] = field(default_factory=dict)
    stored: Mapping[str, str] = field(default_factory=dict)
    below: str = ""

    @property
    def tensors_path(self) -> Path:
        """File that holds the tensors."""
        return self.path / TENSORS_FILE


def read_peft_type(path: Path) -> str:
    """Return the kind of an adapter, as `adapter_config.json` names it."""
    if kind_of(path) != "folder":
        raise CheckpointError(f"{path}: no such folder; expected a PEFT adapter directory.")
    return read_json(path / CONFIG_FILE, MethodConfig).peft_type


def read_layout(
    path: Path, config: type[Config], names: tuple[str, ...], shared: tuple[str, ...]
) -> AdapterLayout[Config]:
    """Read the configuration and the keys of an adapter."""
    read = read_json(path / CONFIG_FILE, config)
    wanted = re.compile(rf"{re.escape(KEY_PREFIX)}(?P<module>.+)\.(?P<name>{'|'.join(map(re.escape, names))})")
    modules: dict[str, set[str]] = {}
    others, common = [], set()
    with open_tensors(path / TENSORS_FILE) as file:
        keys = {}
        if not file.keys_below(KEY_PREFIX):  # some tools leave PEFT's prefix out
            keys = {key: KEY_PREFIX + key for key in file.keys if not key.startswith("base_model.")}
        for key in file.renamed(keys).keys:
            match = wanted.fullmatch(key)
            name = key.removeprefix("base_model.")
            if match is not None:
                modules.setdefault(match["module"], set()).add(match["name"])
            elif name in shared:
                common.add(name)
            else:
                others.append(key)
    found = {module: frozenset(tensors) for module, tensors in modules.items()}
    return AdapterLayout(path, read, found, frozenset(common), tuple(others), keys)


@dataclass(frozen=True)
class Adapter(Generic[Config]):
    """An adapter whose tensors can be read, on the base model that it belongs to."""

    layout: AdapterLayout[Config]
    file: TensorFile
    base: BaseWeights

    @property
    def config(self) -> Config:
        """Contents of `adapter_config.json`."""
        return self.layout.config

    def module(self, path: str) -> Module[Config]:
        """Return an adapted module."""
        if path not in self.base.shapes:
            there = self.base.modules.get(path)
            found = (
                f"{self.base.source.origin} has no such module; {if_missing(path, self.base.modules)}"
                if there is None
                else f"it is a {type(there).__name__} there; name the model that the adapter was trained on with "
                f"{ConvertRequest.named('model')}, or merge the adapter into it with PEFT"
            )
            raise ExportError(
                f"{self.layout.tensors_path}: {path} must be a linear layer or an embedding of the base model, but "
                f"{found}."
            )
        return Module(self, path)

    def shared(self, name: str) -> Tensor | None:
        """Return a tensor that belongs to all modules, in float64; None if the file does not hold it."""
        return _wide(self.file, f"base_model.{name}") if name in self.layout.shared else None

    @cached_property
    def largest(self) -> tuple[int, int]:
        """Largest number of output features, and of input features, of any adapted module."""
        shapes = [self.base.shapes[path] for path in self.layout.modules]
        return max(m for m, _ in shapes), max(n for _, n in shapes)


@dataclass(frozen=True)
class Module(Generic[Config]):
    """Adapted module of an adapter."""

    adapter: Adapter[Config]
    path: str

    @property
    def config(self) -> Config:
        """Contents of `adapter_config.json`."""
        return self.adapter.config

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (out_features, in_features) of its weight, or (tokens, dimension) of an embedding's."""
        return self.adapter.base.shapes[self.path]

    @property
    def is_embedding(self) -> bool:
        """Whether it is an embedding."""
        return is_embedding(self.adapter.base.modules[self.path])

    @property
    def is_conv1d(self) -> bool:
        """Whether it is a Conv1D, whose weight is stored transposed."""
        return is_conv1d(self.adapter.base.modules[self.path])

    @property
    def has_bias(self) -> bool:
        """Whether the base model's layer has a bias."""
        return getattr(self.adapter.base.modules[self.path], "bias", None) is not None

    def has(self, name: str) -> bool:
        """Whether the file holds a tensor of this module."""
        return name in self.adapter.layout.modules[self.path]

    def tensor(self, name: str, *shape: int | None) -> Tensor:
        """Return a tensor of this module, in float64; a tensor of indices keeps its type."""
        where = f"{self.adapter.layout.tensors_path}: {self.path}.{name}"
        if not self.has(name):
            raise CheckpointError(f"{where} is missing; the file is incomplete, or of another kind of adapter.")
        found = _wide(self.adapter.file, f"{KEY_PREFIX}{self.path}.{name}")
        if 0 in found.shape and 0 not in shape and not name.startswith("lora_"):  # AdaLoRA may have pruned all ranks
            raise CheckpointError(f"{where} has shape {tuple(found.shape)}; the file is incomplete.")
        if shape and (
            len(shape) != found.ndim or any(e not in (None, n) for e, n in zip(shape, found.shape, strict=True))
        ):
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise CheckpointError(
                f"{where} has shape {tuple(found.shape)}, expected ({wanted}) for the base model and the rank "
                f"in {CONFIG_FILE}; name the model that the adapter was trained on with "
                f"{ConvertRequest.named('model')}. Convolutions are not converted."
            )
        return found

    def stored_weight(self) -> Tensor:
        """Return the base model's weight of this module, (out_features, in_features), as it is stored."""
        return self.adapter.base.weight(self.path)

    def weight(self) -> Tensor:
        """Return the base model's weight of this module, (out_features, in_features), in float64."""
        return self.stored_weight().double()

    def refuse(self, reason: str) -> ExportError:
        """Return the error that refuses this module."""
        return ExportError(f"{self.adapter.layout.tensors_path}: {self.path}: {reason}")


@contextmanager
def open_adapter(layout: AdapterLayout[Config], base: BaseWeights) -> Iterator[Adapter[Config]]:
    """Open the tensors of an adapter."""
    with open_tensors(layout.tensors_path) as file:
        yield Adapter(layout, file.renamed(layout.keys), base)


def _wide(file: TensorFile, key: str) -> Tensor:
    dtype = file.dtype(key)
    if dtype in FLOATS:
        return file.read(key).double()
    if "indices" not in key.rpartition(".")[2]:
        raise CheckpointError(f"{file.path}: {key} is {dtype}, expected one of {', '.join(FLOATS)}; save it again.")
    return file.read(key)
