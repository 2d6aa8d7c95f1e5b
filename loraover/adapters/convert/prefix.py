"""Adapted modules under another prefix than the base model's: the prefix is changed where only one change fits.

A text model's adapter names `model.layers.0`, which a multimodal model of the same family calls
`model.language_model.layers.0`, and some tools leave out PEFT's own prefix. Engines load such files without a message,
and answer as the base model: vllm-project/vllm 34186.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from loraover.adapters.base_weights import BaseWeights, loaded_names, module_of_copy
from loraover.adapters.convert.source import AdapterLayout
from loraover.checkpoint.adapter_config import first_match
from loraover.checkpoint.peft_adapter import BASE_WEIGHT, KEY_PREFIX
from loraover.checkpoint.tensor_file import open_tensors
from loraover.common.errors import ExportError

_LAYERS = re.compile(r".+?\.(?=\d+\.)")
"""Part of a path before its first number, such as "model.encoder.layers."."""


class Move(NamedTuple):
    """Two prefixes of the same modules.

    Args:
        old: Prefix in the adapter's file, such as "model"; "" stands for none, and for several.
        new: Prefix in the base model, such as "model.language_model".
        paths: Paths in the base model, by those in the file.
    """

    old: str
    new: str
    paths: Mapping[str, str]

    def in_words(self) -> str:
        """Return what differs, as a sentence."""
        if self.old == self.new:
            return f"{len(self.paths)} modules had the names of an earlier transformers; they were renamed."
        old, new = (f"below {prefix!r}" if prefix else "without a prefix" for prefix in (self.old, self.new))
        return (
            f"The adapter's file has {len(self.paths)} modules {old}, and the base model has them {new}; they were "
            "renamed."
        )


def mend_prefix(layout: AdapterLayout[Any], base: BaseWeights) -> tuple[AdapterLayout[Any], list[str]]:
    """Return an adapter's layout with the base model's names of the adapted modules, and what was changed in words."""
    notes = []
    if layout.keys:
        notes.append(f"The keys in the adapter's file lack the prefix {KEY_PREFIX!r}; it was added.")
    move = find_move(layout, base.shapes) or _renaming(layout, base)
    if move is None:
        return layout, notes
    return _moved(layout, move), [*notes, move.in_words()]


def _renaming(layout: AdapterLayout[Any], base: BaseWeights) -> Move | None:
    """Return transformers' names of the modules that the base model lacks; None if it has no modules of these names."""
    if layout.config.task_type == "FEATURE_EXTRACTION":  # as in `find_move`
        return None
    missing = {f"{path}.weight": path for path in layout.modules if path not in base.shapes}
    loaded = loaded_names(base.model, missing).items()
    paths = {missing[key]: name.removesuffix(".weight") for key, (name, is_changed) in loaded if not is_changed}
    fits = _fitting(layout, base.shapes)
    is_found = len(paths) == len(missing) and all(new in base.shapes and fits(old, new) for old, new in paths.items())
    return Move("", "", paths) if missing and is_found else None


def part_below(prefix: str, names: Iterable[str]) -> list[str]:
    """Return the paths of modules below a prefix; all of them if it is empty."""
    return [name for name in names if not prefix or name.startswith(f"{prefix}.")]


def find_move(layout: AdapterLayout[Any], shapes: Mapping[str, tuple[int, int]]) -> Move | None:
    """Return the one other prefix under which the base model has all modules that it lacks; None if there is none.

    An ExportError says that several prefixes fit.
    """
    missing = [path for path in layout.modules if path not in shapes]
    if not missing or layout.config.task_type == "FEATURE_EXTRACTION":
        return None  # of a model without its head, which PEFT finds again by this task
    lists = tuple({match[0] for path in missing if (match := _LAYERS.match(path))})
    if any(name.startswith(lists) for name in shapes):
        return None  # the base model has these layers, and fewer of them: others' names are not theirs
    fits = _fitting(layout, shapes)
    common = []  # parts with which all paths begin, up to the first number and without any path's last part
    for parts in zip(*(path.split(".")[:-1] for path in missing), strict=False):
        if len(set(parts)) > 1 or parts[0].isdecimal():
            break
        common.append(parts[0])
    for count in range(len(common) + 1):
        old = ".".join(common[:count])
        rests = [path.removeprefix(f"{old}.") if old else path for path in missing]
        first = rests[0]
        starts = {name[: -len(first)].rstrip(".") for name in shapes if f".{name}".endswith(f".{first}")}
        found = sorted(
            start
            for start in starts
            if all(
                (name := _joined(start, rest)) in shapes and fits(path, name)
                for path, rest in zip(missing, rests, strict=True)
            )
        )
        if len(found) > 1:
            raise ExportError(
                f"{layout.tensors_path}: the base model has no {missing[0]}, and several of its parts fit: "
                f"{', '.join(repr(new) for new in found)}. Rename the adapter's tensors to one of them."
            )
        if found:
            return Move(old, found[0], {m: _joined(found[0], rest) for m, rest in zip(missing, rests, strict=True)})
    return None


def _joined(start: str, rest: str) -> str:
    return f"{start}.{rest}" if start else rest


def _fitting(layout: AdapterLayout[Any], shapes: Mapping[str, tuple[int, int]]) -> Callable[[str, str], bool]:
    """Return a test of whether a module's A and B, if it has them, fit a module of the base model."""
    with open_tensors(layout.tensors_path) as file:
        named = file.renamed(layout.keys)
        stored = {key: named.shape(key) for key in named.keys}

    def fits(path: str, name: str) -> bool:
        if name in layout.modules:
            return False
        a, b = (stored.get(f"{KEY_PREFIX}{path}.lora_{side}.weight") for side in "AB")
        return a is None or b is None or len(a) != 2 or len(b) != 2 or (b[0], a[1]) == shapes[name]

    return fits


def _moved(layout: AdapterLayout[Any], move: Move) -> AdapterLayout[Any]:
    names = {path: move.paths.get(path, path) for path in layout.modules}
    at_first = {new: old for old, new in layout.keys.items()}
    keys = dict(layout.keys)
    for path, tensors in layout.modules.items():
        for name in tensors:
            key = f"{KEY_PREFIX}{path}.{name}"
            keys[at_first.get(key, key)] = f"{KEY_PREFIX}{names[path]}.{name}"
    copies = {
        key: path for key in layout.others if key.endswith(BASE_WEIGHT) and (path := module_of_copy(key)) in names
    }
    copied = {key: f"{KEY_PREFIX}{names[path]}{BASE_WEIGHT}" for key, path in copies.items()}
    keys |= {at_first.get(key, key): new for key, new in copied.items()}
    patterns = {}  # values of the new paths themselves
    for field, value in layout.config:
        if field.endswith("_pattern") and isinstance(value, dict) and value:
            values = {path: first_match(value, path, float("nan")) for path in names}
            patterns[field] = {re.escape(names[path]): own for path, own in values.items() if own == own}  # not NaN
    return replace(
        layout,
        config=layout.config.model_copy(update=patterns),
        modules={names[path]: tensors for path, tensors in layout.modules.items()},
        others=tuple(copied.get(key, key) for key in layout.others),
        keys=keys,
        stored={new: old for old, new in move.paths.items()},
        below=move.new,
    )
