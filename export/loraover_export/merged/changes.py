"""Deltas that an adapter adds to a base model's weights, as NumPy factors; a plain LoRA needs no PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from loraover.adapters.base_weights import open_base
from loraover.adapters.convert.kind import read_method, saved_module, why_convert
from loraover.adapters.convert.methods.base import LowRank, Place
from loraover.adapters.convert.prefix import mend_prefix
from loraover.adapters.convert.source import MethodConfig, open_adapter
from loraover.checkpoint.error_bounds import gamma
from loraover.checkpoint.files import CONFIG_FILE
from loraover.checkpoint.peft_adapter import (
    BASE_WEIGHT,
    KEY_PREFIX,
    AdaptedModule,
    AdapterDir,
    read_adapter_dir,
    read_on_base,
)
from loraover.checkpoint.target_modules import Targets
from loraover.checkpoint.tensor_file import TensorFile, open_tensors
from loraover.common.errors import ConfigError
from loraover.common.request import as_written
from loraover.common.strict_json import read_json
from loraover_export.merged.matrices import Numbers, StoredRows
from loraover_export.merged.strength import Hypothesis
from loraover_export.merged.weights import EMBEDDINGS, HEAD, StoredWeights, Weights, rows_in

PRODUCT = 2**18
"""Multiplications in a matrix product up to which OpenBLAS stays on one thread. Its own threads and ours would wait for
one another: measured, a product of 16 x 16 by 16 x 4096 took a thousand times as long."""


class AddedDelta:
    """delta_W = left @ right, with the scaling, or left itself.

    Args:
        left: Left factor, (out_features, r) or (tokens, r), in float64.
        right: Right factor, (r, in_features) or (r, dimension); None if left is delta_W.
    """

    def __init__(self, left: Numbers, right: Numbers | None) -> None:
        self.left, self.right = left, right

    @property
    def mT(self) -> AddedDelta:  # noqa: N802
        """The transposed delta."""
        return AddedDelta(self.left.T, None) if self.right is None else AddedDelta(self.right.T, self.left.T)

    def to(self, dtype: Any) -> AddedDelta:
        """Return the delta with its factors in another number format."""
        factors = (self.left, self.right)
        left, right = (None if factor is None else np.ascontiguousarray(factor, dtype) for factor in factors)
        assert left is not None, "only the right factor may be missing"
        return AddedDelta(left, right)

    def write(self, start: int, stop: int, out: Numbers) -> None:
        """Compute some rows, in the number format of the factors, on one thread."""
        left = self.left[start:stop]
        if self.right is None:
            np.copyto(out, left)
            return
        width = out.shape[1]
        columns = min(width, max(1, PRODUCT // max(1, left.size)))
        whole = width - width % columns
        if whole:  # in one call, since each waits for Python's lock when it ends
            np.matmul(left, _cut(self.right[:, :whole], columns), out=_cut(out[:, :whole], columns))
        np.matmul(left, self.right[:, whole:], out=out[:, whole:])

    @cached_property
    def _sizes(self) -> Numbers | None:
        """|right| |right|^T in float64."""
        if self.right is None:
            return None
        sizes = np.abs(self.right, dtype=np.float64)
        return sizes @ sizes.T

    def reach(self, start: int, stop: int) -> Any:
        """Return the squared norms of rows of |left| |right| in float64; without factors, 64 times those of delta_W."""
        left, sizes = np.abs(self.left[start:stop], dtype=np.float64), self._sizes
        if sizes is None:  # Of products of other kinds, 8 times the usual error is taken for a bound.
            return 64 * np.vecdot(left, left)
        return np.vecdot(left @ sizes, left)

    def norm(self, *, of_sizes: bool = False) -> float:
        """Return the Frobenius norm in float64, from r x r matrices; with `of_sizes`, that of |left| |right|."""
        left, right = self.left, self.right
        if right is None:
            return float(np.linalg.norm(left))
        if of_sizes:
            left, right = np.abs(left), np.abs(right)
        return math.sqrt(max(0.0, float(((left.T @ left) * (right @ right.T)).sum())))

    def error(self, unit: float) -> float:
        """Return a bound of the norm of what rounding changes, with factors and products in another number format."""
        rank = 0 if self.right is None else self.right.shape[0]
        return gamma(rank + 2, unit) * self.norm(of_sizes=True)

    def largest(self) -> float:
        """Return a bound of the largest element."""
        if self.right is None:
            return float(np.abs(self.left).max(initial=0.0))
        rows, columns = (np.sqrt((factor * factor).sum(axis)) for factor, axis in ((self.left, 1), (self.right, 0)))
        return float(rows.max(initial=0.0) * columns.max(initial=0.0))


@dataclass(frozen=True)
class AdapterChange:
    """Change of a module's weight.

    Args:
        path: Path of the module; for an expert, followed by its number and the parameter.
        shape: Shape of the weight: (out_features, in_features), or (tokens, dimension) of an embedding.
        factors: Wrong factors on delta_W that mergers are known to apply.
        read: Function that reads or computes delta_W.
    """

    path: str
    shape: tuple[int, int]
    factors: tuple[Hypothesis, ...]
    read: Callable[[], AddedDelta]

    @property
    def of_tokens(self) -> bool:
        """Whether a row of the weight belongs to a token, so that further tokens add rows."""
        return f"{self.path}.weight".endswith((*EMBEDDINGS, HEAD))


@dataclass(frozen=True)
class Changes:
    """All that an adapter changes in a base model.

    Args:
        origin: File of the adapter's tensors.
        peft_type: PEFT's name of the method.
        modules: Changes of weights, in the order of the adapter's file.
        replaced: Parameters that the adapter holds in full, by transformers' names.
        saved: Replaced parameters of `modules_to_save`, which do not replace the parameters that are tied to them.
    """

    origin: Path
    peft_type: str
    modules: Sequence[AdapterChange]
    replaced: Mapping[str, StoredRows]
    saved: frozenset[str]


def known_factors(scaling: float, rank: int, *, is_rslora: bool) -> tuple[Hypothesis, ...]:
    """Return the wrong factors that mergers are known to apply, each once, with all their names.

    Args:
        scaling: Factor of B @ A in delta_W.
        rank: Rank r of the module.
        is_rslora: Whether the scaling is alpha / sqrt(r).
    """
    root = math.sqrt(rank)
    names = {
        "merged twice": 2.0,
        "subtracted in place of added": -1.0,
        "alpha was left out": 1 / scaling if scaling else 0.0,
        "the scaling was applied twice": scaling,
        "scaled by alpha / r in place of alpha / sqrt(r)"
        if is_rslora
        else "scaled by alpha / sqrt(r) in place of alpha / r": 1 / root if is_rslora else root,
    }
    found: dict[float, list[str]] = {}
    for name, factor in names.items():
        if factor not in (0.0, 1.0):
            found.setdefault(factor, []).append(name)
    return tuple(Hypothesis(factor, name=", or ".join(alike)) for factor, alike in found.items())


@dataclass(frozen=True)
class NamedChange:
    """An adapter of any kind, which names its base model."""

    path: Path
    config: MethodConfig


KNOWN_FACTORS = known_factors(1.0, 1, is_rslora=False)
"""Wrong factors that are searched for if the adapter's delta has no scaling."""


@contextmanager
def read_changes(adapter: Path, base: Weights) -> Iterator[Changes]:
    """Read an adapter for a base model; parameters that the adapter holds in full are read later, from the open file.

    Raises:
        CheckpointError: An adapter that cannot be trusted, or that belongs to another base model.
        ConfigError: An adapter whose deltas depend on weights that only safetensors files hold as trained.
        ExportError: An adapter that changes more than weights.
        ModuleNotFoundError: The adapter is not a plain LoRA, and PyTorch is not installed.
    """
    reason = why_convert(adapter, {})
    if reason is not None:
        if not isinstance(base, StoredWeights):
            raise ConfigError(
                f"{adapter}: {reason}: its deltas are computed from the base model that it was trained on; name the "
                f"safetensors files of this base model with {as_written('model')}, found {base.origin}."
            )
        with _of_another_kind(adapter, base) as changes:
            yield changes
        return
    lora = read_adapter_dir(adapter)
    if lora.stacks:
        lora = read_on_base(lora, base.experts())
    with open_tensors(lora.tensors_path) as file:
        modules = [
            AdapterChange(
                path,
                module.weight_shape,
                known_factors(module.scaling, module.rank, is_rslora=lora.config.use_rslora),
                partial(_factors, lora, file, module),
            )
            for path, module in lora.modules.items()
        ]
        replaced = {name: rows_in(file, key) for key, name in lora.others.items()}
        saved = frozenset(filter(read_json(adapter / CONFIG_FILE, Targets).saves, replaced))
        yield Changes(lora.tensors_path, lora.config.peft_type, modules, replaced, saved)


@contextmanager
def _of_another_kind(path: Path, base: StoredWeights) -> Iterator[Changes]:
    """Compute the deltas of an adapter that is not a plain LoRA with PyTorch, as its conversion does."""
    method, layout = read_method(path)
    with open_base(base.source) as weights, ExitStack() as files:
        layout, _ = mend_prefix(layout, weights)
        adapter = files.enter_context(open_adapter(layout, weights))
        modules = []
        for place in method.places(adapter):
            shape = weights.shapes.get(place.path)
            if shape is None:  # of an expert
                delta = _computed(place)
                shape = len(delta.left), (delta.left if delta.right is None else delta.right).shape[1]
            modules.append(AdapterChange(place.path, shape, KNOWN_FACTORS, partial(_computed, place)))
        replaced = {}
        for key in layout.others:
            name = key.removeprefix(KEY_PREFIX).replace(BASE_WEIGHT, ".weight")
            replaced[name] = rows_in(adapter.file, key)
        saved = frozenset(name for name in replaced if saved_module(name, layout.config) is not None)
        yield Changes(layout.tensors_path, layout.config.peft_type, modules, replaced, saved)


def _cut(matrix: Numbers, columns: int) -> Numbers:
    """Return a matrix (m, n) as its n / columns blocks of columns: (blocks, m, columns)."""
    return matrix.reshape(len(matrix), matrix.shape[1] // columns, columns).transpose(1, 0, 2)


def _computed(place: Place) -> AddedDelta:
    found = place.delta()
    factors = (found.b, found.a) if isinstance(found, LowRank) else (found.value, None)
    left, right = (None if factor is None else factor.double().numpy() for factor in factors)
    assert left is not None, "only the right factor may be missing"
    return AddedDelta(left, right).mT if place.embedding else AddedDelta(left, right)


def _factors(adapter: AdapterDir, file: TensorFile, module: AdaptedModule) -> AddedDelta:
    a, b = (_numbers(adapter, file, key) for key in module.keys)
    found = AddedDelta(np.ascontiguousarray(module.scaling * b), np.ascontiguousarray(a))
    return found.mT if module.is_embedding else found  # whose B is (dimension, r), and A (r, tokens)


def _numbers(adapter: AdapterDir, file: TensorFile, key: str) -> Numbers:
    part = adapter.parts.get(key)
    if part is None:
        return file.numbers(key)
    stack: Any = file.numbers(part.key)
    found = stack.reshape(part.part.experts, -1, stack.shape[1])[part.part.expert]
    if part.part.matrix == "B":
        found = stack.reshape(len(stack), -1, part.part.experts)[..., part.part.expert]
    numbers: Numbers = found.T if part.is_flipped else found
    return numbers
