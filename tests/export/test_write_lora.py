"""The writer of plain LoRAs, without a command above it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from loraover.common.errors import ExportError
from loraover_export.numerics.delta import Delta
from loraover_export.uniform.write_lora import Approximation, LoraOutput, write_lora

from strategies import normal


def test_two_deltas_of_one_module_are_refused(tmp_path: Path) -> None:
    """The file would keep the last one only."""
    deltas = [Delta.of_factors("layer", False, normal(k, 5, 2), normal(k + 10, 2, 3)) for k in range(2)]
    work = [partial(Approximation.exact, delta) for delta in deltas]
    target = LoraOutput(tmp_path / "out", "command", "title", {}, [tmp_path / "source"], None)
    with pytest.raises(ExportError, match="source: two deltas belong to layer"):
        write_lora(work, len(work), target)
    assert list(tmp_path.iterdir()) == []
