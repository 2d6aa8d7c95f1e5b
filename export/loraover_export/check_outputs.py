"""Outputs of the folded adapter, as PEFT loads it from its files, against the unfolded model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loraover.checkpoint import Checkpoint
from loraover.errors import CheckpointError, ConfigError, DataError
from loraover.exact import open_exact
from loraover.models import ModelSource, load_model, load_tokenizer
from loraover.sites import Site, find_sites
from loraover.unfolded import unfolded
from loraover_export.certificate import Deviation, OutputCertificate
from loraover_export.rounding import STORAGE_DTYPES, round_randomly

TWINS = 3
MAX_TOKENS = 256
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
    """Token ids to compare outputs on, each (1, tokens), and where they come from."""

    batches: tuple[Tensor, ...]
    source: str


def check_outputs(
    checkpoint: Checkpoint,
    folded: Path,
    dtype: str,
    source: ModelSource,
    prompts_file: Path | None,
    report: Callable[[str], None],
) -> OutputCertificate:
    """Run both models in float32 on the same prompts and compare every logit.

    The unfolded model applies cores to activations and never forms A or B. The noise floor is the largest deviation
    between twins of the folded adapter, measured in the same run: each element of the exact matrices rounded at
    random to one of its two neighbours in `dtype`, and the rank dimension permuted, so that sums run in another
    order. Twins are compared with one another only, so that what is wrong with the fold is no part of the noise.

    Args:
        folded: directory of the written adapter.
        dtype: what it is stored in.
        source: the base model.
        prompts_file: one prompt a line; absent: a built-in set.
        report: told what is going on.
    Raises:
        CheckpointError: the base model is not the one that was trained.
        DataError: no usable prompt in the file.
    """
    from peft import PeftModel

    report(f"loading the base model from {source.origin}")
    base = load_model(source, dtype="fp32", task_type=_task_type(checkpoint))
    with unfolded(base, checkpoint) as model:
        prompts = _prompts(source, base, prompts_file)
        report(f"running the unfolded model on {prompts.source}")
        reference = _logits(model, prompts)
    plain_logits = _logits(base, prompts)
    report("running the folded adapter, as PEFT loads it")
    model = PeftModel.from_pretrained(base, str(folded)).eval()
    error = _deviation(reference, _logits(model, prompts))
    twins = []
    for seed in range(TWINS):
        report(f"measuring the noise floor, twin {seed + 1} of {TWINS}")
        _write_twin(model, checkpoint, dtype, seed)
        twins.append(_logits(model, prompts))
    noises = [_deviation(one, other) for one, other in combinations(twins, 2)]
    noise = Deviation(
        **{name: max(getattr(n, name) for n in noises) for name in ("max_logit", "mean_logit", "max_kl", "mean_kl")},
        top1_agreement=min(n.top1_agreement for n in noises),
    )
    return OutputCertificate(
        base=source.origin,
        compute_dtype="fp32",
        prompts=len(prompts.batches),
        tokens=sum(batch.numel() for batch in prompts.batches),
        prompt_source=prompts.source,
        error=error,
        noise=noise,
        twins=TWINS,
        adapter_effect=_deviation(reference, plain_logits).max_logit,
    )


def _task_type(checkpoint: Checkpoint) -> str | None:
    task = (checkpoint.adapter.config.model_extra or {}).get("task_type")
    return task if isinstance(task, str) else None


def _prompts(source: ModelSource, base: Any, file: Path | None) -> Prompts:
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
    batches = tuple(ids for ids in encoded if ids.numel())
    if batches:
        return Prompts(batches, f"{len(batches)} of {name}")
    if file is not None:
        raise DataError(f"{file}: no prompt in it; expected one a line.")
    ids = torch.randint(base.config.vocab_size, (8, 32), generator=torch.Generator().manual_seed(0))
    source_name = "8 random token sequences (the base model has no tokenizer)"
    return Prompts(tuple(ids[i : i + 1] for i in range(len(ids))), source_name)


@torch.no_grad()
def _logits(model: Any, prompts: Prompts) -> list[Tensor]:
    """(tokens, vocabulary) per prompt; one prompt at a time, so that nothing is padded."""
    outputs = []
    for ids in prompts.batches:
        extra: Mapping[str, Tensor] = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        logits = model(input_ids=ids, **extra).logits
        outputs.append(logits.reshape(-1, logits.shape[-1]))
    return outputs


def _deviation(reference: list[Tensor], other: list[Tensor]) -> Deviation:
    errors, divergences, same = [], [], []
    for p, q in zip(reference, other, strict=True):
        errors.append((p.double() - q.double()).abs())
        log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        divergences.append((log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0))
        same.append(p.argmax(-1) == q.argmax(-1))
    error, divergence = torch.cat([e.flatten() for e in errors]), torch.cat(divergences)
    return Deviation(
        max_logit=float(error.max()),
        mean_logit=float(error.mean()),
        max_kl=float(divergence.max()),
        mean_kl=float(divergence.mean()),
        top1_agreement=float(torch.cat(same).double().mean()),
    )


@torch.no_grad()
def _write_twin(model: nn.Module, checkpoint: Checkpoint, dtype: str, seed: int) -> None:
    """Overwrite the loaded adapter with an equally good rounding of the same matrices."""
    generator = torch.Generator().manual_seed(seed)
    orders: dict[str, Tensor] = {}
    with open_exact(checkpoint) as source:
        for site in _lora_matrices(model):
            key = checkpoint.adapter.sites.get(site.path)
            if key is None:
                raise CheckpointError(f"{checkpoint.adapter.tensors_path}: holds no {site.path}, which PEFT has made.")
            exact = source.tensor(key).value
            rounded = round_randomly(exact, STORAGE_DTYPES[dtype], generator)
            rank_dim = 0 if site.matrix == "A" else 1
            order = orders.setdefault(site.module, torch.randperm(rounded.shape[rank_dim], generator=generator))
            site.parameter.copy_(rounded.index_select(rank_dim, order))


def _lora_matrices(model: nn.Module) -> Iterator[Site]:
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    yield from find_sites(model).values()
