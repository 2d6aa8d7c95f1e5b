"""The training data that a schedule may look at before the run, which must not notice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainingArguments

from loraover import Budget, LoraOverCallback, LoraOverConfig
from loraover.callback import calibration_batches

from tiny_models import tiny_llama, token_ids, with_lora

ROWS = [{"input_ids": row, "labels": row} for row in token_ids(seed=7, batch=24)]


def loader_of(rows: Any, **options: Any) -> DataLoader[Any]:
    return DataLoader(rows, **({"collate_fn": stack} | options))


def stack(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def masked(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """As a collator for masked language modelling draws."""
    batch = stack(rows)
    return batch | {"mask": torch.rand(batch["input_ids"].shape) < 0.5}


class Stream(IterableDataset[dict[str, Tensor]]):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(ROWS)


def rows_of(batches: list[dict[str, Tensor]]) -> list[Any]:
    return [row for batch in batches for row in batch["input_ids"].tolist()]


def test_batches_are_drawn_by_the_seed_without_repetition() -> None:
    loader = loader_of(ROWS, batch_size=5, shuffle=True)
    batches = calibration_batches(loader, 3, seed=1, device="cpu")
    assert [len(batch["labels"]) for batch in batches] == [5, 5, 5]
    rows = rows_of(batches)
    assert len({tuple(row) for row in rows}) == 15
    assert rows_of(calibration_batches(loader, 3, seed=1, device="cpu")) == rows
    assert rows_of(calibration_batches(loader, 3, seed=2, device="cpu")) != rows


def test_what_is_no_tensor_stays_in_its_batch() -> None:
    rows = [row | {"text": "a"} for row in ROWS]
    loader = loader_of(rows, batch_size=2, collate_fn=lambda rows: {"text": [row["text"] for row in rows]})
    assert calibration_batches(loader, 1, seed=1, device="cpu") == [{"text": ["a", "a"]}]


def test_a_small_dataset_is_taken_whole() -> None:
    loader = loader_of(ROWS, batch_size=10)
    batches = calibration_batches(loader, 9, seed=1, device="cpu")
    assert sorted(rows_of(batches)) == sorted(row["input_ids"].tolist() for row in ROWS)


def test_a_stream_gives_its_first_rows() -> None:
    loader = loader_of(Stream(), batch_size=4)
    assert rows_of(calibration_batches(loader, 2, seed=1, device="cpu")) == [r["input_ids"].tolist() for r in ROWS[:8]]


def test_neither_the_random_state_nor_the_loaders_order_changes() -> None:
    def order(look: bool) -> list[Any]:
        torch.manual_seed(3)
        loader = loader_of(ROWS, batch_size=5, shuffle=True, collate_fn=masked)
        if look:
            calibration_batches(loader, 3, seed=1, device="cpu")
        return [batch["input_ids"].tolist() + batch["mask"].tolist() for batch in loader]

    with torch.random.fork_rng(devices=[]):
        assert order(look=True) == order(look=False)


@pytest.mark.parametrize("score", ["fisher", "loss_impact"])
def test_a_static_run_of_the_trainer_sees_the_data_that_a_plain_one_sees(score: str, tmp_path: Path) -> None:
    def seen(callbacks: list[Any]) -> list[Any]:
        model = with_lora(tiny_llama(), task_type="CAUSAL_LM", lora_dropout=0.1)
        batches: list[Any] = []

        def watch(module: Any, args: Any, kwargs: dict[str, Tensor]) -> None:
            if module.training:
                batches.append(kwargs["labels"].tolist())

        model.register_forward_pre_hook(watch, with_kwargs=True)
        args = TrainingArguments(
            str(tmp_path), max_steps=3, per_device_train_batch_size=4, report_to="none", use_cpu=True, disable_tqdm=True
        )
        Trainer(model, args, train_dataset=ROWS, callbacks=callbacks).train()
        return batches

    callback = LoraOverCallback(LoraOverConfig(schedule="static", score=score, budget=Budget(fraction=0.25)))
    plain = seen([])
    assert len(plain) == 3
    assert seen([callback]) == plain
    assert callback.over is not None
    assert len(callback.over.injected) == 7
