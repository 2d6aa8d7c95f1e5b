"""Weights in a model's files by the names of transformers: modules, experts and all other tensors."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from math import prod
from typing import Any

from loraover.adapters.base_weights import open_files
from loraover.checkpoint.expert_stacks import ExpertWeight
from loraover.checkpoint.files import CONFIG_FILE
from loraover.checkpoint.model_facts import INDEX, SINGLE, read_served
from loraover.checkpoint.tensor_file import TensorFile
from loraover.models.load import ModelSource
from loraover_export.merged.matrices import StoredMatrix, StoredRows, TensorPiece
from loraover_export.merged.tokenizer import Tokenizer, has_other_form, in_folder

TRANSPOSED = ("decision_transformer", "gpt2", "imagegpt", "openai-gpt")
"""Model types of transformers whose layers are Conv1D, so that their weights are stored as (in, out)."""

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
"""Names of the head's weight and of the embedding's, and endings of the names that embeddings have."""

BUFFERS = (
    *(".inv_freq", ".attn.bias", ".masked_bias", ".position_ids"),
    *("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"),
)
"""Endings of the names of tensors that are computed from a configuration, so that files may lack them."""

QUANTISED = ("qweight", "weight_packed", "W_q")
"""Last parts of names under which GPTQ, AWQ and others store a quantised weight in place of `weight`."""

EXPERT_PARTS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
"""Names of the matrices whose rows make up a parameter of experts, in files that store each expert separately."""

OTHER_PARTS = {part for names in EXPERT_PARTS.values() for alike in names for part in alike}

EXPERT = re.compile(r"(?P<owner>.+\.experts)\.(?P<index>\d+)\.(?P<parameter>gate_up_proj|down_proj)")
STACK = re.compile(r"(?P<owner>.+\.experts)\.(?P<parameter>gate_up_proj|down_proj)")
_PART = re.compile(rf"(?P<owner>.+\.experts)\.(?P<index>\d+)\.(?P<part>{'|'.join(sorted(OTHER_PARTS))})\.weight")


class Weights(ABC):
    """Weights of a model in files.

    Attributes:
        origin: Where they are, in words.
    """

    origin: str

    @abstractmethod
    def names(self) -> list[str]:
        """Return the names of all tensors."""

    @property
    @abstractmethod
    def embedding(self) -> str | None:
        """Name of the input embedding's tensor; None if it is not known."""

    @property
    def is_tied(self) -> bool:
        """Whether the head has no tensor, so that the embedding is its matrix too."""
        head = self.find(HEAD)
        embedding = None if self.embedding is None else self.find(self.embedding)
        return head is not None and embedding is not None and head.name == embedding.name

    @abstractmethod
    def find(self, name: str) -> StoredMatrix | None:
        """Return the tensor of a parameter by transformers' name, as a matrix; None if the files hold none.

        Where the head has no tensor, that of the embedding is returned.
        """

    @abstractmethod
    def tokenizer(self) -> Tokenizer | None:
        """Return the model's tokenizer; None if there is none, or one in a form that is not read here."""

    @property
    def has_unread_tokenizer(self) -> bool:
        """Whether there is a tokenizer in a form that is not read here."""
        return False

    def renamed(self, base: Weights) -> Iterator[str]:
        """Yield a sentence for each change of the tensors' names from the base model's."""
        yield from ()

    def settings(self, base: Weights) -> Iterator[str]:
        """Yield a sentence for each setting of the model that differs from the base model's."""
        yield from ()

    @property
    def quantisation(self) -> str | None:
        """Method by which the weights are quantised, if a configuration names one."""
        return None

    @abstractmethod
    def stacks(self) -> dict[str, int]:
        """Return the number of experts of each parameter of experts; `names` does not list their tensors."""

    @abstractmethod
    def experts(self) -> Mapping[str, ExpertWeight]:
        """Return the parameters of experts as transformers' class has them."""

    @abstractmethod
    def module(self, path: str, shape: tuple[int, int]) -> list[TensorPiece]:
        """Return the matrices that hold the weight of a module, or of one expert; empty if there are none.

        Args:
            path: Path of the module; for an expert, followed by its number and the parameter.
            shape: Shape of the weight, (out_features, in_features) or (tokens, dimension).
        """


SETTINGS = (
    *("tie_word_embeddings", "hidden_act", "rms_norm_eps", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "num_experts_per_tok", "norm_topk_prob"),
    *("layer_norm_eps", "layer_norm_epsilon", "hidden_activation", "partial_rotary_factor", "sliding_window"),
    *("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling", "query_pre_attn_scalar"),
    *("attn_logit_softcapping", "final_logit_softcapping", "routed_scaling_factor"),
)
"""Keys of config.json that change what a model computes; they are compared if both models' files have them."""


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of `SETTINGS`, the model type and the rotary settings, in any spelling of a configuration."""
    text = config.get("text_config")
    merged = {**config, **(text if isinstance(text, dict) else {})}
    found = {name: merged.get(name) for name in SETTINGS}
    found["model_type"] = config.get("model_type")
    rope: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):  # the second one since transformers 5
        value = merged.get(name)
        rope |= value if isinstance(value, dict) else {}
    theta = rope.pop("rope_theta", None)
    found["rope_theta"] = merged.get("rope_theta") or theta
    kind = rope.pop("type", None)
    found["rope_type"] = rope.setdefault("rope_type", kind or "default")
    return found | {name: value for name, value in rope.items() if not isinstance(value, dict)}


class StoredWeights(Weights):
    """Weights in the safetensors files of a folder; their names may have other prefixes than the modules' paths."""

    def __init__(self, source: ModelSource, files: ExitStack) -> None:
        self.origin, self.source = source.origin, source
        opened = open_files(source, files, may_be_quantised=True)
        self.folder, self.config = opened.folder, opened.config
        self._files = {key: file for file in opened.shards.values() for key in file.keys}
        self._moves: list[tuple[str, str]] = []
        text = self.config.get("text_config")
        kinds = {self.config.get("model_type"), text.get("model_type") if isinstance(text, dict) else None}
        self._is_transposed = not kinds.isdisjoint(TRANSPOSED)

    def names(self) -> list[str]:
        return [key for key in self._files if STACK.fullmatch(key) is None and _PART.fullmatch(key) is None]

    def experts(self) -> Mapping[str, ExpertWeight]:
        return read_served(self.source).experts

    def tokenizer(self) -> Tokenizer | None:
        return in_folder(self.folder, self.origin)

    @property
    def has_unread_tokenizer(self) -> bool:
        return has_other_form(self.folder)

    @property
    def quantisation(self) -> str | None:
        found = self.config.get("quantization_config")
        return str(found.get("quant_method", "an unnamed method")) if isinstance(found, dict) else None

    def stacks(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for key, file in self._files.items():
            if STACK.fullmatch(key) is not None and len(file.shape(key)) == 3:
                found[key] = file.shape(key)[0]
            part = _PART.fullmatch(key)
            if part is not None:
                parameter = next(name for name, all_ in EXPERT_PARTS.items() for alike in all_ if part["part"] in alike)
                path = f"{part['owner'].replace('.block_sparse_moe.', '.mlp.')}.{parameter}"
                found[path] = max(found.get(path, 0), int(part["index"]) + 1)
        return found

    def find(self, name: str) -> StoredMatrix | None:
        key = self._key(name)
        if key is None:
            path = name.removesuffix("weight")
            key = next((key for each in QUANTISED if (key := path + each) in self._files), None)
        if key is None:
            return None
        return rows_in(self._files[key], key)

    def module(self, path: str, shape: tuple[int, int]) -> list[TensorPiece]:
        found = self.find(f"{path}.weight")
        if found is not None:
            is_transposed = found.shape != shape if shape[0] != shape[1] else self._is_transposed
            return [TensorPiece(found, is_transposed)]
        expert = EXPERT.fullmatch(path)
        if expert is None:
            return []
        owner, index, parameter = expert["owner"], int(expert["index"]), expert["parameter"]
        key = self._key(f"{owner}.{parameter}")
        if key is not None:
            experts, rows, columns = self._files[key].shape(key)
            first = index * rows * columns
            part = StoredRows(self._files[key], key, (rows, columns), first)
            return [TensorPiece(part, (rows, columns) != shape)] if index < experts else []
        for place in (owner, owner.replace(".mlp.", ".block_sparse_moe.")):
            for names in EXPERT_PARTS[parameter]:
                parts = [self.find(f"{place}.{index}.{name}.weight") for name in names]
                if None not in parts:
                    return [TensorPiece(part, False) for part in parts if part is not None]
        return []

    @property
    def embedding(self) -> str | None:
        found = [key for key in self._files if key.endswith(EMBEDDINGS)]
        return found[0] if len(found) == 1 else None

    def renamed(self, base: Weights) -> Iterator[str]:
        """Yield a sentence for each prefix of tensors' names that differs from the base model's."""
        if not isinstance(base, StoredWeights):
            return
        moves: Counter[tuple[str, str]] = Counter()
        for name in self.names():
            key = base._key(name)
            if key is None or key == name or name == HEAD:
                continue
            tail = next((name[k:] for k in range(len(name)) if key.endswith(name[k:])), "")
            moves[name.removesuffix(tail), key.removesuffix(tail)] += 1
        for (new, old), number in moves.items():
            yield (
                f"whether engines load {number} tensors of {self.origin}, whose names begin with {new!r:.80}, and "
                f"those of the base model with {old!r:.80}"
            )

    def settings(self, base: Weights) -> Iterator[str]:
        """Yield a sentence for each setting of the model that differs from the base model's."""
        if (self.folder / CONFIG_FILE).is_file():
            yield (
                f"what engines make of {self.origin}, which holds {CONFIG_FILE} beside the merged weights: "
                "transformers takes it for an adapter, and loads the model that is named there"
            )
        if all((self.folder / name).is_file() for name in (SINGLE, INDEX)):
            yield (
                f"the files that {INDEX} of {self.origin} names: transformers reads {SINGLE} beside it, and other "
                "programs may read them"
            )
        if not isinstance(base, StoredWeights):
            return
        mine, theirs = _settings(self.config), _settings(base.config)
        is_tied, was_tied = mine.pop("tie_word_embeddings", None), theirs.pop("tie_word_embeddings", None)
        # A merge may untie the head that it writes, and it cannot tie one that it writes.
        if None not in (is_tied, was_tied) and is_tied != was_tied and (HEAD in self._files) == bool(is_tied):
            mine["tie_word_embeddings"], theirs["tie_word_embeddings"] = is_tied, was_tied
        for name in sorted(mine.keys() | theirs.keys()):
            found, expected = mine.get(name), theirs.get(name)
            is_optional = name in SETTINGS or name == "rope_theta"  # which files leave out for its usual value
            if found != expected and not (is_optional and None in (found, expected)):
                yield f"the effect of {name} in the config.json of {self.origin}: {found!r:.80}, not {expected!r:.80}"

    def _key(self, name: str) -> str | None:
        """Return the key of a parameter: its name, or one with another prefix and the same numbers of layers."""
        for old, new in [("", ""), *self._moves]:
            if name.startswith(old) and (key := new + name[len(old) :]) in self._files:
                return key
        parts = name.split(".")
        last = next((k for k, part in enumerate(parts) if part.isdecimal()), len(parts) - 1)
        for count in range(max(1, last)):
            tail = ".".join(parts[count:])
            found = [key for key in self._files if f".{key}".endswith(f".{tail}")]
            found = [key for key in found if not any(map(str.isdecimal, key.removesuffix(tail).split(".")))]
            if len(found) == 1:
                self._moves.append((name.removesuffix(tail), found[0].removesuffix(tail)))
                return found[0]
            if found:
                return None
        return self.embedding if name == HEAD else None


def rows_in(file: TensorFile, key: str) -> StoredRows:
    """Return a tensor as a matrix of its last dimension; as one row if rows end within bytes, as of 4-bit numbers."""
    shape, size = file.shape(key), file.size(key)
    rows = prod(shape[:-1])
    return StoredRows(file, key, (1, prod(shape)) if rows and size % rows else (rows, shape[-1] if shape else 1))
