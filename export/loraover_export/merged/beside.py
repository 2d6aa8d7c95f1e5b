"""Comparison of what a merge leaves alone: other tensors, those that the adapter holds in full, and tokenizers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from loraover_export.merged.changes import AddedDelta, Changes
from loraover_export.merged.gguf import GRIDS
from loraover_export.merged.matrices import FLOATS, Overlap, StoredMatrix, overlaps, rows_of
from loraover_export.merged.meter import Meter
from loraover_export.merged.report import ParameterState
from loraover_export.merged.strength import ABSENT, VIA
from loraover_export.merged.tokenizer import FILE as TOKENIZER_FILE
from loraover_export.merged.tokenizer import in_folder
from loraover_export.merged.weights import BUFFERS, HEAD, Weights

State = Literal["changed", "resized", "not compared"]


class Beside:
    """Everything in two models' files but the weights of adapted modules.

    Args:
        changes: The adapter's changes.
        base: Weights of the base model.
        merged: Weights of the merged model.
        meter: Meter that compares them.
        used: Matrices that belong to adapted modules, in both models.
    """

    def __init__(
        self, changes: Changes, base: Weights, merged: Weights, meter: Meter, used: set[tuple[str, int]]
    ) -> None:
        self.changes, self.base, self.merged = changes, base, merged
        self._meter, self._used = meter, used
        self._paths = {change.path for change in changes.modules}

    def others(self) -> tuple[list[ParameterState], int]:
        """Compare the tensors without a delta; return those that differ or should, and the number of the others."""
        found: list[ParameterState] = []
        modules = {f"{change.path}.weight" for change in self.changes.modules}
        for name, own in self.changes.replaced.items():
            if name not in modules:
                found.append(self._replaced(name, own))
        found += self._untied(modules)
        for change in self.changes.modules:
            merged = self.merged.find(f"{change.path}.weight") if change.of_tokens else None
            if merged is not None and merged.shape[0] > change.shape[0]:
                reason = _added(merged.shape[0] - change.shape[0], change.shape[0])
                found.append(ParameterState(name=f"{change.path}.weight", state="resized", reason=reason))
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
        """Whether a tensor of the merged model belongs to a weight that is not read, such as a quantised one."""
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
        """Compare the experts to which no delta is added, in whichever form the two models' files keep them."""
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
        """Yield the head or the embedding if it was changed only because both share one matrix."""
        if self.base.embedding is None or not (self.base.is_tied and self.merged.is_tied):
            return
        ends = {HEAD, self.base.embedding}
        changed = ends & (modules | self.changes.saved)
        before, after = self.base.find(HEAD), self.merged.find(HEAD)
        if len(changed) != 1 or ends <= modules | self.changes.replaced.keys() or before is None or after is None:
            return
        if self.difference(after, before)[0]:
            (name,) = ends - changed
            reason = (
                f"it shares its matrix with {next(iter(changed))}, and the adapter changes only {next(iter(changed))}"
            )
            yield ParameterState(name=name, state="changed", reason=reason)

    def difference(self, merged: StoredMatrix, base: StoredMatrix) -> tuple[str, State]:
        """Say how a tensor differs from another one of the same shape, or with more rows; see `compare`."""
        added = merged.shape[0] - base.shape[0]
        has_more = added > 0 and merged.shape[1] == base.shape[1] and merged.step == base.step == 1
        if merged.shape != base.shape and merged.unreadable is None and not has_more:
            return f"its shape is {merged.shape}, expected {base.shape}", "changed"
        reason, state = self.compare(Overlap(base, merged, (0, 0, 0), base.shape[0]))
        if has_more and not reason:
            return _added(added, base.shape[0]), "resized"
        return reason, state

    def compare(self, place: Overlap) -> tuple[str, State]:
        """Say how rows differ from the base model's; the merged format may have rounded the base model's numbers.

        Returns:
            The difference in words, empty if there is none, and whether the rows are known to differ.
        """
        merged, base = place.merged, place.base
        if self._meter.holds_same([place]):
            return "", "changed"
        unreadable = merged.unreadable or base.unreadable
        if unreadable is not None:
            is_known = merged.type_name == base.type_name
            return ("its bytes differ", "changed") if is_known else (unreadable, "not compared")
        if merged.type_name not in FLOATS and merged.type_name not in GRIDS:
            return f"the number format {merged.type_name} is not known here", "not compared"
        zero = AddedDelta(np.zeros((sum(place.at[:1]) + place.rows, 0)), np.zeros((0, base.shape[1])))
        kept = [replace(ABSENT, via=via) for via in (None, *VIA)]
        sums = self._meter.measure([place], zero, kept)
        if any(sums.fits(each, is_quantised=merged.is_quantised) for each in kept):
            return "", "changed"
        return f"it differs by {math.sqrt(sums.yy / (sums.size or 1.0)):.2g} of its norm", "changed"


def _added(more: int, rows: int) -> str:
    return f"{more} rows were added, and its first {rows} rows are as they should be"
