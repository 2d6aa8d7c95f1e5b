"""Methods that quantise the matrices of safetensors files, and their dequantisation by the libraries that read them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from loraover.common.errors import ConfigError

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Place, in a word of 32 bits, of each of eight columns of a matrix of AWQ."""


class Quantiser(ABC):
    """A method by which the matrices in a folder are quantised.

    Args:
        where: The folder.
        settings: What `config.json` says of the method.

    Attributes:
        format: Name of the number format.
        markers: Last names of the tensors that show that a module is quantised.
    """

    format: str
    markers: tuple[str, ...]

    def __init__(self, where: Path, settings: Mapping[str, Any]) -> None:
        self.where, self.settings = where, settings

    def modules(self, keys: Collection[str]) -> dict[str, list[str]]:
        """Return the keys of each quantised module's tensors but its bias, by the module's path."""
        paths = {key.removesuffix(f".{end}") for key in keys for end in self.markers if key.endswith(f".{end}")}
        found: dict[str, list[str]] = {path: [] for path in sorted(paths)}
        for key in keys:
            parts = key.split(".")
            above = (".".join(parts[:count]) for count in range(1, len(parts)))
            path = next((each for each in above if each in found), None)
            if path is not None and key != f"{path}.bias":
                found[path].append(key)
        return found

    @abstractmethod
    def dequantise(self, path: str, parts: Mapping[str, Tensor]) -> Tensor:
        """Return the weight of a module, (out_features, in_features).

        Args:
            path: The module.
            parts: Its tensors by the last part of their names.
        """

    def _missing(self, package: str, error: ImportError) -> ConfigError:
        return ConfigError(
            f"{self.where}: {self.format} weights are dequantised by {package}, which is not installed or too old "
            f"({error}): pip install {package}"
        )


@final
class Mlx(Quantiser):
    """MLX's affine quantisation: whole numbers times a scale plus a bias, for groups of a row.

    Source: mlx.core.dequantize, release 0.32. It rounds each step to the type of the scales; here they are float32, as
    in a model that computes in float32.
    """

    markers = ("scales",)

    def __init__(self, where: Path, settings: Mapping[str, Any]) -> None:
        super().__init__(where, settings)
        mode = settings.get("mode", "affine")
        if mode != "affine":
            raise ConfigError(f"{where}: quantised by MLX in the mode {mode!r:.80}; only affine is read.")
        self.format = f"MLX int{settings.get('bits')}"

    def dequantise(self, path: str, parts: Mapping[str, Tensor]) -> Tensor:
        own = self.settings.get(path)
        settings = own if isinstance(own, dict) else self.settings
        bits, group = int(settings["bits"]), int(settings["group_size"])
        if bits not in (2, 4, 8):
            raise ConfigError(f"{self.where}: {path} has {bits} bits; 2, 4 and 8 are read here.")
        words = parts["weight"].view(torch.int32)
        shifts = torch.arange(0, 32, bits, dtype=torch.int32)
        numbers = ((words[..., None] >> shifts) & (2**bits - 1)).flatten(-2).float()
        scales, biases = (parts[name].float()[..., None] for name in ("scales", "biases"))
        groups = numbers.reshape(len(numbers), -1, group)
        if groups.shape[:-1] != scales.shape[:-1]:
            raise ValueError(f"{tuple(groups.shape[:-1])} groups have {tuple(scales.shape[:-1])} scales")
        found: Tensor = (groups * scales + biases).flatten(-2)
        return found


@final
class BitsAndBytes(Quantiser):
    """nf4, fp4 and int8 of bitsandbytes, dequantised by it."""

    markers = ("weight.absmax", "SCB")

    def __init__(self, where: Path, settings: Mapping[str, Any]) -> None:
        super().__init__(where, settings)
        is_int8 = bool(settings.get("load_in_8bit"))
        self.format = f"bitsandbytes {'int8' if is_int8 else settings.get('bnb_4bit_quant_type', 'fp4')}"
        try:
            from bitsandbytes import functional
        except ImportError as error:
            raise self._missing("bitsandbytes", error) from error
        self._functional: Any = functional

    def dequantise(self, path: str, parts: Mapping[str, Tensor]) -> Tensor:
        if "SCB" in parts:
            return torch.as_tensor(self._functional.int8_vectorwise_dequant(parts["weight"], parts["SCB"]))
        state = {key.removeprefix("weight."): part for key, part in parts.items() if key != "weight"}
        found = self._functional.QuantState.from_dict(state, torch.device("cpu"))
        return torch.as_tensor(self._functional.dequantize_4bit(parts["weight"], found))


@final
class CompressedTensors(Quantiser):
    """Formats of compressed-tensors, such as packed int4 and fp8, dequantised by it."""

    format = "compressed-tensors"
    markers = ("weight_packed", "weight_scale")

    def __init__(self, where: Path, settings: Mapping[str, Any]) -> None:
        super().__init__(where, settings)
        self.format = f"compressed-tensors {settings.get('format', 'of several formats')}"

    @cached_property
    def _library(self) -> Any:
        try:
            from compressed_tensors.entrypoints.convert.converters import CompressedTensorsDequantizer
        except ImportError as error:
            raise self._missing("compressed-tensors", error) from error
        return CompressedTensorsDequantizer(str(self.where), dtype=torch.float32)

    def dequantise(self, path: str, parts: Mapping[str, Tensor]) -> Tensor:
        found = self._library.process({f"{path}.{name}": part for name, part in parts.items()})
        if any(f"{path}.{name}" in found for name in self.markers):  # the library leaves it as it is
            raise ConfigError(
                f"{self.where}: {path} is quantised, but no group of quantization_config in config.json says how; "
                "quantise or download the model again."
            )
        return torch.as_tensor(found[f"{path}.weight"])


@final
class Awq(Quantiser):
    """AWQ's matrices of 4 bits in the layout "gemm": (whole number - zero point) times a scale, for groups of rows.

    Source: `WQLinear_GEMM` of AutoAWQ, and compressed-tensors' `AutoAWQConverter`.
    """

    format = "AWQ int4"
    markers = ("qweight",)

    def __init__(self, where: Path, settings: Mapping[str, Any]) -> None:
        super().__init__(where, settings)
        bits, layout = settings.get("bits", 4), str(settings.get("version", "gemm")).lower()
        if bits != 4 or layout != "gemm":
            raise ConfigError(f"{where}: AWQ with {bits} bits in the layout {layout!r:.80}; 4 bits in gemm are read.")

    def dequantise(self, path: str, parts: Mapping[str, Tensor]) -> Tensor:
        shifts = 4 * torch.tensor(AWQ_ORDER, dtype=torch.int32)
        numbers = ((parts["qweight"][..., None] >> shifts) & 15).flatten(-2).float()
        scales = parts["scales"].float()
        zeros = torch.full_like(scales, 8.0)
        if "qzeros" in parts:
            zeros = ((parts["qzeros"][..., None] >> shifts) & 15).flatten(-2).float()
        group = len(numbers) // len(scales)
        levels = numbers.reshape(-1, group, numbers.shape[1]) - zeros[:, None]
        found: Tensor = (levels * scales[:, None]).flatten(0, 1).T.contiguous()
        return found


@final
class Gptq(Quantiser):
    """GPTQ's whole numbers less a zero point, times a scale, for groups of columns that `g_idx` may mix.

    Source: `QuantLinear` of AutoGPTQ and GPTQModel. The layout "gptq" stores zero points less 1, "gptq_v2" as they are.
    """

    markers = ("qweight",)

    def __init__(self, where: Path, settings: Mapping[str, Any]) -> None:
        super().__init__(where, settings)
        bits, layout = settings.get("bits"), settings.get("checkpoint_format", "gptq")
        if bits not in (2, 4, 8) or layout not in GPTQ_ADDED:
            raise ConfigError(
                f"{where}: GPTQ with {bits!r:.20} bits in the layout {layout!r:.80}; 2, 4 and 8 bits in gptq and "
                "gptq_v2 are read."
            )
        self._bits, self._added = int(bits), GPTQ_ADDED[layout]
        self.format = f"GPTQ int{bits}"

    def dequantise(self, path: str, parts: Mapping[str, Tensor]) -> Tensor:
        numbers = self._unpacked(parts["qweight"].T).T.float()
        scales, zeros = parts["scales"].float(), self._unpacked(parts["qzeros"]).float() + self._added
        if zeros.max() == 2**self._bits:
            raise ConfigError(
                f"{self.where}: {path} has zero points of {2**self._bits}, which engines read in two ways; quantise "
                "the model again in the layout gptq_v2."
            )
        group = parts.get("g_idx", torch.arange(len(numbers)) // (len(numbers) // len(scales))).long()
        found: Tensor = ((numbers - zeros[group]) * scales[group]).T.contiguous()
        return found

    def _unpacked(self, words: Tensor) -> Tensor:
        """Numbers (rows, columns * 32 / bits) of words (rows, columns), the lowest bits first."""
        shifts = torch.arange(0, 32, self._bits, dtype=torch.int32)
        found: Tensor = ((words[..., None] >> shifts) & (2**self._bits - 1)).flatten(-2)
        return found


GPTQ_ADDED = {"gptq": 1, "gptq_v2": 0}
"""Number that is added to stored zero points, by `checkpoint_format`."""

QUANTISERS: dict[str, type[Quantiser]] = {
    "awq": Awq,
    "bitsandbytes": BitsAndBytes,
    "compressed-tensors": CompressedTensors,
    "gptq": Gptq,
    "mlx": Mlx,
}
"""Methods that are read, by their names in `quantization_config`."""
