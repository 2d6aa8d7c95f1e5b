"""The faults with which engines serve adapters without a message, each as an adapter with the same effect.

A fault is a function in `FAULTS`, which yields its candidates: adapters that PyTorch runs on the same prompts. The
candidate whose answers are nearest to the engine's names the likely fault.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from loraover.checkpoint.adapter_config import AdapterConfig
from loraover.checkpoint.peft_adapter import AdapterDir
from loraover_serve.comparison.rounding import FORMATS
from loraover_serve.judge.names import (
    ANOTHER,
    ATTENTION,
    LAYERS,
    LEFT_OUT,
    PERMUTED,
    ROUNDED,
    SCALED,
    STALE,
    TRANSPOSED,
)
from loraover_serve.verify.variants import Deltas, FaultyAdapter, LowRankChange, read_lora

LAYER = re.compile(r"\.(\d+)\.")
Rule = Callable[[AdapterConfig, int, float], float]


@dataclass(frozen=True)
class RightAdapter:
    """The adapter whose faults are looked for.

    Args:
        config: Its configuration.
        deltas: Its deltas, by the paths of their modules.
        heads: Number of attention heads by the last part of a module's path, for q_proj and k_proj.
        others: Whether it has fully trained parameters (`modules_to_save`).
        earlier: The same run's adapters of earlier steps.
        confusable: Other adapters that the engine may have served instead.
    """

    config: AdapterConfig
    deltas: Deltas
    heads: Mapping[str, int]
    others: bool
    earlier: Sequence[AdapterDir] = ()
    confusable: Sequence[AdapterDir] = ()


def scaled(subject: RightAdapter) -> Iterator[FaultyAdapter]:
    """A rule other than PEFT's for the factor in scaling * B @ A."""
    rules: dict[str, Rule] = {
        "the scaling is left out": lambda config, r, s: 1.0,
        "use_rslora is ignored": lambda config, r, s: s / math.sqrt(r) if config.use_rslora else s,
        "alpha_pattern is ignored": lambda config, r, s: config.lora_alpha / (math.sqrt(r) if config.use_rslora else r),
        "use_rslora and alpha_pattern are ignored": lambda config, r, s: config.lora_alpha / r,
        "rank_pattern and alpha_pattern are ignored": lambda config, r, s: (
            config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
        ),
        "use_rslora, rank_pattern and alpha_pattern are ignored": lambda config, r, s: config.lora_alpha / config.r,
        "the scaling is applied twice": lambda config, r, s: s * s,
    }
    seen = {tuple(1.0 for _ in subject.deltas)}
    for words, rule in rules.items():
        factors = {
            module: rule(subject.config, len(delta.a), delta.scaling) / delta.scaling if delta.scaling else 1.0
            for module, delta in subject.deltas.items()
        }
        key = tuple(round(factor, 9) for factor in factors.values())
        if key not in seen:
            seen.add(key)
            deltas = {module: delta.times(factors[module]) for module, delta in subject.deltas.items()}
            low, high = min(key), max(key)
            times = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
            yield FaultyAdapter(SCALED, f"{words} (times {times})", deltas)


def transposed(subject: RightAdapter) -> Iterator[FaultyAdapter]:
    """delta_W of square modules transposed, which no shape check notices."""
    square = {m: d for m, d in subject.deltas.items() if d.a.shape[1] == d.b.shape[0] and not d.is_embedding}
    if square:
        turned = {m: LowRankChange(d.b.mT, d.a.mT, d.scaling) for m, d in square.items()}
        yield FaultyAdapter(TRANSPOSED, "delta_W of every square module is transposed", {**subject.deltas, **turned})


def permuted(subject: RightAdapter) -> Iterator[FaultyAdapter]:
    """Rows of q_proj and k_proj in an order that differs from the base weights'.

    llama.cpp and Meta's own files keep the two halves of a head interleaved for rotary embeddings, transformers keeps
    them apart. Source: `permute` in llama.cpp's convert_hf_to_gguf.py.
    """
    mine = {
        module: delta
        for module, delta in subject.deltas.items()
        if (heads := subject.heads.get(module.rpartition(".")[2])) and len(delta.b) % (2 * heads) == 0
    }
    if not mine:
        return
    for words, order in (("lack the row order of the", (-1, 2)), ("have a row order that is not that of the", (2, -1))):
        moved = {m: replace(d, b=_reordered(d.b, subject.heads[m.rpartition(".")[2]], order)) for m, d in mine.items()}
        detail = f"B of q_proj and k_proj {words} engine's base weights"
        yield FaultyAdapter(PERMUTED, detail, {**subject.deltas, **moved})


def left_out(subject: RightAdapter) -> Iterator[FaultyAdapter]:
    """Modules of one kind are not adapted, or all embeddings, all of attention, or all but attention."""
    kinds = {m: m.rpartition(".")[2] for m in subject.deltas}
    groups = {f"{kind} is not adapted": {kind} for kind in dict.fromkeys(kinds.values())}
    groups["only attention is adapted"] = set(kinds.values()) - set(ATTENTION)
    groups["attention is not adapted"] = set(kinds.values()) & set(ATTENTION)
    embeddings = {kinds[m] for m, d in subject.deltas.items() if d.is_embedding} | ({"lm_head"} & set(kinds.values()))
    groups["embeddings and head are not adapted"] = embeddings
    seen: set[frozenset[str]] = {frozenset(), frozenset(kinds.values())}
    for words, lacking in groups.items():
        if frozenset(lacking) not in seen:
            seen.add(frozenset(lacking))
            yield FaultyAdapter(LEFT_OUT, words, {m: d for m, d in subject.deltas.items() if kinds[m] not in lacking})
    if subject.others:
        yield FaultyAdapter(LEFT_OUT, "fully trained parameters (modules_to_save) are ignored", subject.deltas, False)


def misplaced(subject: RightAdapter) -> Iterator[FaultyAdapter]:
    """Faults of layers: one layer of the adapter is missing, or two neighbours are swapped."""
    layers: dict[int, dict[str, LowRankChange]] = {}
    for module, delta in subject.deltas.items():
        number = LAYER.search(module)
        if number:
            layers.setdefault(int(number[1]), {})[module] = delta
    if len(layers) < 2:
        return
    for layer, mine in sorted(layers.items()):
        rest = {module: delta for module, delta in subject.deltas.items() if module not in mine}
        yield FaultyAdapter(LAYERS, f"layer {layer} is not adapted", rest, layer=layer)
        moved = {_in_layer(module, layer + 1): delta for module, delta in mine.items()}
        back = {_in_layer(module, layer): delta for module, delta in layers.get(layer + 1, {}).items()}
        if moved.keys() == layers.get(layer + 1, {}).keys() and back.keys() == mine.keys():
            detail = f"layers {layer} and {layer + 1} are swapped"
            yield FaultyAdapter(LAYERS, detail, {**subject.deltas, **moved, **back}, layer=layer)


def _in_layer(module: str, layer: int) -> str:
    return LAYER.sub(f".{layer}.", module, count=1)


def exchanged(subject: RightAdapter) -> Iterator[FaultyAdapter]:
    """Another adapter's answers, as if names were crossed, or those of an earlier step of the same run."""
    for fault, adapters in ((STALE, subject.earlier), (ANOTHER, subject.confusable)):
        for adapter in adapters:
            yield FaultyAdapter(fault, f"the answers are those of {adapter.path}", read_lora(adapter), source=adapter)


def rounded(subject: RightAdapter) -> Iterator[FaultyAdapter]:
    """A and B rounded to a coarser number format."""
    for name, format_ in FORMATS.items():
        deltas = {
            m: replace(d, a=format_.weights(d.a), b=format_.weights(d.b / (d.scaling or 1.0)) * (d.scaling or 1.0))
            for m, d in subject.deltas.items()
        }
        yield FaultyAdapter(ROUNDED, f"A and B are rounded to {name}", deltas)


FAULTS: tuple[Callable[[RightAdapter], Iterator[FaultyAdapter]], ...] = (
    scaled,
    transposed,
    permuted,
    left_out,
    misplaced,
    exchanged,
    rounded,
)
"""The faults that PyTorch runs; a new one is a function above and a name here.

An adapter that is not applied at all gives the base model, which has been run already."""


def rescaled(subject: RightAdapter, factor: float) -> Deltas:
    """Every delta multiplied by one factor."""
    return {module: delta.times(factor) for module, delta in subject.deltas.items()}


def _reordered(b: Tensor, heads: int, order: tuple[int, int]) -> Tensor:
    """B (out, r) with the rows of each head, seen as a matrix with `order` rows and columns, transposed."""
    rows, r = b.shape
    size = rows // heads
    shape = [size // 2 if side == -1 else side for side in order]
    return b.reshape(heads, *shape, r).swapaxes(1, 2).reshape(rows, r)
