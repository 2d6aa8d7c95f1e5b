"""The conversion of an adapter of any kind into a plain LoRA: read, compute, write and certify."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from loraover.adapters.base_weights import open_base
from loraover.adapters.convert.effect import compare_outputs
from loraover.adapters.convert.kind import carried_tensors, read_method
from loraover.adapters.convert.methods.base import AnyMethod, LowRank, Place, rounding
from loraover.adapters.convert.methods.lora import stacks_of
from loraover.adapters.convert.prefix import mend_prefix, part_below
from loraover.adapters.convert.request import ConvertRequest
from loraover.adapters.convert.source import Adapter, AdapterLayout, open_adapter
from loraover.adapters.numerics.delta import Delta
from loraover.adapters.numerics.low_rank import SingularValues, decompose, dense_svd, product_norm
from loraover.adapters.prompts import read_prompts, tokens_at_once
from loraover.adapters.uniform.certificate import LoraCertificate, OutputsOfConversion
from loraover.adapters.uniform.request_fields import MAX_LORA_RANKS, max_lora_rank
from loraover.adapters.uniform.write_lora import Approximation, LoraOutput, write_lora
from loraover.checkpoint.base_model import resolve_base
from loraover.checkpoint.carried_files import keep_chat_template, keep_reference
from loraover.checkpoint.expert_stacks import PRESENT_LAYOUT, expert_paths, find_expert_weights
from loraover.checkpoint.files import CONFIG_FILE
from loraover.checkpoint.peft_adapter import KEY_PREFIX
from loraover.checkpoint.target_modules import check_complete, check_named, check_saved, unnamed_modules
from loraover.common.errors import ExportError
from loraover.common.request import as_written
from loraover.common.strict_json import StrictModel
from loraover.models.device import COMPUTE_DTYPES, choose_compute
from loraover.sources.verb import verb


class VllmFit(StrictModel):
    """Whether vLLM takes adapters of a rank; no other engine names a largest rank."""

    takes: bool = Field(description="Whether vLLM takes the rank")
    max_lora_rank: int | None = Field(description="Value of --max-lora-rank to start vLLM with; None if none suffices")
    largest: int = Field(default=MAX_LORA_RANKS[-1], description="Largest rank that vLLM takes")

    @classmethod
    def of(cls, rank: int) -> VllmFit:
        """Return whether vLLM takes adapters of a rank."""
        return cls(takes=max_lora_rank(rank) is not None, max_lora_rank=max_lora_rank(rank))

    def in_words(self) -> str:
        """Return which engines take the rank, and the rank that fits all of them."""
        if self.takes:
            return f"vLLM takes it with --max-lora-rank {self.max_lora_rank}; no other engine names a largest rank"
        option = as_written("approximate_to_rank")
        return f"only vLLM limits the rank, to {self.largest}, so {option} {self.largest} would fit"


class ConvertReport(StrictModel):
    """Ranks, errors and certificate of one conversion."""

    method: str = Field(description="Kind of the source, as PEFT names it")
    exact_rank: int = Field(description="Largest rank of any module's exact delta_W")
    truncated: bool = Field(description="Whether a smaller rank than the exact one was asked for")
    vllm: VllmFit = Field(description="Whether vLLM takes the written rank")
    engines: str = Field(description="Which engines take the exact rank, in words")
    certificate: LoraCertificate = Field(description="Verdict and errors of the written adapter")

    @property
    def outputs(self) -> OutputsOfConversion | None:
        """Comparison of logits; None if it was not asked for, or a matrix failed its check."""
        return self.certificate.outputs

    @property
    def passed(self) -> bool:
        """Whether the certificate's verdict is "passed"."""
        return self.certificate.passed

    @property
    def exit_code(self) -> int:
        """Exit code of the command."""
        return self.certificate.exit_code


STARTED = (
    "PEFT computes the start of this adapter from the base weights, in the type in which it loads them. This LoRA is "
    "for weights in {dtype}, the type of the base model's files. If PEFT loads the weights in another type, its own "
    "answers change by about the rounding of the weights; for such answers, name a copy of the base model in the other "
    "type with {model}."
)
TIED = (
    "{modules} share one weight, and each has its own LoRA: engines that apply LoRAs without merging are right, but "
    "PEFT's merge_and_unload would add all these LoRAs to the shared weight"
)
"""Notes for readers of a written adapter."""


@verb(ConvertRequest)
def convert_adapter(request: ConvertRequest) -> ConvertReport:
    """Write an adapter of any kind that PEFT trains as a plain LoRA, which every engine reads.

    The conversion is exact where delta_W has a finite rank, and computed from the adapter's factors in float64.
    Otherwise, or with a smaller `rank`, it is the best approximation of that rank, with its error in the certificate.

    Returns:
        The ranks and the certificate: with the verdict "failed", nothing was written; "inconclusive" means that the
        adapter, which was written, changes logits too little for `check_error` to tell it from one that does nothing.

    Raises:
        ConfigError, DataError: Arguments, a base model or prompts that cannot be used.
        CheckpointError: An adapter that cannot be trusted, or of a kind that is not known.
        ExportError: An adapter that no LoRA can stand for, or `check_error` of one whose files PEFT would misread.
        FoldError, OutputError: An element beyond the range of `dtype`, or an output that cannot be written.
    """
    method, layout = read_method(request.source)
    base = resolve_base([layout], request.model, option=request.named("model"), say=request.report.line)
    ranks: dict[str, int] = {}
    with open_base(base) as weights, ExitStack() as files:
        layout, notes = mend_prefix(layout, weights)
        adapter = files.enter_context(open_adapter(layout, weights))
        _check_modules(method, adapter)
        start_dtype = None
        if method.starts_in_stored:
            name = str(adapter.module(next(iter(layout.modules))).stored_weight().dtype)
            start_dtype = next(short for short, long in COMPUTE_DTYPES.items() if f"torch.{long}" == name)
        if start_dtype not in (None, "fp32", "fp64"):
            notes.append(STARTED.format(dtype=start_dtype, model=as_written("model")))
        compare = _comparison(request, method, adapter, start_dtype) if request.check_error else None

        def check(draft: Path, certificate: LoraCertificate) -> LoraCertificate:
            keep_chat_template(request.source, draft)
            is_exact = request.approximate_to_rank is None or max(ranks.values()) <= request.approximate_to_rank
            if is_exact:  # an approximation is another adapter
                keep_reference(request.source, draft, request.report.line)
            if compare is None:
                return certificate
            outputs = compare(draft, is_exact=is_exact)
            found = {"outputs": outputs, "output_bound": outputs.bound}
            return certificate.model_copy(update=found | {"verdict": outputs.verdict or certificate.verdict})

        others, modules = carried_tensors(adapter)
        if others:
            notes.append(f"{', '.join(modules)} of modules_to_save was taken over as it is: {len(others)} tensors")
        places = list(method.places(adapter))
        if len(tied := [place.path for place in places if place.path in weights.tied]) > 1:
            notes.append(TIED.format(modules=", ".join(tied)))
        target = _target(request, adapter, others=others, modules_to_save=modules or None, notes=notes)
        work = (partial(approximate, place, layout, request.approximate_to_rank, ranks) for place in places)
        certificate = write_lora(work, len(places), target, request.report, check)
    exact = max(ranks.values())
    return ConvertReport(
        method=layout.config.peft_type,
        exact_rank=exact,
        truncated=exact > certificate.rank,
        vllm=VllmFit.of(certificate.rank),
        engines=VllmFit.of(exact).in_words(),
        certificate=certificate,
    )


def _target(request: ConvertRequest, adapter: Adapter[Any], **more: Any) -> LoraOutput:
    """Return the destination of a conversion, which names the base model that the adapter names, where it may."""
    config, base, rank = adapter.config, adapter.base.source, request.approximate_to_rank
    is_named = config.base_model_name_or_path is not None and base.moved is None
    return LoraOutput(
        request.output,
        request.command(),
        f"Plain LoRA from a {config.peft_type} adapter",
        asked={} if rank is None else {"rank": str(rank)},
        sources=[request.source],
        base_model=config.base_model_name_or_path if is_named else base.name,
        revision=config.revision if is_named else base.revision,
        task_type=config.task_type,
        dtype=request.dtype,
        force=request.force,
        stacks=stacks_of(adapter),
        **more,
    )


def _check_modules(method: AnyMethod, adapter: Adapter[Any]) -> None:
    """Refuse a file that lacks modules which the configuration names, or that has modules which it does not name."""
    layout, model = adapter.layout, adapter.base.model
    file, named = layout.path / CONFIG_FILE, method.named(adapter)
    stored = [layout.stored.get(path, path) for path in named]
    check_named(file, stored if unnamed_modules(file, stored) is None else named)
    parameters = (name for name, _ in model.named_parameters(remove_duplicate=False))
    modules, experts, names = (
        part_below(layout.below, found) for found in (adapter.base.modules, find_expert_weights(model), parameters)
    )
    adapted = dict.fromkeys([*layout.modules, *sorted(expert_paths(stacks_of(adapter)))])
    model_type = (model.config.get_text_config() if layout.below else model.config).model_type
    check_complete(file, adapted, modules, experts, model_type)
    check_saved(file, {key.removeprefix(KEY_PREFIX) for key in layout.others}, names)


def _comparison(
    request: ConvertRequest,
    method: AnyMethod,
    adapter: Adapter[Any],
    start_dtype: str | None,
) -> Callable[..., OutputsOfConversion]:
    """Read the prompts, and return a function of `is_exact` that compares a written adapter with the source."""
    base = adapter.base.source
    flipped = next((stack for stack in stacks_of(adapter) if stack.is_flipped), None)
    if flipped is not None:
        raise ExportError(
            f"{adapter.layout.tensors_path}: {flipped.path} has A and B as PEFT before {PRESENT_LAYOUT} saved them. "
            "The installed PEFT reads them in its own layout, so the logits of the source cannot be computed. Leave "
            f"out {request.named('check_error')}; the certificate does not need it."
        )
    if adapter.layout.keys:
        raise ExportError(
            f"{adapter.layout.tensors_path}: its keys are not those that PEFT reads on {base.name}, so the logits of "
            f"the source cannot be computed. Leave out {request.named('check_error')}; the certificate does not need "
            "it."
        )
    place, _ = choose_compute(request.device, request.compute_dtype)
    config, layout = adapter.base.model.config, adapter.layout
    at_once = tokens_at_once(config, place, layout.config.task_type)
    prompts = read_prompts(base, request.prompts, at_once=at_once, tokens=method.trained_tokens(layout.config))
    return partial(compare_outputs, request, adapter, prompts, start_dtype)


class FullRankError(ExportError):
    """An adapter that changes a weight by a matrix of full rank, where the exact LoRA was asked for."""


def approximate(place: Place, layout: AdapterLayout[Any], rank: int | None, ranks: dict[str, int]) -> Approximation:
    """Return the factors to write for a module: exact where `rank` allows it, else the best of that rank."""
    found = place.delta()
    factors = (found.b, found.a) if isinstance(found, LowRank) else (found.value,)
    if not all(bool(torch.isfinite(factor).all()) for factor in factors):
        raise ExportError(f"{layout.tensors_path}: {place.path}: delta_W is not finite; train the adapter again.")
    if isinstance(found, LowRank):
        b, a = found.b, found.a
        noise = found.left_out + rounding(len(b), a.shape[1], len(a)) * float(b.norm()) * float(a.norm())
        if len(a) > min(len(b), a.shape[1]):
            b, a = _square(b @ a)
        norm = product_norm(b, a)
        exact = ranks[place.path] = len(a) if norm else 0
        if rank is not None and exact > rank:
            return _truncated(place, decompose(b, a), rank, noise)
        return _exact(place, b, a, norm, noise)
    norm = float(found.value.norm())
    exact = ranks[place.path] = min(found.value.shape) if norm else 0
    if rank is None and exact:
        raise FullRankError(
            f"{layout.tensors_path}: {place.path}: this {layout.config.peft_type} adapter changes the weight by a "
            f"matrix of full rank, {exact}. Ask for its best approximation of a rank R with "
            f"{ConvertRequest.named('approximate_to_rank')} R; its error is shown. With rank {exact}, "
            f"{VllmFit.of(exact).in_words()}."
        )
    noise = rounding(*found.value.shape) * found.size
    if rank is not None and exact > rank:
        return _truncated(place, dense_svd(found.value), rank, noise)
    return _exact(place, *_square(found.value), norm, noise)


def _exact(place: Place, b: Tensor, a: Tensor, norm: float, noise: float) -> Approximation:
    """Return factors as they are, or of rank 0 if the norm of their product is zero."""
    kept = slice(None) if norm else slice(0)
    delta = Delta.of_factors(place.path, place.embedding, b[:, kept], a[kept])
    return Approximation(delta, norm, arithmetic_bound=noise)


def _square(value: Tensor) -> tuple[Tensor, Tensor]:
    """Return B and A of the smallest rank that any matrix of this shape needs, one of them the identity."""
    m, n = value.shape
    eye = torch.eye(min(m, n), dtype=value.dtype)
    return (value, eye) if n <= m else (eye, value)


def _truncated(place: Place, svd: SingularValues, rank: int, noise: float) -> Approximation:
    kept = svd.truncate(rank)
    return Approximation(kept.delta(place.path, place.embedding), svd.norm, kept.error, kept.bound + noise)
