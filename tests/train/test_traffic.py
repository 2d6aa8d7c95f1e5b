"""The formulas of docs/predict_traffic.py: what each mechanism sends and holds is what is counted in real processes."""

from __future__ import annotations

import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from support.parallel_traffic import CASES, Case
from support.processes import TESTS, TORCHRUN, launched

pytestmark = pytest.mark.process

DOCS = TESTS.parent / "docs"
PREDICTED: Any = runpy.run_path(str(DOCS / "predict_traffic.py"))
KINDS = {
    "allreduce_": "all-reduce",
    "_allgather_base_": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
}
FLAGS = 16
"""Bytes of DeepSpeed's messages on overflow and norms."""
KEPT = 0.02
"""Share of its messages that ZeRO 3 saves with checkpointing, where a recomputed layer ends with what comes next."""


def check(case: Case, found: dict[str, Any], processes: int) -> None:
    """Compare the counts of one process with the formulas."""
    model, width = PREDICTED["Model"](*found["numbers"]), 2 if case.is_short else 4
    expected = PREDICTED["messages"](case.mechanism, model, width=width, checkpointing=case.checkpointing)
    counted: Counter[str] = Counter()
    for name, size in found["messages"].items():
        if name != "broadcast_":  # by which DDP sends a buffer of the rotary embedding
            counted[KINDS[name]] += size
    for kind, size in expected.items():
        saved = KEPT * size if case.checkpointing and case.mechanism == "zero3" else 0
        assert size - saved <= counted[kind] <= size + FLAGS, (kind, counted, expected)
    held = PREDICTED["held"](case.mechanism, model, width=width, processes=processes)
    assert held <= found["held"] <= 1.01 * held  # parts are filled up to equal lengths


@pytest.fixture(scope="module")
def counts(zero_folder: Path) -> list[dict[str, Any]]:
    return [torch.load(zero_folder / f"traffic-{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_processes_send_and_hold_what_is_predicted(case: Case, counts: list[dict[str, Any]]) -> None:
    for found in counts:
        check(case, found[str(case)], 2)


@pytest.mark.matrix
def test_four_processes_send_and_hold_what_is_predicted(tmp_path: Path) -> None:
    launched((*TORCHRUN[:-1], "4"), TESTS / "support" / "parallel_traffic.py", tmp_path)
    for rank in range(4):
        found = torch.load(tmp_path / f"traffic-{rank}.pt")
        for case in CASES:
            check(case, found[str(case)], 4)


def test_messages_that_go_round_in_a_ring() -> None:
    found = {"all-reduce": 800, "all-gather": 400, "reduce-scatter": 80}
    assert PREDICTED["sent"](found, 1) == 0
    assert PREDICTED["sent"](found, 4) == 0.75 * (1600 + 400 + 80)


def test_the_page_has_the_table_that_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    PREDICTED["main"]()
    assert capsys.readouterr().out in (DOCS / "scale.md").read_text()
