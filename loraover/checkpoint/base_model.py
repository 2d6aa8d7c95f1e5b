"""Base model for adapters that are folded, exported or served: the one that they name, or one that the user names."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from loraover.checkpoint.tensor_file import sha256_of
from loraover.common.errors import ConfigError
from loraover.data.word_problems import HELD_OUT_SEED, word_problems
from loraover.models.load import ModelSource, Moved, load_model, load_tokenizer, resolve_model
from loraover.models.stand_in import find_stand_in
from loraover.sources.address import HubName, is_elsewhere, read_address

if TYPE_CHECKING:
    from torch import Tensor

PROMPTS, RANDOM_TOKENS = 8, 32

WEIGHTS = ".safetensors"

TEXTS = (".json", ".jinja", ".model", ".txt")  # configuration, chat template, tokenizer


class NamesBase(Protocol):
    """Configuration that names a base model."""

    @property
    def base_model_name_or_path(self) -> str | None:
        """Folder or hub name of the base model; None if it is not named."""

    @property
    def revision(self) -> str | None:
        """Branch, tag or commit of the base model on the hub."""


class OnBase(Protocol):
    """Adapter of any kind, with the folder that it was read from."""

    @property
    def path(self) -> Path:
        """Folder of the adapter."""

    @property
    def config(self) -> NamesBase:
        """Contents of `adapter_config.json`."""


def resolve_base(
    adapters: Sequence[OnBase], given: str | None, *, option: str, say: Callable[[str], None]
) -> ModelSource:
    """Find the base model that adapters name, at the revision that they name, or the model that the user names.

    A stand-in is a local copy of a hub's model with slightly other weights, for use without the hub.

    Args:
        adapters: At least one adapter.
        given: Folder or hub name; None means the model that the adapters name.
        option: Option of the command by which a user names the model, for messages.
        say: Function that shows a line to the user, such as the warning that the weights differ.

    Returns:
        The model. Its `moved` is set if the adapters were trained on a stand-in and `given` is another model.

    Raises:
        ConfigError: The adapters name no model or several, the model or stand-in does not exist, or only a stand-in can
            be found for the hub's model on which the adapters were trained.
    """
    trained = {(adapter.config.base_model_name_or_path, adapter.config.revision) for adapter in adapters}
    if given is None and (len(trained) > 1 or None in {name for name, _ in trained}):
        raise ConfigError(f"{_listed(adapters)}: {described(trained)}; name the base model with {option}.")
    name = given or str(next(iter(trained))[0])
    if given is None and is_elsewhere(name):
        raise ConfigError(
            f"{_listed(adapters)}: names the base model {name}, an address that is read only if you name it yourself; "
            f"use {option} {name} if you trust it."
        )
    found = read_address(name)
    named, pinned = (found.name, found.revision) if isinstance(found, HubName) else (name, None)
    revisions = {revision for trained_on, revision in trained if trained_on == named}
    if len(revisions) > 1 and pinned is None:
        raise ConfigError(
            f"{_listed(adapters)}: {described(trained)}. No revision fits all of them; use them one at a "
            f"time, or name the folder of the weights to use with {option}."
        )
    source = resolve_model(name, next(iter(revisions), None), say=say)
    names = {str(trained_on) for trained_on, _ in trained}
    stand_in = source.stand_in
    if stand_in is not None and source.name != name and stand_in.stands_for in names:
        raise ConfigError(
            f"{_listed(adapters)}: trained on {stand_in.stands_for} of the hub, which cannot be reached. The "
            f"stand-in for this model, {source.name}, has other weights; name it with {option} if you want to use it "
            "nevertheless."
        )
    return move(names, source, say)


def naming(config: Mapping[str, Any], base: ModelSource) -> dict[str, Any]:
    """Return the contents of an `adapter_config.json`, with another base model named in it."""
    return {**config, "base_model_name_or_path": base.name, "revision": base.revision}


def move(trained: Collection[str], source: ModelSource, say: Callable[[str], None]) -> ModelSource:
    """Compare a model with the stand-ins that adapters were trained on, and record the difference.

    Args:
        trained: Names of the base models on which the adapters were trained.
        source: Model on which the adapters are to be used.
        say: Function that shows a line to the user, such as the warning that a stand-in has other weights.

    Returns:
        The model. Its `moved` is set if a stand-in in `trained` has other weights.

    Raises:
        ConfigError: A stand-in does not exist any more, or its adapters do not fit the model.
    """
    stand_ins = {name: stand_in for name in trained if (stand_in := find_stand_in(name)) is not None}
    moved = None
    for name, stand_in in stand_ins.items():
        if stand_in == source.stand_in:
            continue
        say(f"comparing the base model with the {stand_in}")
        difference = largest_logit_difference(resolve_model(name), source)
        say(
            f"warning: trained on a {stand_in}. The logits of {source.name} differ from that model's by up to "
            f"{difference:.3g} before any adapter is applied, so the adapter was not trained on these weights"
        )
        if moved is None or difference > moved.difference:
            moved = Moved(stand_in, difference)
    return source if moved is None else replace(source, moved=moved)


def base_facts(name: str | None, source: ModelSource | None) -> dict[str, str]:
    """Return rows of a model card about the stand-in that an adapter names or was trained on, if there is one."""
    if source is not None and source.moved is not None:
        return source.facts()
    stand_in = None if name is None else find_stand_in(name)
    return {} if stand_in is None else stand_in.facts()


def largest_logit_difference(one: ModelSource, other: ModelSource) -> float:
    """Return the largest difference of two models' logits over word problems, or random tokens without a tokenizer."""
    import torch

    try:
        tokenizer = load_tokenizer(one)
    except ConfigError:
        size = load_model(one).config.vocab_size
        generator = torch.Generator().manual_seed(0)
        prompts = [torch.randint(size, (1, RANDOM_TOKENS), generator=generator) for _ in range(PROMPTS)]
    else:
        problems = islice(word_problems(HELD_OUT_SEED), PROMPTS)
        texts = [problem["prompt"] + problem["completion"] for problem in problems]
        prompts = [tokenizer(text, return_tensors="pt").input_ids for text in texts]
    (first, vocabulary), (second, others) = _logits(one, prompts), _logits(other, prompts)
    if vocabulary != others:
        raise ConfigError(
            f"{other.origin} has a vocabulary of {others} tokens, {one.origin} one of {vocabulary}: an adapter of "
            "one model does not fit the other."
        )
    return max(float(torch.dist(p, q, torch.inf)) for p, q in zip(first, second, strict=True))


def _logits(source: ModelSource, prompts: Sequence[Tensor]) -> tuple[list[Tensor], int]:
    """Return the logits (1, tokens, vocabulary) of each prompt, and the size of the vocabulary."""
    import torch

    model = load_model(source)
    size = model.config.vocab_size
    with torch.no_grad():
        found = [model(input_ids=prompt.clamp_max(size - 1)).logits for prompt in prompts]
    return found, size


def _listed(adapters: Sequence[OnBase]) -> str:
    return ", ".join(str(adapter.path) for adapter in adapters)


def described(trained: Collection[tuple[str | None, str | None]]) -> str:
    """Return the base models of adapters in words, given each one's name and revision."""
    named = sorted(f"{name}@{revision}" if revision else str(name) for name, revision in trained if name is not None)
    if not named:
        return "names no base model" if len(trained) == 1 else "name no base model"
    return f"trained on {', '.join(named)}" + ("" if len(named) == len(trained) else " and on a model without a name")


def model_digest(source: ModelSource, *, weights: bool) -> str:
    """Commit of a base model on the hub, or SHA-256 over the names and the SHA-256 of the files in its folder.

    Only files of which answers depend are read: the configurations, the tokenizer, the chat template and, which takes
    seconds, the weights; a model on a server has other files.
    """
    if source.revision is not None:
        return source.revision
    digest, endings = hashlib.sha256(), (*TEXTS, WEIGHTS) if weights else TEXTS
    try:
        for path in sorted(Path(source.location).iterdir()):
            if path.suffix in endings and path.is_file():
                digest.update(f"{path.name} {sha256_of(path)}\n".encode())
    except OSError as error:
        raise ConfigError(f"model: {source.origin} cannot be read: {error}.") from error
    return digest.hexdigest()
