"""Data sets by name, in place of the hub's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import datasets
import pytest

import loraover.data.sources
from loraover.common.errors import ConfigError


class DataHub:
    """A hub that knows these data sets, and is asked in the place of the real one until the patch is undone."""

    def __init__(self, patch: pytest.MonkeyPatch, **sets: Sequence[Any] | Mapping[str, Sequence[Any]]) -> None:
        self.sets = {name.replace("__", "/"): rows for name, rows in sets.items()}
        self.asked: list[tuple[str, str | None]] = []
        self.loaded: list[tuple[Any, ...]] = []
        self.streamed: list[int] = []
        """Rows that were read of streams."""
        self.counts: dict[str, int] = {}
        """Number of rows that the hub says each split has."""
        self.version = 1
        self.unreachable: Exception | None = None
        self.unreadable: Exception | None = None
        patch.setattr(loraover.data.sources, "pinned_commit", self._pinned_commit)
        patch.setattr(datasets, "load_dataset", self._load_dataset)
        patch.setattr(datasets, "load_dataset_builder", self._load_dataset_builder)

    def commit(self, name: str, version: int | None = None) -> str:
        """Commit of a set, the newest one unless another version is named."""
        return f"{name.encode().hex():0<38}"[:38] + f"{version or self.version:02}"

    def _pinned_commit(self, name: str, revision: str | None, kind: str) -> str:
        self.asked.append((name, revision))
        if self.unreachable is not None:
            raise self.unreachable
        commits = [self.commit(name, version) for version in range(1, self.version + 1)]
        if name not in self.sets or revision not in (None, "v1", *commits):
            raise ConfigError(f"{kind} {name!r} at revision {revision or 'main'}: the hub refuses it.")
        return revision if revision in commits else commits[-1]

    def _load_dataset(self, name: str, subset: str | None, *, split: str, revision: str, streaming: bool) -> Any:
        if self.unreadable is not None:
            raise self.unreadable
        self.loaded.append((name, subset, split, revision))
        rows = self.sets[name]
        found = datasets.Dataset.from_list(list(rows[split] if isinstance(rows, Mapping) else rows))
        return found.to_iterable_dataset().map(self._note, with_indices=True) if streaming else found

    def _load_dataset_builder(self, name: str, *_: Any, **__: Any) -> Any:
        splits = {split: SimpleNamespace(num_examples=count) for split, count in self.counts.items()}
        return SimpleNamespace(info=SimpleNamespace(splits=splits))

    def _note(self, row: dict[str, Any], number: int) -> dict[str, Any]:
        self.streamed.append(number)
        return row
