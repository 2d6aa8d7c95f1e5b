"""The files of a base model: its tensors, by shard, and everything that comes along with them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraover.checkpoint.tensor_file import TensorFile, open_tensors
from loraover.common.errors import ConfigError, ExportError
from loraover.models.load import ModelSource

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".index.json", ".ot")
LEFT_BEHIND = (*WEIGHTS, "adapter_config.json", "_certificate.json")
"""Endings of files that a merged model does not need; with the second, transformers takes it for an adapter."""
REPLACED = (CONFIG, "README.md", ".gitattributes")
ALONG = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*"]
"""Files of a model on the hub that are fetched."""

UNQUANTISED = "merge into the unquantised model that it was made from, and quantise the result"


@dataclass(frozen=True)
class BaseFiles:
    """A base model's folder.

    Args:
        folder: the folder.
        config: contents of `config.json`.
        shards: files with tensors, by name; each is open.
    """

    folder: Path
    config: dict[str, Any]
    shards: Mapping[str, TensorFile]

    def along(self) -> list[Path]:
        """Return the files that a merged model needs too, such as those of the tokenizer."""
        found = (path for path in sorted(self.folder.iterdir()) if path.is_file())
        return [path for path in found if not path.name.endswith(LEFT_BEHIND) and path.name not in REPLACED]


def check_not_gguf(model: str | None) -> None:
    """Raise ExportError if a base model is named by a GGUF file."""
    if model is not None and model.lower().endswith(".gguf"):
        raise ExportError(f"{model} is a GGUF file, whose weights are quantised or in another layout; {UNQUANTISED}.")


def open_base(source: ModelSource, stack: ExitStack) -> BaseFiles:
    """Open a base model's files for as long as a stack of contexts lasts.

    Raises:
        ConfigError: no `config.json`, or no safetensors files.
        ExportError: a quantised model.
        CheckpointError: a damaged file.
    """
    folder = _folder(source)
    config = _read_json(folder / CONFIG, source)
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "an unnamed method")
        raise ExportError(f"{source.origin} is quantised ({method}), and a sum would be rounded again; {UNQUANTISED}.")
    if (folder / INDEX).is_file():
        names = sorted(set(_read_json(folder / INDEX, source)["weight_map"].values()))
    elif (folder / SINGLE).is_file():
        names = [SINGLE]
    else:
        found = sorted(path.name for path in folder.iterdir() if path.name.endswith(WEIGHTS))
        raise ConfigError(
            f"model: {source.origin} has no {SINGLE} and no {INDEX}; it has "
            f"{', '.join(found[:3]) or 'no weights'}. Save it again with save_pretrained."
        )
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise ConfigError(f"model: {source.origin}: {INDEX} names {outside[0]!r}, which is not a file of the folder.")
    return BaseFiles(folder, config, {name: stack.enter_context(open_tensors(folder / name)) for name in names})


def _folder(source: ModelSource) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    if Path(source.location).is_dir():
        return Path(source.location)
    try:
        return Path(snapshot_download(source.location, revision=source.revision, allow_patterns=ALONG))
    except (HfHubHTTPError, OSError) as error:
        raise ConfigError(f"model: the files of {source.origin} cannot be fetched: {error}") from error


def _read_json(path: Path, source: ModelSource) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"model: {source.origin} has no usable {path.name}: {error}") from error
    return found
