"""DistributedDataParallel: ranks are equal, train as one process would, and send what plain LoRA sends."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch.nn.parallel import DistributedDataParallel

from loraover import OverParameterization
from loraover.common.errors import ConfigError

from support.parallel_run import (
    CONFIGS,
    SCHEDULES,
    STEPS,
    assert_example_folds,
    assert_trained_as_one,
    ddp_run,
    fresh,
    train,
)
from support.processes import ACCELERATE, in_two_processes, launched
from support.tiny_models import tiny_net

pytestmark = pytest.mark.process


def sent(messages: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Without what DDP sends once, behind its first backward, to agree on the order of gradients."""
    return [message for message in messages if message not in [("broadcast_", 28), ("broadcast_", 4)]]


def run(rank: int, schedule: str, **options: Any) -> dict[str, Any]:
    return ddp_run(rank, fresh(schedule), CONFIGS[schedule], probes_inside=schedule == "static-fisher", **options)


@pytest.mark.parametrize(("schedule", "micro_batches"), [("all", 1), *((name, 2) for name in SCHEDULES[1:])])
def test_two_processes_train_as_one_does_at_their_global_batch(
    schedule: str, micro_batches: int, tmp_path: Path
) -> None:
    alone = train(fresh(schedule), CONFIGS[schedule], micro_batches=micro_batches)
    first, second = in_two_processes(lambda rank: run(rank, schedule, micro_batches=micro_batches), tmp_path)
    assert_trained_as_one(alone, first, second)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_step_sends_plain_loras_bytes_and_a_round_its_scores(schedule: str, tmp_path: Path) -> None:
    plain, over = in_two_processes(lambda rank: [run(rank, "plain-lora"), run(rank, schedule)], tmp_path)[0]

    matrices = sum(matrix.nbytes for matrix in over["matrices"].values())
    expected = [[("allreduce_", matrices)] for _ in range(STEPS)]
    assert [sent(messages) for messages in plain["messages"]] == expected
    scores = [("broadcast_", 8 * len(over["matrices"])) for found in over["rounds"] if found["scores"]]
    if schedule == "dynamic":
        for found, message in zip(over["rounds"], scores, strict=True):
            expected[found["step"] - 1].append(message)
        scores = []
    assert [sent(messages) for messages in over["messages"]] == expected
    # Warm-up steps of a static schedule send gradients where they run the wrapped model.
    warm_up = [("allreduce_", matrices)] * 8 if schedule == "static" else []
    assert sent(over["messages_before"]) == warm_up + scores


# Wrappers


def test_cores_made_before_ddp_are_noticed_where_it_writes_rank_zeros_matrices(tmp_path: Path) -> None:
    def work(rank: int) -> str:
        over = OverParameterization(net := tiny_net(seed=rank))
        DistributedDataParallel(net)
        try:
            over.check_unchanged()
        except ConfigError as error:
            return str(error)
        return "unchanged"

    first, second = in_two_processes(work, tmp_path)
    assert first == "unchanged"
    assert second.startswith("6 over-parameterised matrices, first first.lora_A, were changed outside the optimizer")


@pytest.mark.matrix
def test_the_example_leaves_a_plain_lora_whose_checkpoint_folds(tmp_path: Path) -> None:
    assert_example_folds("ddp", tmp_path)


@pytest.mark.matrix
def test_accelerate_launches_the_example(tmp_path: Path) -> None:
    assert_example_folds("ddp", tmp_path, partial(launched, ACCELERATE))
