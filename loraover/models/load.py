"""Base models and tokenizers, from a local folder, the hub, or a stand-in if the hub cannot be reached."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import RLock
from typing import Any

from loraover.common.errors import ConfigError
from loraover.common.paths import kind_of
from loraover.common.reporter import SILENT
from loraover.models.device import COMPUTE_DTYPES, choose_device
from loraover.models.stand_in import STAND_INS, StandIn, find_stand_in, make_stand_in
from loraover.sources.address import Address, HubName, read_address
from loraover.sources.fetch import CONFIG_FILES, MODEL_FILES, fetch_address
from loraover.sources.hub import HubUnreachableError, pinned_commit

_ONE_THREAD = RLock()
"""Lock held while transformers imports a model's code or loads one.

A second thread would meet modules that are half imported. While a model is loaded, transformers 5 also replaces the
method of its classes that ties weights; of two loads that overlap, the one that ends last leaves the empty method there
for good, and later models with tied weights keep parts on the meta device.
"""


@dataclass(frozen=True)
class Moved:
    """Record that adapters were trained on a stand-in and are to be used on another model.

    Args:
        trained: Stand-in on which the adapters were trained.
        difference: Largest absolute difference between the logits of the two base models.
    """

    trained: StandIn
    difference: float

    def facts(self) -> dict[str, str]:
        """Return rows of a model card."""
        return {
            "trained on": str(self.trained),
            "SHA-256 of that wheel": self.trained.sha256,
            "largest logit difference of the two base models": f"{self.difference:.3g}",
        }


@dataclass(frozen=True)
class ModelSource:
    """Place from which a base model is read.

    Args:
        name: Hub name or folder that adapters record as their base model.
        location: Hub name or folder that transformers loads.
        revision: Commit on the hub; None for folders.
        origin: Description in one line, for messages.
        stand_in: Record of the stand-in if this is one, else None.
        moved: Record of adapters that were trained on a stand-in and are to be used on this model, else None.
        is_streamed: Whether `load_model` leaves the weights in their files, and each is read whenever it is used.
        is_spread: Whether `load_model` spreads the layers over all GPUs, as accelerate does.
    """

    name: str
    location: str
    revision: str | None
    origin: str
    stand_in: StandIn | None = None
    moved: Moved | None = None
    is_streamed: bool = False
    is_spread: bool = False

    def facts(self) -> dict[str, str]:
        """Return rows of a model card about weights that differ from the hub's; none for other models."""
        return (self.stand_in.facts() if self.stand_in else {}) | (self.moved.facts() if self.moved else {})


def resolve_model(
    name: str, revision: str | None = None, *, with_weights: bool = True, say: Callable[[str], None] = SILENT.line
) -> ModelSource:
    """Find a base model: a folder, a model of the hub at its present commit, an address, or the stand-in for it.

    A stand-in is used only if the hub cannot be reached and its cache holds no copy. Its folder is then the model's
    name.

    Args:
        name: Folder, hub name such as "owner/model" or "owner/model@revision", or address such as
            "s3://bucket/model".
        revision: Branch, tag or commit on the hub, if the name has none; None means "main".
        with_weights: Whether more than the configuration is needed of a model at an address.
        say: Function that shows a line to the user.

    Raises:
        ConfigError: The address cannot be read, the folder or the hub's model does not exist, or neither the hub nor a
            stand-in is at hand.
        CheckpointError: The record of a stand-in cannot be read.
    """
    found = read_address(name)
    if isinstance(found, Address):
        folder = fetch_address(found, MODEL_FILES if with_weights else CONFIG_FILES, say)
        return ModelSource(str(found), str(folder), None, f"address {found}")
    stand_in = find_stand_in(name)
    if kind_of(name) == "folder":
        origin = f"folder {name}" if stand_in is None else str(stand_in)
        return ModelSource(name, str(Path(name)), None, origin, stand_in)
    if stand_in is not None:
        raise ConfigError(
            f"model: {name} does not exist any more. It held a {stand_in}. Make it again with "
            f"`python -m loraover.models.stand_in {stand_in.stands_for}`; if this prints another folder, name that one "
            "as the base model."
        )
    if not isinstance(found, HubName):
        raise ConfigError(f"model: {name!r} is neither a folder, an address nor a hub name such as 'owner/model'.")
    name = found.name
    try:
        commit = pinned_commit(name, found.revision or revision, "model")
    except HubUnreachableError:
        if name not in STAND_INS:
            raise
        stand_in_source = resolve_model(str(make_stand_in(STAND_INS[name])))
        return replace(stand_in_source, origin=f"{stand_in_source.origin} (the hub cannot be reached)")
    return ModelSource(name, name, commit, f"hub {name}@{commit[:12]}")


AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""Class of transformers that loads a model for each of PEFT's tasks."""


def takes_images(source: ModelSource) -> bool:
    """Whether a model reads images beside text, by the kind that its configuration names.

    Some models, such as Llama 4, can also be loaded by transformers for text alone, with other names of their modules.
    They count as models of text.
    """
    from transformers.models.auto import modeling_auto as classes

    kind = load_config(source).model_type
    seeing = classes.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(kind)
    return seeing is not None and classes.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind, seeing) == seeing


def _loading_class(source: ModelSource, kind: str, named: str | None) -> str:
    """Class of transformers that loads a model for a task: the named one, or the task's; another if it reads images."""
    if kind not in AUTO_CLASSES:
        raise ConfigError(f"task_type is {kind!r}, expected one of {', '.join(AUTO_CLASSES)}.")
    with suppress(ConfigError):  # of a configuration that transformers itself then refuses
        if named is None and kind == "CAUSAL_LM" and takes_images(source):
            return "AutoModelForImageTextToText"
    return named or AUTO_CLASSES[kind]


def load_model(
    source: ModelSource,
    *,
    dtype: str = "fp32",
    task_type: str | None = "CAUSAL_LM",
    num_labels: int | None = None,
    device: str = "cpu",
    attention: str | None = None,
    quantization: str | None = None,
    auto_class: str | None = None,
) -> Any:
    """Load a base model in eval mode, straight to a device: no second copy of the weights is made on the CPU.

    Several threads may call this function; they load one after the other.

    Args:
        source: Place of the model.
        dtype: Data type of the weights: fp32, bf16, fp16 or fp64.
        task_type: PEFT's name of the task: a key of AUTO_CLASSES; None means CAUSAL_LM.
        num_labels: Number of a classifier's labels; None means the number in the model's configuration.
        device: Device to load to: cpu, cuda, mps, auto, or one GPU such as cuda:1.
        attention: Implementation of attention, as transformers names it; None means transformers' choice.
        quantization: Form of the linear layers: nf4 or int8 of bitsandbytes, torchao-int8, or None.
        auto_class: Class of transformers that loads it; None means that of the task.

    Raises:
        ConfigError: No such model or device, or a package that quantises is not installed.
    """
    import torch
    import transformers
    from safetensors import SafetensorError

    from loraover.models.streaming import in_files, read_when_used

    place, kind = choose_device(device), task_type or "CAUSAL_LM"
    name = _loading_class(source, kind, auto_class)
    placed: dict[str, Any] = {} if place.type == "cpu" else {"device_map": {"": place}}
    if source.is_spread:
        placed = {"device_map": "auto"}
    if source.is_streamed:
        placed, folder = in_files()
    try:
        with _ONE_THREAD:
            model = getattr(transformers, name).from_pretrained(
                source.location,
                revision=source.revision,
                dtype=getattr(torch, COMPUTE_DTYPES[dtype]),
                use_safetensors=True,
                trust_remote_code=False,
                **({} if num_labels is None else {"num_labels": num_labels}),
                **({} if attention is None else {"attn_implementation": attention}),
                **({} if quantization is None else {"quantization_config": _quantised(quantization, dtype)}),
                **placed,
            )
        if source.is_streamed:
            read_when_used(model, place, folder)
    except (OSError, ImportError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"model: {source.origin} cannot be loaded as {kind}: {error}") from error
    return (_unpacked(model) if quantization == "nf4" else model).eval()


def load_encoder(source: ModelSource, modules: Collection[str], **options: Any) -> Any:
    """Load a model of hidden states without a head, or with that of next tokens, whichever has an adapter's modules.

    Args:
        modules: Paths of the modules that adapters change.
        options: Further arguments of `load_model`.
    """
    model = load_model(source, task_type="FEATURE_EXTRACTION", **options)
    known = {path for path, _ in model.named_modules()}
    return model if known.intersection(modules) else load_model(source, **options)


def _unpacked(model: Any) -> Any:
    """Keep bitsandbytes 0.50 from packing weights of 4 bits, as it does where a CPU with AVX-512 evaluates a model.

    Their product has no gradient, and a layer stays packed when training begins, so nothing below it would be trained.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


def _quantised(form: str, dtype: str) -> Any:
    """Return transformers' settings of a quantised form; nf4 computes in `dtype` and quantises its scales too."""
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if form == "torchao-int8":
        try:
            from torchao.quantization import Int8WeightOnlyConfig
        except ImportError as error:
            raise ConfigError(f"quantization {form} needs torchao: pip install torchao") from error
        return TorchAoConfig(Int8WeightOnlyConfig())
    if form == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=form,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=COMPUTE_DTYPES[dtype],
    )


def load_skeleton(source: ModelSource) -> Any:
    """Build a model without weights, on PyTorch's meta device, to look at its module names and shapes.

    Only `config.json` is read. The class is the first of its `architectures`. Several threads may call this function.

    Raises:
        ConfigError: The configuration is missing or names no architecture, or transformers cannot build it.
    """
    with _ONE_THREAD:
        import torch
        import transformers

        config = load_config(source)
        architecture = config.architectures[0]
        kind = getattr(transformers, architecture, None)
        if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
            raise ConfigError(
                f"model: {source.origin} is a {architecture}, which transformers {transformers.__version__} does not "
                "have."
            )
        try:
            with torch.device("meta"):
                return kind(config).eval()
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError) as error:
            raise ConfigError(f"model: {source.origin} cannot be built as {architecture}: {error}") from error


def load_config(source: ModelSource) -> Any:
    """Load a model's configuration. Several threads may call this function.

    Raises:
        ConfigError: The configuration is missing, unknown to transformers, has fields that transformers cannot use, or
            names no architecture.
    """
    with _ONE_THREAD:
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig

        faults = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
        try:
            config = AutoConfig.from_pretrained(source.location, revision=source.revision, trust_remote_code=False)
        except (*faults, StrictDataclassError) as error:
            raise ConfigError(f"model: {source.origin} has no usable config.json: {error}") from error
    names = config.architectures
    if not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
        raise ConfigError(
            f"model: {source.origin}: config.json names no architectures (found {names!r:.80}); save the model again."
        )
    return config


def is_encoder_decoder(source: ModelSource) -> bool:
    """Whether the model has an encoder and a decoder, as T5 has."""
    return bool(load_config(source).is_encoder_decoder)


def load_tokenizer(source: ModelSource) -> Any:
    """Load a model's tokenizer, and give it a padding token if it has none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source.location, revision=source.revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        # TypeError: transformers 4, if the files are missing; AttributeError: a file that holds no object.
        raise ConfigError(f"model: {source.origin} has no tokenizer: {error}") from error
    with suppress(ConfigError):  # models of texts, or without a processor
        if tokenizer.chat_template is None and takes_images(source):
            tokenizer.chat_template = load_processor(source).chat_template
    return _padded(tokenizer)


def load_processor(source: ModelSource) -> Any:
    """Load what turns texts and images into a model's inputs, with its tokenizer."""
    from transformers import AutoProcessor, ProcessorMixin

    try:
        processor = AutoProcessor.from_pretrained(source.location, revision=source.revision, trust_remote_code=False)
        if not isinstance(processor, ProcessorMixin):
            raise ValueError("it has no processor's files, such as processor_config.json")
    except (OSError, ImportError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"model: {source.origin} cannot read images: {error}") from error
    template = processor.chat_template or processor.tokenizer.chat_template
    processor.chat_template = _padded(processor.tokenizer).chat_template = template
    return processor


def _padded(tokenizer: Any) -> Any:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
