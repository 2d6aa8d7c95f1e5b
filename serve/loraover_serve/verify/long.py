"""Long questions with one beginning, and what models answer on keys and values that another model has left of it.

Servers keep keys and values of prompts, and meet them again by the name of an adapter, by its path, or by the tokens
alone. Weights that change under a name then continue a prompt that other weights have read.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from loraover.checkpoint.carried_files import adapter_digest
from loraover.checkpoint.peft_adapter import AdapterDir
from loraover.common.errors import ConfigError
from loraover.models.load import ModelSource, load_config
from loraover_serve.engines.answers import Expected
from loraover_serve.engines.endpoint import as_chats
from loraover_serve.engines.torch import common_beginning, tree_rows
from loraover_serve.judge.limits import ADAPTER, BASE
from loraover_serve.judge.models import Question
from loraover_serve.judge.names import STALE, STALE_OF_ADAPTER, STALE_OF_BASE, STALE_OF_EARLIER, STALE_OF_LATER
from loraover_serve.verify.pack import KEPT_OF_FAULTS, choose_places, pack_places, pack_question, pack_variant, texts_of
from loraover_serve.verify.pytorch import likeliest
from loraover_serve.verify.request import RecordRequest
from loraover_serve.verify.right_models import answered, end_tokens
from loraover_serve.verify.variants import Variants, adding, read_lora

PREFIX = 4 * 128 + 8
"""Tokens that all long questions begin with: four blocks of the largest usual size, and a few that fill none."""
MOST_S = 60.0
"""Seconds that PyTorch may take for long questions that nobody asked for."""
SPARE = 8  # tokens more, since a text that goes on may have others at its end
TAILS = 8  # questions
EARLIER = "earlier"

Lines = Sequence[str]


class StaleModel(NamedTuple):
    """A model that continues a beginning which another model has read.

    Args:
        of: Arm under whose name it answers.
        detail: The fault in words.
        model: Its logprobs.
    """

    of: str
    fault: str
    detail: str
    model: Expected


def check_earlier(request: RecordRequest, adapter: AdapterDir, earlier: AdapterDir) -> None:
    """Check that an earlier version has other weights."""
    if adapter_digest(earlier.path) == adapter_digest(adapter.path):
        raise ConfigError(
            f"{request.named('earlier')}: {earlier.path} has the weights of {adapter.path}, expected those of an "
            "earlier version, such as a checkpoint before the last."
        )


def wanted_long(request: RecordRequest, base: ModelSource, tokenizer: Any, lines: Lines) -> Any:
    """Long questions, as `long_prompts` returns them; None if they are left out."""
    if request.long is False:
        return None
    try:
        return long_prompts(request, base, tokenizer, lines)
    except ConfigError as error:
        if request.long:
            raise
        request.report.line(f"leaving out long questions: {error}")
        return None


def long_prompts(request: RecordRequest, base: ModelSource, tokenizer: Any, lines: Lines) -> tuple[Any, Lines, int]:
    """Prompts with one beginning, their messages if they are chats, and the number of tokens that all begin with.

    The texts are the same for every adapter, so that a server which has read them for one version meets them again.

    Raises:
        ConfigError: A base model whose context is shorter.
    """
    text, tails = " ".join(lines), [f" {line}" for line in lines[:TAILS]]
    start: list[int] = []
    while len(start) < PREFIX + SPARE:
        start += tokenizer(text, add_special_tokens=not start).input_ids
    ends = (tokenizer(tail, add_special_tokens=False).input_ids for tail in tails)
    prompts, messages = as_chats(tokenizer, [(*start[: PREFIX + SPARE], *end) for end in ends])
    longest = max(map(len, prompts)) + request.new_tokens
    limit = getattr(load_config(base).get_text_config(), "max_position_embeddings", None) or longest
    if longest > limit:
        raise ConfigError(
            f"{request.named('long')}: the long questions have {longest} tokens with their answers, and {base.name} "
            f"takes {limit}; its prompts fill too few blocks of a server's cache. Record without long questions."
        )
    return prompts, messages, common_beginning(prompts)


def long_passes(asked: Any, new_tokens: int, versions: int, prompts: Sequence[Sequence[int]]) -> float:
    """Work of `record_long`, in passes of the base model over one question.

    Args:
        asked: Prompts, messages and number of shared tokens, as `long_prompts` returns them.
        new_tokens: Number of tokens of an answer.
        versions: Number of versions of the adapter.
        prompts: The short questions.
    """
    long: Sequence[Sequence[int]] = asked[0]
    shared: int = asked[2]
    readers, tails = 1 + versions, [len(prompt) - shared + new_tokens for prompt in long]
    runs = 3 * readers - 3  # models on their own keys and values, and on others'
    read = fmean(len(prompt) + new_tokens for prompt in prompts)
    return (readers * shared + sum(tails) * (new_tokens + runs)) / read


def is_long_left_out(request: RecordRequest, *, is_streamed: bool, seconds: float) -> bool:
    """Whether long questions that nobody asked for would take too long, which is reported."""
    if request.long is not None or not (is_streamed or seconds > MOST_S):
        return False
    why = "the base model is read from its files each time" if is_streamed else f"they would take {seconds:.0f} s"
    request.report.line(f"leaving out long questions, since {why}; {request.named('long')} records them")
    return True


def record_caches(
    request: RecordRequest,
    adapted: Any,
    variants: Variants,
    earlier: AdapterDir | None,
    asked: Any,
    tokenizer: Any,
) -> dict[str, Any]:
    """The section `caches` by its name; empty if the model keeps no keys and values, and nobody asked for it."""
    say = request.report.line
    say(f"running both models on {len(asked[0])} long questions, and on keys and values of one another")
    try:
        recorded = record_long(request, adapted, variants, earlier, asked)
    except ConfigError as error:
        if request.long:
            raise
        say(f"leaving out long questions: {error}")
        return {}
    return {"caches": packed_long(recorded, tokenizer)}


def record_long(
    request: RecordRequest, adapted: Any, variants: Variants, earlier: AdapterDir | None, asked: Any
) -> tuple[list[Question], Expected, Expected, list[StaleModel]]:
    """The long questions, the right models' logprobs, and those on keys and values of other models.

    Args:
        adapted: The adapted model, as `reference_model` makes it.
        variants: The base model, which stays as it is.
        earlier: Earlier version of the adapter; None if none is named.
        asked: Prompts, messages and number of shared tokens, as `long_prompts` returns them.
    """
    prompts, messages, shared = asked
    plain = variants.model
    deltas = {} if earlier is None else read_lora(earlier)

    @contextmanager
    def running(arm: str) -> Iterator[Any]:
        if arm == EARLIER and earlier is not None:
            with adding(plain, deltas, earlier, with_others=True):
                yield plain
        else:
            yield adapted if arm == ADAPTER else plain

    caches = {}
    for arm in (BASE, ADAPTER) if earlier is None else (BASE, ADAPTER, EARLIER):
        with running(arm) as model:
            caches[arm] = _read(model, prompts[0][:shared])
    continued = partial(_continued, as_tree=variants.as_tree and all(map(_keeps_all, caches.values())))
    tails, logits = [list(prompt[shared:]) for prompt in prompts], list[NDArray[np.float32]]()
    for kept in range(1, request.new_tokens + 1):
        logits = [*continued(adapted, caches[ADAPTER], tails, kept)]
        for tail, found in zip(tails, logits, strict=True):
            tail.append(int(found[-1].argmax()))
    answers = (tuple(tail[len(prompt) - shared :]) for prompt, tail in zip(prompts, tails, strict=True))
    questions = [*answered(prompts, messages, answers, end_tokens(plain.config))]
    at = [question.answered for question in questions]
    right = Expected.of(at, (found[: len(mine)] for found, mine in zip(logits, at, strict=True)))

    def run(arm: str, of: str) -> Expected:
        read = [question.tokens[shared:] for question in questions]
        with running(arm) as model:
            return Expected.of(at, continued(model, caches[of], read, max(map(len, at))))

    def stale(arm: str, of: str, fault: str, detail: str) -> StaleModel:
        return StaleModel(BASE if arm == BASE else ADAPTER, fault, detail, run(arm, of))

    name = request.adapter.resolve().name
    on_others = [
        stale(ADAPTER, BASE, STALE_OF_BASE, f"{name} continues what the base model has read"),
        stale(BASE, ADAPTER, STALE_OF_ADAPTER, f"the base model continues what {name} has read"),
    ]
    if earlier is not None:
        before = f"an earlier version ({earlier.path.resolve().name})"
        on_others += [
            stale(ADAPTER, EARLIER, STALE_OF_EARLIER, f"{name} continues what {before} has read"),
            stale(EARLIER, EARLIER, STALE, f"{before} is served"),
            stale(EARLIER, ADAPTER, STALE_OF_LATER, f"{before} continues what {name} has read"),
        ]
    return questions, run(BASE, BASE), right, on_others


def packed_long(
    recorded: tuple[list[Question], Expected, Expected, list[StaleModel]],
    tokenizer: Any,
) -> dict[str, Any]:
    """The section `caches` of a reference; see docs/formats.md."""
    questions, base, adapter, found = recorded
    at = [(index, position) for index, question in enumerate(questions) for position in question.answered]
    faulty = dict(enumerate({i for s in found for i in likeliest(s.model.at(*each), KEPT_OF_FAULTS)} for each in at))
    places, right = choose_places(questions, (base, adapter), faulty), {BASE: base, ADAPTER: adapter}
    return {
        "questions": [pack_question(tokenizer, question) for question in questions],
        "positions": pack_places(places, base, adapter),
        "texts": texts_of(tokenizer, [i for place in places for i in place.ids.tolist()]),
        "variants": [
            {"of": each.of, "fault": each.fault, "detail": each.detail, "factor": None}
            | pack_variant(places, each.model, right[each.of], len(questions))
            for each in found
        ],
    }


@torch.inference_mode()
def _continued(
    model: Any, cache: Any, tails: Sequence[Sequence[int]], kept: int, *, as_tree: bool
) -> Iterator[NDArray[np.float32]]:
    """Run a model on tails behind keys and values, which stay as they are; yields the logits of each one's last tokens.

    All are run at once: as a tree, or with other tokens behind the shorter ones, which no token before them sees.
    """
    if as_tree:
        yield from (found[0] for found in tree_rows(model, tails, [kept] * len(tails), cache=cache))
        return
    longest = max(map(len, tails))
    ids = torch.tensor([[*tail, *[0] * (longest - len(tail))] for tail in tails], device=model.device)
    copies = copy.deepcopy(cache)
    copies.batch_repeat_interleave(len(tails))
    most = longest - min(len(tail) - kept for tail in tails)
    logits = model(input_ids=ids, past_key_values=copies, use_cache=True, logits_to_keep=most).logits
    for tail, found in zip(tails, logits, strict=True):
        last = most - (longest - len(tail))
        yield found[last - kept : last].float().cpu().numpy()


def _keeps_all(cache: Any) -> bool:
    """Whether a cache holds the keys and values of all tokens, and of some not only those of a window."""
    return not any(getattr(layer, "is_sliding", True) for layer in getattr(cache, "layers", [None]))


@torch.inference_mode()
def _read(model: Any, tokens: Sequence[int]) -> Any:
    """Keys and values that a model has after tokens.

    Raises:
        ConfigError: A model that has none.
    """
    ids = torch.tensor([list(tokens)], device=model.device)
    found = getattr(model(input_ids=ids, use_cache=True, logits_to_keep=1), "past_key_values", None)
    if found is None:
        raise ConfigError(
            f"long: {type(model).__name__} keeps no keys and values in PyTorch, expected a model with attention; "
            "record without long questions."
        )
    return found
