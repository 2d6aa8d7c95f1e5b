"""Batches of training data on which the model is run before training."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import IterableDataset

from loraover.common.errors import ConfigError
from loraover.overparam.probe import seeded


def calibration_batches(dataloader: Any, count: int, seed: int, device: Any) -> list[Any]:
    """Draw batches of training data without changing the data loader's state or the random state.

    Args:
        dataloader: The Trainer's data loader, whose data set and collator are used.
        count: Number of batches; fewer if the data set is too small.
        seed: Seed by which rows are drawn.
        device: Device to put the batches on.

    Raises:
        ConfigError: The data set is a stream that cannot be read twice.
    """
    size = getattr(dataloader.batch_sampler, "batch_size", None) or dataloader.batch_size or 1
    dataset = dataloader.dataset
    with seeded(seed, []):  # a dataset may draw crops, a collator masks
        if hasattr(dataset, "__len__") and not isinstance(dataset, IterableDataset):
            chosen = random.Random(seed).sample(range(len(dataset)), min(count * size, len(dataset)))
            rows = [dataset[i] for i in chosen]
        else:
            rows = list(islice(iter(dataset), count * size))
            _check_begins_anew(dataset, rows, seed)
        batches = [dataloader.collate_fn(rows[i : i + size]) for i in range(0, len(rows), size)]
    return [send_to_device(batch, device) for batch in batches]


def _check_begins_anew(stream: Iterable[Any], rows: list[Any], seed: int) -> None:
    """Raise ConfigError if a second pass over a stream does not begin where the first did, with the same seed."""
    with seeded(seed, []):
        again = list(islice(iter(stream), 1))
    if not _same(rows[:1], again):
        raise ConfigError(
            f"the training data, a {type(stream).__name__}: the model is run on its first {len(rows)} rows before "
            "training, and a second pass does not begin with the row that the first began with, so training would "
            "get other rows. Use a stream whose every pass begins anew in the same order, or a data set with a length "
            "and an index; or choose a schedule and options that do not run the model beforehand."
        )


def _same(one: Any, other: Any) -> bool:
    """Whether two rows are equal; objects that cannot be compared are."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    equality: Any = type(one).__eq__
    return equality is object.__eq__ or bool(one == other)
