"""Bases in several processes: rank 0's, so that processes stay equal bit for bit, with DDP and with FSDP2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from loraover import LoraOverConfig
from loraover.overparam import covariances, eigenbases

from support.parallel_run import STEPS, ddp_run, deviation, equal, fsdp_run, model, train
from support.processes import in_two_processes

pytestmark = pytest.mark.process

BASES: Any = eigenbases  # their imports are replaced here
MEASURED: Any = covariances

OPTIONS: dict[str, dict[str, Any]] = {
    "gradient": {"block": 3, "growth": 1},
    "calibration": {"short": "calibration", "long": "calibration", "block": 3},
    "both": {"long": "calibration", "growth": 1, "refresh": 2},
}
by_source = pytest.mark.parametrize("source", OPTIONS)

# As in test_eigen: directions that are off by 1e-8 of each other, over fewer steps.
TOLERANCE = 1e-9


def config(source: str) -> LoraOverConfig:
    return LoraOverConfig(decomposition="eigen", options=OPTIONS[source])


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@by_source
def test_two_processes_train_as_one_does_at_their_global_batch(source: str, kind: str, tmp_path: Path) -> None:
    alone = train(model(), config(source), micro_batches=2)
    run = ddp_run if kind == "ddp" else fsdp_run
    first, second = in_two_processes(lambda rank: run(rank, model(), config(source), micro_batches=2), tmp_path)
    assert equal(first["matrices"], second["matrices"])
    assert equal(first["cores"], second["cores"])
    assert deviation(first["matrices"], alone["matrices"]) < TOLERANCE
    start = {name: matrix.detach() for name, matrix in model().named_parameters() if "lora_" in name}
    assert all((matrix - start[name]).abs().max() > 1e-2 for name, matrix in alone["matrices"].items())


def disagreeing(rank: int) -> None:
    """Eigenvectors whose signs, and of two nearly equal ones the order, are not those of the other process."""

    def changed(vectors: Tensor) -> Tensor:
        signs = torch.where(torch.arange(vectors.shape[-1]) % 2 == 0, 1.0, -1.0).to(vectors.dtype)
        return vectors * signs if rank == 1 else vectors

    def iterated(*args: Any) -> tuple[Tensor, Tensor]:
        new, order = next_eigenvectors(*args)
        if rank == 1 and new.shape[-1] > 1:
            places = [1, 0, *range(2, new.shape[-1])]
            new, order = new[..., places], order[..., places]
        return changed(new), order

    eigenvectors, next_eigenvectors = BASES.eigenvectors, BASES.next_eigenvectors
    BASES.eigenvectors = lambda *args: changed(eigenvectors(*args))
    MEASURED.eigenvectors = lambda *args: changed(eigenvectors(*args))
    BASES.next_eigenvectors = iterated


@by_source
def test_processes_whose_eigenvectors_differ_stay_equal(source: str, tmp_path: Path) -> None:
    """Each process is a fork, so that what is changed in it stays there."""

    def work(rank: int) -> dict[str, Any]:
        disagreeing(rank)
        return ddp_run(rank, model(), config(source))

    first, second = in_two_processes(work, tmp_path)
    assert equal(first["cores"], second["cores"])
    assert equal(first["matrices"], second["matrices"])


def test_only_a_refresh_sends_more_than_plain_lora(tmp_path: Path) -> None:
    once = LoraOverConfig(decomposition="eigen", options={"refresh": 3, "growth": None})

    def work(rank: int) -> list[dict[str, Any]]:
        nets = [DistributedDataParallel(model()) for _ in range(2)]
        return [train(net, each, rank=rank, world=2) for net, each in zip(nets, (None, once), strict=True)]

    plain, over = in_two_processes(work, tmp_path)[0]
    more = [len(b) - len(a) for a, b in zip(plain["messages"], over["messages"], strict=True)]
    assert more[2] > 0
    assert [count for step, count in enumerate(more) if step != 2] == [0] * (STEPS - 1)
    assert over["messages_before"] == []
