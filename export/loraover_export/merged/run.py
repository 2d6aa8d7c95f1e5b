"""The search for an adapter in merged weights: read both models' files, measure every module, judge, and report."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np

from loraover.adapters.convert.kind import named_base
from loraover.checkpoint.base_model import resolve_base
from loraover.common.atomic_output import publish_text
from loraover.common.errors import CheckpointError
from loraover.common.provenance import environment
from loraover.models.load import ModelSource, resolve_model
from loraover.reporting.html_page import check_new
from loraover.sources.verb import verb
from loraover_export.merged.changes import AdapterChange, AdapterFactors, Changes, NamedChange, read_changes
from loraover_export.merged.gguf import GRIDS, GgufWeights, is_gguf, open_weights
from loraover_export.merged.report import (
    GOOD,
    OPEN,
    InspectMergeReport,
    ModuleStrength,
    ModuleVerdict,
    ParameterState,
    sentence_of,
    to_page,
)
from loraover_export.merged.strength import (
    ABSENT,
    FAINT,
    IMPRECISION,
    ONCE,
    STANDARD_ERRORS,
    Hypothesis,
    Numbers,
    Rounding,
    Sums,
    measure,
)
from loraover_export.merged.tokenizer import FILE as TOKENIZER_FILE
from loraover_export.merged.tokenizer import in_folder
from loraover_export.merged.weights import (
    BUFFERS,
    FLOATS,
    HEAD,
    WIDE,
    Overlap,
    StoredMatrix,
    TensorPiece,
    Weights,
    nearest_bf16,
    nearest_f16,
    overlaps,
    rows_of,
)
from loraover_export.requests import InspectMergeRequest

ELEMENTS = 2**16
"""Elements that a thread measures at once: the numbers of some ten arrays stay in the processor's cache."""

MAX_WORKERS = 8

State = Literal["changed", "not compared"]

VIA: Mapping[str, Rounding] = {"BF16": nearest_bf16, "F16": nearest_f16}
"""Formats in which mergers hold sums before they store them in others."""


NEIGHBOURS = (0.75, 1.25)
"""Factors that have to be told from 1 before a module is called merged, besides those by which mergers err."""


SECANT_STEPS = 4

TINY = 1e-9
"""Largest element of a block of delta_W down to which, and up to whose inverse, float32 holds its fourth powers."""


@verb(InspectMergeRequest)
def inspect_merge(request: InspectMergeRequest) -> InspectMergeReport:
    """Measure how much of an adapter's delta every merged weight holds, and compare everything else with the base.

    The merged model may have been written by any tool. Files are read once, some rows at a time, and nothing is loaded
    into a model; a plain LoRA needs no PyTorch.

    Returns:
        The verdict for every module and for the whole, with the strength that each rests on.

    Raises:
        ConfigError: A base model or a merged model that cannot be read.
        CheckpointError: An adapter that cannot be trusted or that belongs to another base model, or weights that are
            not finite.
        ExportError: An adapter that changes more than weights, or depends on what its files do not hold.
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
        search = MergeSearch(changes, base, merged, pool)
        modules = []
        with request.report.task("measuring modules", len(changes.modules)) as done:
            for change in changes.modules:
                modules.append(search.module(change))
                done(len(modules))
        others, equal = search.others()
        if equal and not any(other.state in ("changed", "missing", "added") for other in others):
            modules = [_on_this_base(module) for module in modules]
    report = _report(request, changes, search, modules, others, equal)
    if request.html is not None:
        publish_text(request.html, to_page(report, request.command()).html)
    return report


def _report(
    request: InspectMergeRequest,
    changes: Changes,
    search: MergeSearch,
    modules: list[ModuleStrength],
    others: list[ParameterState],
    equal: int,
) -> InspectMergeReport:
    tokenizer, unread = search.tokenizers(request.adapter)
    skipped = [f"{module.module}: {module.reason}" for module in modules if module.verdict == "not compared"]
    if search.merged.quantisation is not None:
        skipped.insert(0, f"{search.merged.origin} is quantised ({search.merged.quantisation}), and is not read")
    skipped += [*search.merged.renamed(search.base), *search.merged.settings(search.base), *unread]
    skipped += [f"{other.name}: {other.reason}" for other in others if other.state == "not compared"]
    unknown = [m.module for m in modules if not {*FLOATS, *GRIDS}.issuperset(m.dtype.split("/"))]
    if unknown:
        skipped.append(f"residuals of {len(unknown)} modules, since the numbers of their formats are not known here")
    bad = [module for module in modules if module.verdict not in (*GOOD, *OPEN)]
    wrong = [other for other in others if other.state not in ("replaced", "not compared")]
    undecided = [module for module in modules if module.verdict in OPEN]
    found = any(module.verdict == "merged" for module in modules) or any(o.state == "replaced" for o in others)
    total = sum(search.norms.values()) or 1.0
    erased = sum(search.norms.get(module.module, 0.0) * (module.erased or 0.0) for module in modules) / total
    is_open = bool(undecided or skipped) or not found
    return InspectMergeReport(
        verdict="failed" if bad or wrong or tokenizer else "inconclusive" if is_open else "passed",
        sentence=sentence_of(modules, others, tokenizer),
        adapter=request.shown("adapter"),
        peft_type=changes.peft_type,
        merged=search.merged.origin,
        base_model=search.base.origin,
        dtypes=dict(Counter(module.dtype for module in modules)),
        erased=erased,
        modules=modules,
        others=others,
        equal=equal,
        tokenizer=tokenizer,
        not_compared=skipped,
        versions=environment(),
    )


def _on_this_base(module: ModuleStrength) -> ModuleStrength:
    """Return a module that rounding does not explain as changed otherwise, since all other tensors are the base's."""
    if module.verdict != "another base" or module.interval is None:
        return module
    least, most = module.interval
    found = "other changes than this adapter's" if least <= 0 <= most else "the adapter's delta is not all that changed"
    reason = f"{found}, such as those of another adapter; all other tensors are the base model's"
    return module.model_copy(update={"verdict": "other changes", "reason": reason})


class MergeSearch:
    """The search for an adapter's changes in one model's files.

    Args:
        changes: The changes.
        base: Weights of the base model.
        merged: Weights of the merged model.
        pool: Threads that measure blocks.

    Attributes:
        norms: Squared norm of the delta of each module that was measured.
    """

    def __init__(self, changes: Changes, base: Weights, merged: Weights, pool: ThreadPoolExecutor) -> None:
        self.changes, self.base, self.merged = changes, base, merged
        self.norms: dict[str, float] = {}
        self._pool = pool
        self._used: set[tuple[str, int]] = set()
        self._paths = {change.path for change in changes.modules}

    def module(self, change: AdapterChange) -> ModuleStrength:
        """Measure and judge one module."""
        base, merged = self._pieces(self.base, change), self._pieces(self.merged, change)
        self._used |= {piece.matrix.identity for piece in chain(base, merged)}
        replaced = self.changes.replaced.get(f"{change.path}.weight")
        if replaced is not None:  # PEFT loads it over the base model's
            base = [TensorPiece(replaced, base[0].transposed)]
        dtype = "/".join(dict.fromkeys(piece.matrix.type_name for piece in merged))
        reason = self._unfit(change, base, merged)
        if reason is not None:
            return ModuleStrength(module=change.path, verdict="not compared", dtype=dtype, reason=reason)
        places = list(overlaps(base, merged))
        return self._judge(change, places, base[0].transposed, dtype)

    def _pieces(self, weights: Weights, change: AdapterChange) -> list[TensorPiece]:
        found = weights.module(change.path, change.shape)
        if not found:
            raise CheckpointError(
                f"{self.changes.origin}: adapts {change.path}, but {weights.origin} has no such weight; name the model "
                "that the adapter was trained on and a merge of it."
            )
        return found

    def _unfit(self, change: AdapterChange, base: Sequence[TensorPiece], merged: Sequence[TensorPiece]) -> str | None:
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
        if found[1] != expected:
            return f"{merged[0].matrix.name} has shape {found[1]}, expected {expected}"
        return None

    def _judge(self, change: AdapterChange, places: Sequence[Overlap], transposed: bool, dtype: str) -> ModuleStrength:
        """Judge a module by the usual two hypotheses, and where these do not decide, by every other one."""
        found = change.read()
        direction, is_quantised = found.mT if transposed else found, any(place.merged.is_quantised for place in places)
        sums = self.measure(places, direction, [ABSENT, ONCE])
        self.norms[change.path] = sums.dd
        fits = partial(sums.fits, is_quantised=is_quantised)
        erased = sums.erased / (sums.dd or 1.0)

        def verdict(name: ModuleVerdict, by: Hypothesis, reason: str = "", of: Sums = sums) -> ModuleStrength:
            s, half, norm = of.strength, of.half_width, math.sqrt(of.dd) or 1.0
            return ModuleStrength(
                module=change.path,
                verdict=name,
                dtype=dtype,
                strength=s,
                interval=(s - half, s + half),
                expected=of.expected(by if by.factor == 1 else ONCE),
                residual=of.residual / norm,
                rounding=math.sqrt(of.explained[by].error) / norm,
                erased=erased,
                reason=reason,
            )

        if not sums.dd:
            if fits(ABSENT):
                return verdict("nothing to merge", ABSENT, "the delta is zero")
        elif (fits(ONCE) or fits(ABSENT)) and abs(sums.expected(ONCE) - sums.expected(ABSENT)) < FAINT:
            return verdict("rounded away", ABSENT, f"{dtype} stores a right merge as the base weight")
        elif fits(ONCE) and not fits(ABSENT) and (not sums.explained[ONCE].different or not _rivals(change, sums)):
            return verdict("merged", ONCE)
        elif fits(ABSENT) and not fits(ONCE) and sums.explained[ABSENT].different == 0:
            return verdict("not merged", ABSENT)
        else:
            decided = self._by_factor(change, places, direction, sums, is_quantised, verdict)
            if decided is not None:
                return decided
        if change.shape[0] == change.shape[1]:
            flipped = self.measure(places, direction.mT, [ABSENT, ONCE])
            if flipped.fits(ONCE, is_quantised=is_quantised):
                return verdict("transposed", ONCE, "the transposed delta was added", flipped)
        for fault in self._reordered(places, direction, is_quantised):
            return verdict("rows in another order", ONCE, *fault)
        return verdict("another base", ONCE, "rounding does not explain the difference from the base model")

    def _by_factor(
        self,
        change: AdapterChange,
        places: Sequence[Overlap],
        direction: AdapterFactors,
        first: Sums,
        is_quantised: bool,
        verdict: Callable[..., ModuleStrength],
    ) -> ModuleStrength | None:
        """Judge a module by all factors and ways of rounding; None if none explains it.

        Of two hypotheses that fit, the file is rather that of the one from whose file it differs in fewer elements.
        """
        usual = any(first.fits(each, is_quantised=is_quantised) for each in (ONCE, ABSENT))
        ratio = first.expected(ONCE)
        free = [] if usual else [Hypothesis(c) for c in (first.strength, first.strength / (ratio if ratio > 0 else 1))]
        plain = [ABSENT, ONCE, *change.factors, *map(Hypothesis, NEIGHBOURS), *free]
        vias = [via for via in VIA if all(_is_plausible(via, place) for place in places)]
        sums = self.measure(places, direction, [*plain, *(replace(each, via=via) for each in plain for via in vias)])
        best = _contenders(sums, is_quantised)
        if not best and free and sums.residual**2 <= 2 * sums.explained[free[0]].error:
            sums = self._refined(places, direction, sums, free)
            best = _contenders(sums, is_quantised)
        if not best:
            return None
        by = best[0]
        through = "" if by.via is None else f"rounded to {by.via} first"
        factors = {each.factor for each in best}
        once = next((each for each in best if each.factor == 1), None)
        if once is not None and abs(sums.expected(once) - sums.expected(replace(once, factor=0.0))) < FAINT:
            return verdict("rounded away", ABSENT, "a right merge is stored as the base weight", sums)
        if len(factors) > 1 and factors & {0.0, 1.0}:
            told = ", ".join(f"{factor:.3g}" for factor in sorted(factors))
            reason = f"rounding is larger than the delta, so that the factors {told} cannot be told apart"
            return verdict("undecided", once or by, reason, sums)
        if factors <= {0.0, 1.0}:
            return verdict("merged" if by.factor else "not merged", by, through, sums)
        if factors == {2.0}:
            return verdict("merged twice", by, by.name, sums)
        names = [each.name or f"merged {each.factor:.3g} times" for each in best]
        return verdict("another factor", by, ", or ".join(dict.fromkeys(names)), sums)

    def _refined(
        self, places: Sequence[Overlap], direction: AdapterFactors, sums: Sums, free: Sequence[Hypothesis]
    ) -> Sums:
        """Add the sums of the factor whose file has the measured strength, by secant steps from two factors."""
        before, now = free
        for _ in range(SECANT_STEPS):
            rise = sums.expected(now) - sums.expected(before)
            step = (sums.strength - sums.expected(now)) * (now.factor - before.factor) / rise if rise else 0.0
            if not step:
                break
            before, now = now, Hypothesis(now.factor + step)
            sums.explained |= self.measure(places, direction, [now]).explained
        return sums

    def _reordered(
        self, places: Sequence[Overlap], direction: AdapterFactors, is_quantised: bool
    ) -> Iterator[tuple[str, Sums]]:
        """Yield how the rows of queries or keys lie in another order than llama.cpp's, with the sums that show it."""
        (merged, *_) = (place.merged for place in places)
        plain = merged.in_file_order()
        if plain is None:
            return
        delta = AdapterFactors(direction.left[merged.order()], direction.right)
        for reason, where, what in (
            ("the rows of the delta were not reordered for llama.cpp", places, delta),
            ("the rows are not in llama.cpp's order", [places[0]._replace(merged=plain)], direction),
        ):
            sums = self.measure(where, what, [ABSENT, ONCE])
            if sums.fits(ONCE, is_quantised=is_quantised) and not sums.fits(ABSENT, is_quantised=is_quantised):
                yield reason, sums

    def measure(self, places: Sequence[Overlap], direction: AdapterFactors, hypotheses: Sequence[Hypothesis]) -> Sums:
        """Return the sums over all elements of a module."""
        total = Sums()
        blocks = [(place, start, stop) for place in places for start, stop in _blocks(place)]
        for sums in self._pool.map(partial(self._block, direction, hypotheses), *zip(*blocks, strict=True)):
            total.add(sums)
        return total

    def _block(
        self, direction: AdapterFactors, hypotheses: Sequence[Hypothesis], place: Overlap, start: int, stop: int
    ) -> Sums:
        """Return the sums over some rows, which are counted from the first common one."""
        at, in_base, in_merged = place.at
        exact = direction.rows(at + start, at + stop)
        is_usual = place.merged.type_name not in WIDE and TINY < np.abs(exact).max(initial=0.0) < 1 / TINY
        dtype = np.float32 if is_usual else np.float64
        base = place.base.block(in_base + start, in_base + stop, dtype)
        merged = place.merged.block(in_merged + start, in_merged + stop, dtype)
        delta: Numbers = exact.astype(dtype)
        with np.errstate(invalid="ignore", over="ignore"):
            sums = measure(base.values, merged.values, delta, merged.nearest, hypotheses, VIA)
        if not math.isfinite(sums.yy + sums.dd):
            place.base.check(base.values)
            place.merged.check(merged.values)
            raise CheckpointError(
                f"{self.changes.origin}: its delta is as large as {np.abs(exact).max():.2g}, whose squares cannot be "
                "summed; the run that wrote it had diverged."
            )
        return sums

    def others(self) -> tuple[list[ParameterState], int]:
        """Compare all tensors to which no delta is added; return those that differ or should, and how many do not."""
        found: list[ParameterState] = []
        modules = {f"{change.path}.weight" for change in self.changes.modules}
        for name, own in self.changes.replaced.items():
            if name not in modules:
                found.append(self._replaced(name, own))
        found += self._untied(modules)
        equal = 0
        for name in self.merged.names():
            merged, base = self.merged.find(name), self.base.find(name)
            if merged is None or merged.identity in self._used or (base is None and name.endswith(BUFFERS)):
                continue
            if base is None and self._is_part(name):
                continue
            reason, state = "the base model has no such tensor", "added"
            if base is not None:
                self._used |= {base.identity, merged.identity}
                reason, state = self.difference(merged, base)
            if reason:
                found.append(ParameterState(name=name, state=state, reason=reason))
            equal += not reason
        for path, number in (self.base.stacks() | self.merged.stacks()).items():
            reason, state = self._stack(path, number)
            if reason:
                found.append(ParameterState(name=path, state=state, reason=reason))
            equal += not reason
        for name in self.base.names():
            base = self.base.find(name)
            if base is not None and base.identity not in self._used and not name.endswith(BUFFERS):
                merged = self.merged.find(name)
                unreadable = None if merged is None else merged.unreadable
                found.append(
                    ParameterState(name=name, state="missing", reason="the merged model has no such tensor")
                    if unreadable is None
                    else ParameterState(name=name, state="not compared", reason=unreadable)
                )
        return found, equal

    def _is_part(self, name: str) -> bool:
        """Whether a tensor of the merged model is or scales a weight that is not read, such as a quantised one."""
        while "." in name:
            name = name.rpartition(".")[0]
            weight = self.merged.find(f"{name.removesuffix('.weight')}.weight")
            if weight is not None:
                return weight.unreadable is not None
        return False

    def tokenizers(self, adapter: Path) -> tuple[list[str], list[str]]:
        """Compare the merged model's tokenizer with the adapter's, or with the base model's if the adapter has none.

        Returns:
            The differences, and what could not be compared, in sentences.
        """
        found = self.merged.tokenizer()
        expected = in_folder(adapter, f"the adapter {adapter}") or self.base.tokenizer()
        if found is not None and expected is not None:
            return list(found.differences(expected)), list(found.other_parts(expected))
        unread = [weights.origin for weights in (self.base, self.merged) if weights.has_unread_tokenizer]
        if expected is not None and not unread:
            unread = [self.merged.origin]
        return [], [f"the tokenizer of {origin}, which has no {TOKENIZER_FILE}" for origin in unread]

    def _stack(self, path: str, number: int) -> tuple[str, State]:
        """Compare the experts to which no delta is added, however the two models' files keep them."""
        owner, _, parameter = path.rpartition(".")
        before = self.base.stacks().get(path, 0)
        if before != self.merged.stacks().get(path, 0):
            return f"it has {self.merged.stacks().get(path, 0)} experts, expected {before}", "changed"
        for index in range(number):
            expert = f"{owner}.{index}.{parameter}"
            if expert in self._paths:
                continue
            merged = self.merged.module(expert, (0, 0))
            base = self.base.module(expert, (0, 0))
            sizes = [(rows_of(pieces), pieces[0].matrix.shape[1] if pieces else 0) for pieces in (base, merged)]
            if sizes[0] != sizes[1]:
                return f"expert {index} has the shape {sizes[1]}, expected {sizes[0]}", "changed"
            for place in overlaps(base, merged):
                if place.merged.identity in self._used:
                    continue
                reason, state = self.compare(place)
                if reason:
                    return f"expert {index}: {reason}", state
        return "", "changed"

    def _replaced(self, name: str, own: StoredMatrix) -> ParameterState:
        """Judge a parameter that the adapter holds in full."""
        merged, base = self.merged.find(name), self.base.find(name)
        if merged is None:
            return ParameterState(name=name, state="missing", reason="the adapter holds it in full")
        self._used |= {found.identity for found in (merged, base) if found is not None}
        reason, state = self.difference(merged, own)
        if not reason:
            return ParameterState(name=name, state="replaced")
        if state == "changed" and base is not None and not self.difference(merged, base)[0]:
            return ParameterState(name=name, state="left out", reason="it is the base model's, not the adapter's")
        return ParameterState(name=name, state=state, reason=f"not the adapter's: {reason}")

    def _untied(self, modules: set[str]) -> Iterator[ParameterState]:
        """Yield the head or the embedding if it was changed only because it shares the other's matrix."""
        if self.base.embedding is None or not (self.base.is_tied and self.merged.is_tied):
            return
        ends = {HEAD, self.base.embedding}
        changed = ends & (modules | self.changes.saved)
        before, after = self.base.find(HEAD), self.merged.find(HEAD)
        if len(changed) != 1 or ends <= modules | self.changes.replaced.keys() or before is None or after is None:
            return
        if self.difference(after, before)[0]:
            (name,) = ends - changed
            reason = f"it shares the matrix of {next(iter(changed))}, and the adapter changes that alone"
            yield ParameterState(name=name, state="changed", reason=reason)

    def difference(self, merged: StoredMatrix, base: StoredMatrix) -> tuple[str, State]:
        """Say how a tensor differs from another one of the same shape; see `compare`."""
        if merged.shape != base.shape and merged.unreadable is None:
            return f"its shape is {merged.shape}, expected {base.shape}", "changed"
        return self.compare(Overlap(base, merged, (0, 0, 0), base.shape[0]))

    def compare(self, place: Overlap) -> tuple[str, State]:
        """Say how rows differ from the base model's, whose numbers the format of the merged ones may have rounded.

        Returns:
            The difference in words, empty if there is none, and whether the rows are known to differ.
        """
        merged, base, (_, in_base, in_merged) = place.merged, place.base, place.at

        def equal(rows: tuple[int, int]) -> bool:
            first, last = rows
            ours = base.raw(in_base + first, in_base + last)
            return np.array_equal(merged.raw(in_merged + first, in_merged + last), ours)

        if merged.type_name == base.type_name and all(self._pool.map(equal, _blocks(place))):
            return "", "changed"
        unreadable = merged.unreadable or base.unreadable
        if unreadable is not None:
            is_known = merged.type_name == base.type_name
            return ("its bytes differ", "changed") if is_known else (unreadable, "not compared")
        if merged.type_name not in FLOATS and merged.type_name not in GRIDS:
            return f"the numbers of {merged.type_name} are not known", "not compared"
        zero = AdapterFactors(np.zeros((sum(place.at[:1]) + place.rows, 0)), np.zeros((0, base.shape[1])))
        kept = [replace(ABSENT, via=via) for via in (None, *VIA)]
        sums = self.measure([place], zero, kept)
        if any(sums.fits(each, is_quantised=merged.is_quantised) for each in kept):
            return "", "changed"
        return f"it differs by {math.sqrt(sums.yy / (sums.size or 1.0)):.2g} of its norm", "changed"


def _rivals(change: AdapterChange, sums: Sums) -> list[Hypothesis]:
    """Return the factors that the interval of a strength cannot tell from a right merge."""
    ratio, near = sums.expected(ONCE), sums.half_width
    return [
        each
        for each in (*change.factors, *map(Hypothesis, NEIGHBOURS))
        if abs(sums.strength - each.factor * ratio) <= near + IMPRECISION * abs(each.factor)
    ]


def _is_plausible(via: str, place: Overlap) -> bool:
    """Whether a merger may have held a sum in a format: not in another one of 16 bits than both files have."""
    before, after = place.base.type_name, place.merged.type_name
    return after != via and not (before == after and after in VIA)


def _contenders(sums: Sums, is_quantised: bool) -> list[Hypothesis]:
    """Return the hypotheses that fit, best first, one for each factor that the number of other elements leaves open.

    A factor without a name gives way to those that have one, and `NEIGHBOURS` only to wrong ones.
    """
    fitting = [each for each in sums.explained if sums.fits(each, is_quantised=is_quantised)]
    fitting.sort(key=lambda each: sums.explained[each].different)
    best: dict[float, Hypothesis] = {}
    for each in fitting:
        found, least = sums.explained[each].different, sums.explained[fitting[0]].different
        if found - least <= STANDARD_ERRORS * math.sqrt(found + least):
            best.setdefault(each.factor, each)
    usual = {0.0, 1.0}.intersection(best)
    known = [each for each in best.values() if each.name or each.factor in usual]
    if usual:
        return [each for each in best.values() if each in known or each.factor in NEIGHBOURS]
    free = [each for each in best.values() if each.factor not in NEIGHBOURS]
    return known or free[:1] or list(best.values())[:1]


def _blocks(place: Overlap) -> Iterator[tuple[int, int]]:
    """Yield the first and the last row of each block, counted from the first common row."""
    step = math.lcm(place.base.step, place.merged.step)
    rows = max(1, ELEMENTS // max(1, place.base.shape[1] * step)) * step
    for start in range(0, place.rows, rows):
        yield start, min(place.rows, start + rows)
