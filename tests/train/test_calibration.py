"""The training data on which a schedule runs the model before training, without an effect on the training."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from loraover import Budget, LoraOverConfig, OverParameterization, Probe
from loraover.callbacks.calibration import calibration_batches
from loraover.common.errors import ConfigError

from support.tiny_models import tiny_llama, tiny_net, token_ids, with_lora

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


class Counted(Stream):
    """A stream that knows its length, as the Trainer wants it for epochs."""

    def __len__(self) -> int:
        return len(ROWS)


class OnePass(Stream):
    """A stream that goes on where it was left, as one of a socket or a generator does."""

    def __init__(self) -> None:
        self.rest = iter(ROWS)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        yield from self.rest


class Shuffled(Stream):
    """A stream whose order comes from the random state."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (ROWS[i] for i in torch.randperm(len(ROWS)).tolist())


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


def test_a_small_dataset_is_taken_whole() -> None:
    loader = loader_of(ROWS, batch_size=10)
    batches = calibration_batches(loader, 9, seed=1, device="cpu")
    assert sorted(rows_of(batches)) == sorted(row["input_ids"].tolist() for row in ROWS)


@pytest.mark.parametrize("kind", [Stream, Counted])
def test_a_stream_gives_its_first_rows(kind: type[Stream]) -> None:
    loader = loader_of(kind(), batch_size=4)
    assert rows_of(calibration_batches(loader, 2, seed=1, device="cpu")) == [r["input_ids"].tolist() for r in ROWS[:8]]


def test_a_stream_in_random_order_is_no_stream_that_can_be_read_once() -> None:
    drawn = rows_of(calibration_batches(loader_of(Shuffled(), batch_size=4), 2, seed=1, device="cpu"))
    assert len({tuple(row) for row in drawn}) == 8


def test_a_stream_that_can_be_read_only_once_is_refused() -> None:
    """Training would never see the rows that calibration has taken from it."""
    with pytest.raises(ConfigError, match=r"OnePass: .* a second pass over the data begins with another row"):
        calibration_batches(loader_of(OnePass(), batch_size=4), 2, seed=1, device="cpu")


def test_neither_the_random_state_nor_the_loaders_order_changes() -> None:
    def order(look: bool) -> list[Any]:
        torch.manual_seed(3)
        loader = loader_of(ROWS, batch_size=5, shuffle=True, collate_fn=masked)
        if look:
            calibration_batches(loader, 3, seed=1, device="cpu")
        return [batch["input_ids"].tolist() + batch["mask"].tolist() for batch in loader]

    with torch.random.fork_rng(devices=[]):
        assert order(look=True) == order(look=False)


BATCHES = [{"input_ids": batch, "labels": batch} for batch in (token_ids(seed) for seed in range(3))]


def chosen(model: Any, batches: Any = BATCHES, **config: Any) -> dict[str, float]:
    """Scores of a static choice on a language model."""
    config = {"schedule": "static", "score": "fisher", "budget": Budget(sites=4), "calibration_steps": 2} | config
    over = OverParameterization(model, LoraOverConfig(**config), probe=Probe(model, batches))
    return over.schedule.rounds[0].scores


@pytest.mark.parametrize(
    ("draw_b", "backwards", "reentrant", "mode"),
    [(True, 3, False, "train"), (True, 3, True, "eval"), (False, 5, True, "train"), (False, 5, False, "eval")],
)
def test_calibration_checkpoints_as_training_does(draw_b: bool, backwards: int, reentrant: bool, mode: str) -> None:
    """With checkpointing, each backward runs every layer once more; 2 warm-up steps come first where B = 0."""
    model = with_lora(tiny_llama(), task_type="CAUSAL_LM", draw_b=draw_b).train(mode == "train")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    forwards = []
    layers = model.get_base_model().model.layers
    for layer in layers:
        layer.mlp.register_forward_pre_hook(lambda *_: forwards.append(1))
    chosen(model)
    assert len(forwards) == 2 * backwards * len(layers)
    assert {module.training for module in model.modules()} == {mode == "train"}


@pytest.mark.parametrize(
    ("score", "draw_b"), [("fisher", True), ("sensitivity", False), ("loss_impact", True), ("loss_impact", False)]
)
def test_a_choice_with_dropout_depends_on_the_seed_alone(score: str, draw_b: bool) -> None:
    def scores(state: int, seed: int) -> tuple[dict[str, float], Any]:
        random.seed(state)
        np.random.seed(state)
        torch.manual_seed(state)
        model = with_lora(tiny_llama(), task_type="CAUSAL_LM", draw_b=draw_b, lora_dropout=0.5).train()
        found = chosen(model, score=score, seed=seed)
        return found, (random.random(), np.random.rand(), torch.rand(3).tolist())

    def draws(state: int) -> Any:
        random.seed(state)
        np.random.seed(state)
        torch.manual_seed(state)
        return random.random(), np.random.rand(), torch.rand(3).tolist()

    with torch.random.fork_rng(devices=[]):
        first, left = scores(state=1, seed=5)
        assert left == draws(1)
        assert scores(state=2, seed=5)[0] == first
        assert (scores(state=1, seed=6)[0] == first) == (score == "loss_impact" and draw_b)


def test_running_statistics_do_not_move() -> None:
    net = tiny_net()
    base = net.get_base_model()
    base.third = nn.Sequential(nn.BatchNorm1d(8), base.third)
    kept = {name: buffer.clone() for name, buffer in net.named_buffers()}
    probe = Probe(net, [torch.randn(4, 6)], lambda model, x: model(x).square().mean())
    OverParameterization(net.train(), LoraOverConfig(schedule="static", budget=Budget(sites=2)), probe=probe)
    assert len(kept) == 3
    assert all(torch.equal(buffer, kept[name]) for name, buffer in net.named_buffers())
