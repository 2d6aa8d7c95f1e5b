"""The search for an adapter in merged weights: read both models' files, measure and judge every module, and report."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import chain

from loraover.adapters.convert.kind import named_base
from loraover.checkpoint.base_model import resolve_base
from loraover.common.atomic_output import publish_text
from loraover.common.errors import CheckpointError
from loraover.common.provenance import environment
from loraover.models.load import ModelSource, resolve_model
from loraover.reporting.html_page import check_new
from loraover.sources.verb import verb
from loraover_export.merged.beside import Beside
from loraover_export.merged.changes import AdapterChange, Changes, NamedChange, read_changes
from loraover_export.merged.gguf import GRIDS, GgufWeights, is_gguf, open_weights
from loraover_export.merged.matrices import FLOATS, TensorPiece, overlaps, rows_of
from loraover_export.merged.meter import Meter
from loraover_export.merged.report import (
    GOOD,
    OPEN,
    InspectMergeReport,
    ModuleStrength,
    ParameterState,
    sentence_of,
    to_page,
)
from loraover_export.merged.verdict import Judge, StoredModule, judged_together, on_this_base
from loraover_export.merged.weights import Weights
from loraover_export.requests import InspectMergeRequest

MAX_WORKERS = 10
"""Largest number of threads; more than there are processors would wait for one another."""


@verb(InspectMergeRequest)
def inspect_merge(request: InspectMergeRequest) -> InspectMergeReport:
    """Measure how much of an adapter's delta every merged weight holds, and compare everything else with the base.

    The merged model may have been written by any tool. Files are read once, some rows at a time, and nothing is loaded
    into a model; a plain LoRA needs no PyTorch.

    Returns:
        The verdict for every module and for the whole model, with the strength of each module.

    Raises:
        ConfigError: A base model or a merged model that cannot be read.
        CheckpointError: An adapter that cannot be trusted or that belongs to another base model, or weights that are
            not finite.
        ExportError: An adapter that changes more than weights, or needs data that its files do not hold.
    """
    if request.html is not None:
        check_new(request.html, ".html")
    named = NamedChange(request.adapter, named_base(request.adapter))
    places: list[ModelSource | str] = []
    for name in (request.model, request.merged):
        if name is not None and is_gguf(name):
            places.append(name)
        elif len(places) == 0:
            say, option = request.report.line, request.named("model")
            places.append(resolve_base([named], request.model, option=option, say=say))
        else:
            places.append(resolve_model(request.merged, say=request.report.line))
    with ExitStack() as files:
        base, merged = (files.enter_context(open_weights(place)) for place in places)
        if isinstance(base, GgufWeights):
            base.check_exact()
        changes = files.enter_context(read_changes(request.adapter, base))
        pool = files.enter_context(ThreadPoolExecutor(min(MAX_WORKERS, os.cpu_count() or 1)))
        meter = Meter(pool, changes.origin)
        modules, norms, used = _measured(changes, base, merged, meter, request)
        beside = Beside(changes, base, merged, meter, used)
        others, equal = beside.others()
        modules = judged_together(modules)
        if equal and not any(other.state in ("changed", "missing", "added") for other in others):
            modules = [on_this_base(module) for module in modules]
    report = _report(request, beside, modules, norms, others, equal)
    if request.html is not None:
        publish_text(request.html, to_page(report, request.command()).html)
    return report


def _report(
    request: InspectMergeRequest,
    beside: Beside,
    modules: list[ModuleStrength],
    norms: Mapping[str, float],
    others: list[ParameterState],
    equal: int,
) -> InspectMergeReport:
    base, merged = beside.base, beside.merged
    tokenizer, unread = beside.tokenizers(request.adapter)
    skipped = [f"{module.module}: {module.reason}" for module in modules if module.verdict == "not compared"]
    if merged.quantisation is not None:
        skipped.insert(0, f"{merged.origin} is quantised ({merged.quantisation}), and is not read")
    skipped += [*merged.renamed(base), *merged.settings(base), *unread]
    skipped += [f"{other.name}: {other.reason}" for other in others if other.state in ("resized", "not compared")]
    unknown = [m.module for m in modules if not {*FLOATS, *GRIDS}.issuperset(m.dtype.split("/"))]
    if unknown:
        skipped.append(f"residuals of {len(unknown)} modules, since their number formats are not known here")
    bad = [module for module in modules if module.verdict not in (*GOOD, *OPEN)]
    wrong = [other for other in others if other.state not in ("replaced", "resized", "not compared")]
    undecided = [module for module in modules if module.verdict in OPEN]
    found = any(module.verdict == "merged" for module in modules) or any(o.state == "replaced" for o in others)
    total = sum(norms.values()) or 1.0
    erased = sum(norms.get(module.module, 0.0) * (module.erased or 0.0) for module in modules) / total
    is_open = bool(undecided or skipped) or not found
    return InspectMergeReport(
        verdict="failed" if bad or wrong or tokenizer else "inconclusive" if is_open else "passed",
        sentence=sentence_of(modules, others, tokenizer),
        adapter=request.shown("adapter"),
        peft_type=beside.changes.peft_type,
        merged=merged.origin,
        base_model=base.origin,
        dtypes=dict(Counter(module.dtype for module in modules)),
        erased=erased,
        modules=modules,
        others=others,
        equal=equal,
        tokenizer=tokenizer,
        not_compared=skipped,
        versions=environment(),
    )


def _measured(
    changes: Changes, base: Weights, merged: Weights, meter: Meter, request: InspectMergeRequest
) -> tuple[list[ModuleStrength], dict[str, float], set[tuple[str, int]]]:
    """Judge every module.

    Returns:
        The verdicts, the squared norms of the deltas by module, and the matrices that were looked at.
    """
    found, norms, used = [], {}, set()
    with request.report.task("measuring modules", len(changes.modules)) as done:
        for change in changes.modules:
            sides = [_pieces(weights, change, changes) for weights in (base, merged)]
            used |= {piece.matrix.identity for piece in chain(*sides)}
            replaced = changes.replaced.get(f"{change.path}.weight")
            if replaced is not None:  # PEFT loads it over the base model's
                sides[0] = [TensorPiece(replaced, sides[0][0].transposed)]
            dtype = "/".join(dict.fromkeys(piece.matrix.type_name for piece in sides[1]))
            reason = _unfit(change, *sides)
            if reason is not None:
                found.append(ModuleStrength(module=change.path, verdict="not compared", dtype=dtype, reason=reason))
            else:
                judge = Judge(StoredModule(change, list(overlaps(*sides)), sides[0][0].transposed, dtype), meter)
                found.append(judge.judge())
                norms[change.path] = judge.norm
            done(len(found))
    return found, norms, used


def _pieces(weights: Weights, change: AdapterChange, changes: Changes) -> list[TensorPiece]:
    found = weights.module(change.path, change.shape)
    if not found:
        raise CheckpointError(
            f"{changes.origin}: adapts {change.path}, but {weights.origin} has no such weight; name the model "
            "that the adapter was trained on and a merge of it."
        )
    return found


def _unfit(change: AdapterChange, base: Sequence[TensorPiece], merged: Sequence[TensorPiece]) -> str | None:
    """Return why the weights of a module cannot be compared; None if they can."""
    for pieces in (base, merged):
        unreadable = next((piece.matrix.unreadable for piece in pieces if piece.matrix.unreadable), None)
        if unreadable is not None:
            return unreadable
    expected = change.shape[::-1] if base[0].transposed else change.shape
    found = [(rows_of(pieces), pieces[0].matrix.shape[1]) for pieces in (base, merged)]
    if found[0] != expected:
        raise CheckpointError(
            f"{base[0].matrix.name} has shape {found[0]}, and the adapter's delta of {change.path} is "
            f"{expected}; name the model that the adapter was trained on."
        )
    has_more = found[1][0] > expected[0] and found[1][1] == expected[1] and change.of_tokens
    if found[1] != expected and not has_more:
        return f"{merged[0].matrix.name} has shape {found[1]}, expected {expected}"
    return None
