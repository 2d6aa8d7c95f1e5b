"""A tiny model that takes long prompts, with two versions of an adapter and their reference with long questions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from loraover_serve.judge.limits import ADAPTER, BASE
from loraover_serve.judge.models import Model
from loraover_serve.judge.reference import Reference, read_reference

from support.planted_faults import save_sharp_base
from support.recorded import record
from support.verified import Planted, plant, save_adapter

EARLIER = Planted("", "", {}, lambda tensors: {key: t / 2 if "lora_B" in key else t for key, t in tensors.items()})


@dataclass(frozen=True)
class LongCase:
    """An adapter, its earlier version with half of its change, their base model, and the adapter's reference."""

    base: Path
    adapter: Path
    earlier: Path
    recorded: Path

    @cached_property
    def reference(self) -> Reference:
        return read_reference(self.recorded)

    @property
    def caches(self) -> Reference:
        assert self.reference.caches is not None
        return self.reference.caches

    @property
    def right(self) -> dict[str, Model]:
        return {BASE: self.caches.base, ADAPTER: self.caches.adapter}


def make_long_case(folder: Path) -> LongCase:
    base = save_sharp_base(folder / "base", max_position_embeddings=1024)
    adapter = save_adapter(folder / "shop", base)
    earlier = plant(EARLIER, adapter, folder / "earlier")
    return LongCase(base, adapter, earlier, record(base, adapter, folder, long=True, earlier=earlier))
