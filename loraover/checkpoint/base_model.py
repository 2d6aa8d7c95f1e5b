"""The base model of adapters that are folded, exported or served: the one that they name, or another one by request."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from loraover.checkpoint.peft_adapter import AdapterDir
from loraover.common.errors import ConfigError
from loraover.data.word_problems import HELD_OUT_SEED, word_problems
from loraover.models.load import ModelSource, Moved, load_model, load_tokenizer, resolve_model
from loraover.models.stand_in import find_stand_in

if TYPE_CHECKING:
    from torch import Tensor

PROMPTS, RANDOM_TOKENS = 8, 32


def resolve_base(
    adapters: Sequence[AdapterDir], given: str | None, *, option: str, say: Callable[[str], None]
) -> ModelSource:
    """Find the base model that adapters share, at the revision that they pin, or the one that was asked for.

    Args:
        adapters: one at least.
        given: folder or hub name; None means the one that the adapters name.
        option: the command's option for it, for messages.
        say: told the warning of `moved`.

    Returns:
        The model; with `moved` where the adapters were trained on a stand-in and `given` is another model.

    Raises:
        ConfigError: adapters that name none, or several, or no such model; a stand-in that is gone; or a stand-in that
            would take the place of the hub's model that the adapters were trained on.
    """
    trained = {(adapter.config.base_model_name_or_path, adapter.config.revision) for adapter in adapters}
    if given is None and (len(trained) > 1 or None in {name for name, _ in trained}):
        raise ConfigError(f"{_listed(adapters)}: {_described(trained)}; name the base model with {option}.")
    name = given or str(next(iter(trained))[0])
    revisions = {revision for trained_on, revision in trained if trained_on == name}
    if len(revisions) > 1:
        raise ConfigError(
            f"{_listed(adapters)}: {_described(trained)}. No one revision is right for all of them; use them one by "
            f"one, or name a folder with the weights to use with {option}."
        )
    source = resolve_model(name, *revisions)
    names = {str(trained_on) for trained_on, _ in trained}
    is_substituted = source.stand_in is not None and source.name != name
    if is_substituted and name in names:
        raise ConfigError(
            f"{_listed(adapters)}: trained on {name} of the hub, which cannot be reached. The stand-in that is used "
            f"for training then, {source.name}, has other weights; name it with {option} if you want it all the same."
        )
    return move(names, source, say)


def naming(config: Mapping[str, Any], base: ModelSource) -> dict[str, Any]:
    """The contents of an `adapter_config.json` with another base model."""
    return {**config, "base_model_name_or_path": base.name, "revision": base.revision}


def move(trained: Collection[str], source: ModelSource, say: Callable[[str], None]) -> ModelSource:
    """The model, with what its weights differ by from the stand-ins that adapters were trained on.

    Args:
        trained: names of the base models that the adapters were trained on.
        source: what the adapters are to be used on.
        say: told a warning, if any of `trained` is a stand-in with other weights.

    Raises:
        ConfigError: a stand-in that is gone, or a model that no adapter of it fits.
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
    """Rows of an adapter's model card about a stand-in that it names, or that it was moved from; none without one.

    Args:
        name: the base model that the adapter names.
        source: what `resolve_base` found, if it was asked.
    """
    if source is not None and source.moved is not None:
        return source.facts()
    stand_in = None if name is None else find_stand_in(name)
    return {} if stand_in is None else stand_in.facts()


def largest_logit_difference(one: ModelSource, other: ModelSource) -> float:
    """Largest absolute difference of two models' logits, in float32, over some short word problems.

    Random tokens take the problems' place where the first model has no tokenizer.

    Raises:
        ConfigError: a model that cannot be loaded, or that has another vocabulary.
    """
    import torch

    prompts = _prompts(one)
    (first, vocabulary), (second, others) = _logits(one, prompts), _logits(other, prompts)
    if vocabulary != others:
        raise ConfigError(
            f"{other.origin} has a vocabulary of {others} tokens, {one.origin} one of {vocabulary}: an adapter of the "
            "one does not fit the other."
        )
    return max(float(torch.dist(p, q, torch.inf)) for p, q in zip(first, second, strict=True))


def _prompts(source: ModelSource) -> list[Tensor]:
    import torch

    try:
        tokenizer = load_tokenizer(source)
    except ConfigError:
        size = load_model(source).config.vocab_size
        generator = torch.Generator().manual_seed(0)
        return [torch.randint(size, (1, RANDOM_TOKENS), generator=generator) for _ in range(PROMPTS)]
    problems = islice(word_problems(HELD_OUT_SEED), PROMPTS)
    texts = [problem["prompt"] + problem["completion"] for problem in problems]
    return [tokenizer(text, return_tensors="pt").input_ids for text in texts]


def _logits(source: ModelSource, prompts: Sequence[Tensor]) -> tuple[list[Tensor], int]:
    """Logits of each prompt, (1, tokens, vocabulary), and the size of the vocabulary."""
    import torch

    model = load_model(source)
    size = model.config.vocab_size
    with torch.no_grad():
        found = [model(input_ids=prompt.clamp_max(size - 1)).logits for prompt in prompts]
    return found, size


def _listed(adapters: Sequence[AdapterDir]) -> str:
    return ", ".join(str(adapter.path) for adapter in adapters)


def _described(trained: Collection[tuple[str | None, str | None]]) -> str:
    named = sorted(f"{name}@{revision}" if revision else str(name) for name, revision in trained if name is not None)
    if not named:
        return "names no base model" if len(trained) == 1 else "name no base model"
    return f"trained on {', '.join(named)}" + ("" if len(named) == len(trained) else " and on a model without a name")
