"""Outputs of the folded adapter, as PEFT loads it from its files, against the unfolded model."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loraover.checkpoint.checkpoint import Checkpoint
from loraover.checkpoint.unfolded_model import unfolded
from loraover.common.errors import ConfigError, DataError
from loraover.models.load import ModelSource, load_config, load_model, load_tokenizer
from loraover.reporting.reporter import SILENT, Reporter
from loraover_export.fold.certificate import Deviation, OutputCertificate
from loraover_export.fold.deviation import RunningDeviation
from loraover_export.fold.twins import FOLDED, FoldedAndTwins
from loraover_export.numerics.delta import other_tensors

TWINS = 3
MAX_TOKENS = 256
LOGITS_AT_ONCE = 2**24
"""Logits of a piece of a prompt: 64 MiB in float32, and at most three such pieces are held."""

BUILT_IN_PROMPTS = (
    "The train leaves at nine and arrives at noon, so the journey takes three hours.",
    "A farmer has 17 sheep and buys 25 more. How many sheep are there now?",
    "def is_even(number):\n    return number % 2 == 0\n",
    "Water boils at a lower temperature on a mountain because the air pressure is lower.",
    "Dear all,\nplease find the minutes of Tuesday's meeting below.",
    "Question: which planet is closest to the sun?\nAnswer: Mercury.",
    "Der Zug fährt um neun Uhr ab. Le train part à neuf heures.",
    "1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89",
)


@dataclass(frozen=True)
class Prompts:
    """Token ids to compare outputs on, each of shape (1, tokens), and where they come from, in words."""

    batches: tuple[Tensor, ...]
    source: str


def check_outputs(
    checkpoint: Checkpoint,
    folded: Path,
    dtype: str,
    source: ModelSource,
    prompts_file: Path | None,
    report: Reporter = SILENT,
) -> OutputCertificate:
    """Run the unfolded model and the folded adapter in float32 on the same prompts, and compare every logit.

    The unfolded model applies cores to activations and never forms A or B. The noise floor is the largest deviation
    between *twins* of the folded adapter, measured in the same run. A twin has each element of the exact matrices
    rounded at random to one of its two neighbours in `dtype`, and its rank dimension permuted, so that sums run in
    another order. Twins are compared with one another only, so that an error of the fold does not count as noise.

    All models share the base weights and are run on one piece of one prompt after another, so the memory depends
    neither on the number of prompts nor, where a model can leave logits out, on their length.

    Args:
        checkpoint: the checkpoint that was folded.
        folded: folder of the written adapter.
        dtype: data type that it is stored in.
        source: the base model.
        prompts_file: text file with one prompt a line; None means a built-in set.
        report: receiver of progress.

    Raises:
        CheckpointError: the base model is not the one that was trained.
        DataError: no usable prompt in the file.
    """
    report.line(f"loading the base model from {source.origin}")
    base = load_model(source, dtype="fp32", task_type=_task_type(checkpoint))
    with unfolded(_sharing_weights(base), checkpoint) as reference:
        prompts = find_prompts(source, prompts_file)
        report.line(f"loading the folded adapter with PEFT, and {TWINS} random roundings of it for the noise floor")
        others = other_tensors(checkpoint.adapter)
        adapters = FoldedAndTwins(_sharing_weights(base, but=others), checkpoint, folded, dtype, TWINS)
        report.line(f"running the unfolded model, the folded adapter and the roundings on {prompts.source}")
        compared = _Compared()
        for ids in prompts.batches:
            for positions in _pieces(base, ids):
                compared.add(base, reference, adapters, ids, positions)
    return OutputCertificate(
        base=source.origin,
        compute_dtype="fp32",
        prompts=len(prompts.batches),
        tokens=sum(batch.numel() for batch in prompts.batches),
        prompt_source=prompts.source,
        error=compared.error.result(),
        noise=_largest([noise.result() for noise in compared.noises]),
        twins=TWINS,
        adapter_effect=compared.effect.result().max_logit,
    )


class _Compared:
    """Deviations for the certificate, over all pieces so far."""

    def __init__(self) -> None:
        self.effect, self.error = RunningDeviation(), RunningDeviation()
        self.noises = [RunningDeviation() for _ in combinations(range(TWINS), 2)]

    def add(self, base: Any, unfolded: Any, adapters: FoldedAndTwins, ids: Tensor, positions: Tensor | None) -> None:
        """Run every model on one piece; the twins' logits are the most that is held at once."""
        reference = _logits(unfolded, ids, positions)
        self.effect.add(reference, _logits(base, ids, positions))
        self.error.add(reference, _logits(adapters.active(FOLDED), ids, positions))
        del reference
        twins = [_logits(adapters.active(name), ids, positions) for name in adapters.twins]
        for noise, (one, other) in zip(self.noises, combinations(twins, 2), strict=True):
            noise.add(one, other)


def _largest(noises: list[Deviation]) -> Deviation:
    return Deviation(
        **{name: max(getattr(n, name) for n in noises) for name in ("max_logit", "mean_logit", "max_kl", "mean_kl")},
        top1_agreement=min(n.top1_agreement for n in noises),
    )


def _sharing_weights(model: nn.Module, but: Iterable[str] = ()) -> Any:
    """Return a second model on the same tensors, but with copies of the named ones, of which it may lack some."""
    tensors = dict(chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)))
    copied = {id(tensors[name]) for name in but if name in tensors}
    return copy.deepcopy(model, {id(t): t for t in tensors.values() if id(t) not in copied})


def _task_type(checkpoint: Checkpoint) -> str | None:
    task = (checkpoint.adapter.config.model_extra or {}).get("task_type")
    return task if isinstance(task, str) else None


def find_prompts(source: ModelSource, file: Path | None) -> Prompts:
    """Return the prompts of a file or the built-in ones, as tokens; random tokens if the model has no tokenizer.

    Args:
        source: the base model.
        file: UTF-8 text file with one prompt a line; None means the built-in prompts.

    Raises:
        DataError: no usable prompt in the file.
        ConfigError: a file, and a model without a tokenizer.
    """
    lines, name = list(BUILT_IN_PROMPTS), "the built-in prompts"
    if file is not None:
        try:
            lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file}: cannot be read as UTF-8 text: {error}.") from error
        name = f"the prompts of {file.name}"
    try:
        tokenizer = load_tokenizer(source)
        encoded = [tokenizer(line, return_tensors="pt").input_ids[:, :MAX_TOKENS] for line in lines]
    except ConfigError:
        if file is not None:
            raise
        encoded = []
    fewest = 1 if file is not None else 2  # transformers makes tokenizers without a vocabulary for some classes
    batches = tuple(ids for ids in encoded if ids.numel() >= fewest)
    if batches:
        return Prompts(batches, f"{len(batches)} of {name}")
    if file is not None:
        raise DataError(f"{file}: holds no prompt; expected one a line.")
    vocabulary = load_config(source).get_text_config().vocab_size
    ids = torch.randint(vocabulary, (8, 32), generator=torch.Generator().manual_seed(0))
    source_name = "8 random token sequences (the base model has no tokenizer)"
    return Prompts(tuple(ids[i : i + 1] for i in range(len(ids))), source_name)


def _pieces(model: Any, ids: Tensor) -> Iterator[Tensor | None]:
    """Positions of a prompt whose logits are compared together, at most LOGITS_AT_ONCE elements; None means all.

    Each piece costs a forward pass over the entire prompt. Models that cannot leave logits out take all at once.
    """
    at_once = max(1, LOGITS_AT_ONCE // model.config.get_text_config().vocab_size)
    if ids.shape[1] <= at_once or "logits_to_keep" not in inspect.signature(model.forward).parameters:
        yield None
        return
    yield from torch.split(torch.arange(ids.shape[1]), at_once)


@torch.no_grad()
def _logits(model: Any, ids: Tensor, positions: Tensor | None) -> Tensor:
    """Logits of one prompt, (positions, vocabulary); prompts run one at a time, so that nothing is padded."""
    extra: dict[str, Tensor] = {}
    if model.config.is_encoder_decoder:
        extra["decoder_input_ids"] = ids
    if positions is not None:
        extra["logits_to_keep"] = positions
    logits: Tensor = model(input_ids=ids, **extra).logits
    return logits.reshape(-1, logits.shape[-1])
