"""PyTorch in this process, one request after another: the base model, PEFT adapters, and the unfolded model.

PEFT gets an adapter's files as they are, as a script with transformers uses them.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import takewhile
from math import prod
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray

from loraover.checkpoint.checkpoint import read_checkpoint
from loraover.checkpoint.peft_adapter import read_adapter_dir
from loraover.models.load import load_model
from loraover.models.memory import Needs, memory_explained
from loraover.reference import unfolded
from loraover_serve.engines.base import LogitEngine, Sample, Setting, TimedEngine, TokenRequest, engine_errors
from loraover_serve.judge.limits import BASE

Switch = Callable[[], AbstractContextManager[Any]]
"""Returns a context manager that yields the model to run."""

LOGITS_AT_ONCE = 2**25
"""Logits that are held at once, 128 MiB of them in float32."""

TOKENS_AT_ONCE = 1024
"""Tokens that are run at once: with more, a processor's matrix products are no faster."""

TREE = 512
"""Most tokens of a tree: attention looks at all pairs of them."""


@final
class TorchEngine(LogitEngine, TimedEngine):
    """PyTorch with PEFT; arms share one copy of the base model where they can.

    Args:
        switches: Functions that select each arm's model, by the arm's name.
    """

    name = "torch"
    distributions = ("peft",)

    def __init__(self, switches: Mapping[str, Switch]) -> None:
        self.arms = tuple(switches)
        self._switches = dict(switches)

    @classmethod
    @contextmanager
    def start(cls, setting: Setting) -> Iterator[TorchEngine]:
        setting.request.report.line(f"loading PyTorch with PEFT to {setting.device}, {setting.compute_dtype}")
        load = partial(load_model, setting.base, dtype=setting.compute_dtype, device=setting.device)
        yield torch_engine(load, setting.adapters, setting.checkpoint)

    @classmethod
    @contextmanager
    def start_arms(cls, setting: Setting) -> Iterator[Sequence[TorchEngine]]:
        place = {"device": setting.device, "compute_dtype": setting.compute_dtype}
        with memory_explained("PyTorch", needs=partial(memory_needs, setting), **place), cls.start(setting) as engine:
            yield [engine]

    @torch.inference_mode()
    def logits(self, arm: str, sequences: Iterable[Sequence[int]]) -> Iterator[NDArray[np.float32]]:
        """Yield an arm's logits after each token of each sequence, of shape (tokens, vocabulary)."""
        with engine_errors(self.name), self._switches[arm]() as model:
            yield from model_logits(model, sequences)

    def generate(self, arm: str, prompts: Sequence[Sequence[int]], tokens: int) -> list[tuple[int, ...]]:
        return [
            one.token_ids for one in self.run(arm, 0, 0, [TokenRequest(tuple(prompt), tokens) for prompt in prompts])
        ]

    @torch.inference_mode()
    def run(self, arm: str, block: int, first: int, requests: Sequence[TokenRequest]) -> list[Sample]:
        with engine_errors(self.name), self._switches[arm]() as model:
            samples = []
            for index, request in enumerate(requests, first):
                ids = torch.tensor([request.prompt], device=model.device)
                cache: dict[str, Any] = {}
                chosen: list[int] = []
                times: list[float] = []
                logprobs: list[float] = []
                start = time.perf_counter()
                while len(chosen) < request.new_tokens:
                    output = model(input_ids=ids, use_cache=True, logits_to_keep=1, **cache)
                    cache = {"past_key_values": output.past_key_values}
                    scores = output.logits[0, -1].float()
                    chosen.append(int(scores.argmax()))
                    times.append(time.perf_counter())
                    logprobs.append(float(scores[chosen[-1]] - scores.logsumexp(-1)))
                    ids = torch.tensor([[chosen[-1]]], device=model.device)
                samples.append(Sample(arm, block, index, start, tuple(times), tuple(chosen), tuple(logprobs)))
        return samples


def torch_engine(load_base: Callable[[], Any], adapters: Mapping[str, Path], checkpoint: Path | None) -> TorchEngine:
    """Load the base model, every adapter with PEFT, and the unfolded model of a checkpoint.

    With a checkpoint `load_base` is called twice, because PEFT changes the model that it gets.

    Raises:
        EngineError: An adapter that PEFT refuses.
    """
    from peft import PeftModel

    first, *others = adapters.items()
    with engine_errors(TorchEngine.name):
        plain = load_base()
        on = str(plain.device)
        model = PeftModel.from_pretrained(plain, str(first[1]), adapter_name=first[0], torch_device=on)
        for arm, path in others:
            model.load_adapter(str(path), adapter_name=arm, torch_device=on)
        model.eval()

    @contextmanager
    def base() -> Iterator[Any]:
        with model.disable_adapter():
            yield model

    def adapted(arm: str) -> Switch:
        @contextmanager
        def switch() -> Iterator[Any]:
            model.set_adapter(arm)
            yield model

        return switch

    switches: dict[str, Switch] = {BASE: base} | {arm: adapted(arm) for arm in adapters}
    if checkpoint is not None:
        separate, source = load_base(), read_checkpoint(checkpoint)
        switches["unfolded"] = lambda: unfolded(separate, source, delta_dtype=torch.float32)  # as in training
    return TorchEngine(switches)


def memory_needs(setting: Setting) -> Needs:
    """Estimate what PyTorch needs for all arms; the unfolded model is a copy of the base model."""
    shapes = (read_adapter_dir(path).shapes for path in setting.adapters.values())
    adapters = sum(prod(shape) for found in shapes for shape in found.values())
    copies = 1 if setting.checkpoint is None else 2
    return Needs.of_model(setting.base, adapters=adapters, tokens=setting.longest, copies=copies)


def model_logits(
    model: Any, sequences: Iterable[Sequence[int]], *, last: int | None = None
) -> Iterator[NDArray[np.float32]]:
    """Yield a causal model's logits after the last tokens of each sequence, of shape (last or all tokens, vocabulary).

    Several sequences are run at once, with other tokens behind the shorter ones, which no token before them sees.

    Args:
        sequences: Token ids.
        last: Number of tokens after which logits are wanted; None means all.
    """
    for batch in _batches(sequences, _at_once(model)):
        longest = max(map(len, batch))
        padded = [[*tokens, *[tokens[-1]] * (longest - len(tokens))] for tokens in batch]
        firsts = [0 if last is None else max(0, len(tokens) - last) for tokens in batch]
        left_out = min(firsts)
        ids = torch.tensor(padded, device=model.device)
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=longest - left_out).logits
        for tokens, first, found in zip(batch, firsts, logits, strict=True):
            yield found[first - left_out : len(tokens) - left_out].float().cpu().numpy()


@torch.inference_mode()
def greedy_answers(model: Any, prompts: Sequence[Sequence[int]], tokens: int) -> list[tuple[int, ...]]:
    """Return a causal model's greedy answers, of so many tokens each.

    What all prompts begin with is read once. The rest of them is continued at once where it has about one length, the
    shorter ones behind other tokens, which none of theirs sees. A model that takes no such mask answers otherwise or
    fails: compare the answers with its logits.

    Args:
        model: The model.
        prompts: Token ids.
        tokens: Number of tokens of an answer.
    """
    shared = common_beginning(prompts)
    read = None
    if shared:
        begun = torch.tensor([prompts[0][:shared]], device=model.device)
        read = model(input_ids=begun, use_cache=True, logits_to_keep=1).past_key_values
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers = dict[int, tuple[int, ...]]()
    # each row holds keys and values of the whole prompt and its answer
    for batch in _batches([(*prompts[index], *[0] * tokens) for index in order], TOKENS_AT_ONCE):
        mine, order = order[: len(batch)], order[len(batch) :]
        found = _continued(model, read, [prompts[index][shared:] for index in mine], tokens)
        answers |= dict(zip(mine, found, strict=True))
    return [answers[index] for index in range(len(prompts))]


def _continued(model: Any, read: Any, tails: Sequence[Sequence[int]], tokens: int) -> list[tuple[int, ...]]:
    """Greedy answers to the rest of prompts, all at once, behind keys and values of their beginning, if it is read."""
    longest, cache = max(map(len, tails)), copy.deepcopy(read)
    if cache is not None:
        cache.batch_repeat_interleave(len(tails))
    ids = torch.tensor([[tail[0]] * (longest - len(tail)) + [*tail] for tail in tails], device=model.device)
    begun, before = [1] * (0 if read is None else read.get_seq_length()), [longest - len(tail) for tail in tails]
    sees = torch.tensor([[*begun, *[0] * left, *[1] * (longest - left)] for left in before], device=model.device)
    positions, answers = (sees.cumsum(-1) - 1).clamp_min(0)[:, len(begun) :], list[torch.Tensor]()
    while len(answers) < tokens:
        how: dict[str, Any] = {"attention_mask": sees, "position_ids": positions, "past_key_values": cache}
        output = model(input_ids=ids, use_cache=True, logits_to_keep=1, **how)
        cache = output.past_key_values
        answers.append(ids := output.logits[:, -1:].float().argmax(-1))
        sees, positions = torch.cat([sees, torch.ones_like(ids)], 1), positions[:, -1:] + 1
    return [tuple(answer) for answer in torch.cat(answers, 1).tolist()]


@torch.inference_mode()
def answers_without_cache(model: Any, prompts: Sequence[Sequence[int]], tokens: int) -> list[tuple[int, ...]]:
    """Return a causal model's greedy answers as `greedy_answers` does, each token from a pass over all before it."""
    sequences = [[*prompt] for prompt in prompts]
    for _ in range(tokens):
        for sequence, logits in zip(sequences, [*model_logits(model, sequences, last=1)], strict=True):
            sequence.append(int(logits[-1].argmax()))
    return [tuple(sequence[-tokens:]) for sequence in sequences]


def common_beginning(prompts: Sequence[Sequence[int]]) -> int:
    """Number of tokens with which all prompts begin, without the last token of any."""
    same = takewhile(lambda column: len(set(column)) == 1, zip(*prompts, strict=False))
    return min(sum(1 for _ in same), min(map(len, prompts)) - 1)


def tree_logits(model: Any, sequences: Sequence[Sequence[int]], lasts: Sequence[int]) -> Iterator[NDArray[np.float32]]:
    """Yield a causal model's logits as `tree_rows` does, without rows: (last tokens, vocabulary)."""
    return (found[0] for found in tree_rows(model, sequences, lasts))


def tree_rows(
    model: Any, sequences: Sequence[Sequence[int]], lasts: Sequence[int], rows: int = 1, *, cache: Any = None
) -> Iterator[NDArray[np.float32]]:
    """Yield a causal model's logits after the last tokens of each sequence, and run a common beginning only once.

    Several sequences are run as one, in which a token stands once behind the same tokens. Its position is its place in
    its own sequence, and it sees the tokens before it there. A model that mixes tokens otherwise than by attention, or
    takes no such mask, answers otherwise or fails: try it first.

    Args:
        model: The model.
        sequences: Token ids.
        lasts: Number of the last tokens of each sequence after which logits are wanted.
        rows: Number of equal rows of the input, which hooks of the model may change, and to which they may add.
        cache: Keys and values of tokens before all sequences, which stay as they are; None if there are none.

    Yields:
        Logits of shape (rows, last tokens, vocabulary), for each sequence.
    """
    read = 0 if cache is None else cache.get_seq_length()
    for batch in _tree_batches(sequences, min(TREE, _at_once(model))):
        indices: dict[tuple[int, int], int] = {}  # of a token, by that of the token before it
        paths = []
        for sequence in batch:
            path = [-1]
            for token in sequence:
                path.append(indices.setdefault((path[-1], token), len(indices)))
            paths.append(path[1:])
        sees = torch.eye(len(indices), dtype=torch.bool)
        for index, (before, _) in enumerate(indices):
            if before >= 0:
                sees[index] |= sees[before]
        kept = [path[-last:] for path, last in zip(paths, lasts, strict=False)]
        once = {index: at for at, index in enumerate(sorted({index for mine in kept for index in mine}))}
        lasts = lasts[len(batch) :]
        sees = torch.cat([torch.ones(len(sees), read, dtype=torch.bool), sees], 1)
        mask = torch.zeros(sees.shape, dtype=model.dtype).masked_fill(~sees, torch.finfo(model.dtype).min)
        behind = {} if cache is None else {"past_key_values": copy.deepcopy(cache)}
        logits = model(
            input_ids=torch.tensor([[token for _, token in indices]], device=model.device).repeat(rows, 1),
            position_ids=(sees.sum(-1) - 1)[None].to(model.device),
            attention_mask=mask[None, None].to(model.device),
            use_cache=cache is not None,
            logits_to_keep=torch.tensor([*once], device=model.device),
            **behind,
        ).logits
        found = logits.float().cpu().numpy()
        yield from (found[:, [once[index] for index in mine]] for mine in kept)


def tree_tokens(sequences: Iterable[Sequence[int]]) -> int:
    """Number of tokens of a tree of sequences."""
    return len({tuple(tokens[:length]) for tokens in sequences for length in range(1, len(tokens) + 1)})


def _tree_batches(sequences: Iterable[Sequence[int]], most: int) -> Iterator[list[Sequence[int]]]:
    """Yield sequences in groups that are trees of at most so many tokens, or one sequence."""
    batch: list[Sequence[int]] = []
    begun = set[tuple[int, ...]]()
    for tokens in sequences:
        mine = {tuple(tokens[:length]) for length in range(1, len(tokens) + 1)}
        if batch and len(begun | mine) > most:
            yield batch
            batch, begun = [], set()
        batch.append(tokens)
        begun |= mine
    if batch:
        yield batch


def _at_once(model: Any) -> int:
    """Number of tokens after which logits are held at once."""
    return int(LOGITS_AT_ONCE // model.config.get_text_config().vocab_size)


def _batches(sequences: Iterable[Sequence[int]], most: int) -> Iterator[list[Sequence[int]]]:
    """Yield sequences in groups that have at most so many tokens once they are padded, or one sequence."""
    batch: list[Sequence[int]] = []
    for tokens in sequences:
        if batch and (len(batch) + 1) * max(map(len, [*batch, tokens])) > most:
            yield batch
            batch = []
        batch.append(tokens)
    if batch:
        yield batch
