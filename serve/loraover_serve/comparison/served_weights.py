"""Weights that a server has, dequantised exactly and put into a float model one parameter at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loraover.checkpoint.tensor_file import is_finite, sha256_of
from loraover.common.errors import ConfigError
from loraover_serve.comparison.weight_files import WeightFile, as_broken, open_weight_file
from loraover_serve.judge.limits import NUMBER_FORMATS

OF_LAST_WORDS = {
    "F64": "fp32",
    "F32": "fp32",
    "float": "fp32",
    "double": "fp32",
    "F16": "fp16",
    "float16": "fp16",
    "BF16": "bf16",
    "bfloat16": "bf16",
    "F8_E4M3": "fp8",
    "float-quantized": "fp8",
    "Q8_0": "int8",
    "int8": "int8",
    "int-quantized": "int8",
}
"""Number formats of weights by the last word of their format; those of all others are at least as coarse as int4."""


@dataclass(frozen=True)
class ServedWeights:
    """Weights that a server has.

    Args:
        where: File or folder that holds them.
        format: Format of most of their matrices, such as "GGUF Q4_1".
        file: The open file or folder.
    """

    where: Path
    format: str
    file: WeightFile

    @property
    def in_words(self) -> str:
        """Format and the beginning of the SHA-256, as reports show them."""
        return f"{self.format} ({self.sha256:.12})"

    @property
    def number_format(self) -> str:
        """The finest of the number formats that are at least as coarse as most matrices."""
        return OF_LAST_WORDS.get(self.format.split()[-1], NUMBER_FORMATS[-1])

    @property
    def facts(self) -> dict[str, str]:
        """The section `weights` of a reference."""
        return {"format": self.format, "number_format": self.number_format, "sha256": self.sha256}

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the file, or of the names and the SHA-256 of a folder's files of weights."""
        with as_broken(str(self.where)):
            if len(self.file.paths) == 1:
                return sha256_of(self.file.paths[0])
            digest = hashlib.sha256()
            for path in sorted(self.file.paths):
                digest.update(f"{path.name} {sha256_of(path)}\n".encode())
            return digest.hexdigest()

    def tensors(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Yield each parameter of a model by its name, with what the server has for it, in float32 or wider.

        Parameters that the model ties are yielded by every name under which the file holds them.

        Raises:
            ConfigError: A parameter that the file lacks, or holds in another shape, or with NaN or infinity; or weights
                that the model lacks.
        """
        with as_broken(str(self.where)):
            self.file.prepare(model)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        names: dict[int, list[str]] = {}
        for name, parameter in parameters.items():
            names.setdefault(id(parameter), []).append(name)
        for alike in names.values():
            is_held = False
            for name in alike:
                with as_broken(f"{self.where}: {name}"):
                    tensor = self.file.read(name)
                if tensor is not None:
                    is_held = True
                    yield name, self._checked(name, tensor, parameters[name])
            if not is_held:
                raise ConfigError(
                    f"{self.where}: holds no tensor for {alike[0]}, which the base model has; name weights of this "
                    "model, in one of the formats that docs/how-to/check-a-server.md lists."
                )
        if unused := self.file.unused(parameters):
            raise ConfigError(
                f"{self.where}: {unused[0]} belongs to no parameter of the base model ({len(unused)} tensors do "
                "not); name weights of this model."
            )

    def put_into(self, model: Any) -> None:
        """Put the weights into a model, in the data type that it has; a head that the server does not tie is untied."""
        tied: dict[int, str] = {}
        with torch.no_grad():
            for name, tensor in self.tensors(model):
                parameter = model.get_parameter(name)
                first = tied.setdefault(id(parameter), name)
                if first == name:
                    parameter.copy_(tensor)
                elif not torch.equal(parameter, tensor.to(parameter)):
                    owner, _, last = name.rpartition(".")
                    setattr(model.get_submodule(owner), last, nn.Parameter(tensor.to(parameter), requires_grad=False))

    def _checked(self, name: str, tensor: Tensor, parameter: Tensor) -> Tensor:
        if tensor.shape != parameter.shape:
            raise ConfigError(
                f"{self.where}: {name} has the shape {tuple(tensor.shape)}, and that of the base model is "
                f"{tuple(parameter.shape)}; name weights of this model."
            )
        if not is_finite(tensor):
            raise ConfigError(f"{self.where}: {name} holds NaN or infinity; quantise or download the model again.")
        return tensor


@contextmanager
def open_served_weights(where: Path) -> Iterator[ServedWeights]:
    """Open weights that a server has.

    Args:
        where: GGUF file, folder of safetensors files (plain, or quantised by AWQ, bitsandbytes, compressed-tensors,
            GPTQ or MLX), or ONNX graph or model of OpenVINO, or the folder of one.

    Raises:
        ConfigError: Weights in a format that is not read, or whose library is not installed.
    """
    with ExitStack() as files:
        with as_broken(str(where)):
            file = open_weight_file(where, files)
        yield ServedWeights(where, file.format, file)


def check_different(several: Sequence[Path]) -> None:
    """Check that weights can be opened, and that none are given twice, by the SHA-256 of each.

    Raises:
        ConfigError: Two have one SHA-256, or one cannot be read.
    """
    known: dict[str, Path] = {}
    for where in several:
        with open_served_weights(where) as weights:
            sha256 = weights.sha256
        if sha256 in known:
            raise ConfigError(f"{where} and {known[sha256]} hold the same weights; name them once.")
        known[sha256] = where


@contextmanager
def open_if_given(where: Path | None) -> Iterator[ServedWeights | None]:
    """Open weights that a server has as `open_served_weights` does, or nothing."""
    if where is None:
        yield None
    else:
        with open_served_weights(where) as weights:
            yield weights
