"""Where and in which type PyTorch runs in a parity run, and what is said where memory does not suffice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loraover.common.errors import ConfigError
from loraover_serve import measure_parity
from loraover_serve.engines import torch as torch_engines
from loraover_serve.parity import collect

from support.devices import ALL_DEVICES
from support.make_checkpoint import Made
from support.no_memory import failing

pytestmark = pytest.mark.engine

SMALL: dict[str, Any] = {"engines": ["torch"], "num_prompts": 10, "prompt_tokens": 5, "new_tokens": 4}


def folded(made: Made) -> Path:
    return made.path.with_name("folded")


@pytest.mark.parametrize("compute_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("device", ALL_DEVICES)
def test_answers_on_a_device_are_those_of_its_unfolded_model(device: str, compute_dtype: str, made: Made) -> None:
    options: dict[str, Any] = {"checkpoint": made.path, "device": device, "compute_dtype": compute_dtype}
    report = measure_parity(folded(made), **options, **SMALL)
    assert (report.device, report.compute_dtype) == (device, compute_dtype)
    assert f"--device {device}" in report.command
    assert (f"--compute-dtype {compute_dtype}" in report.command) == (compute_dtype != "fp32")  # its default
    assert [found.agree for found in report.outputs] == [True]


def test_what_was_measured_outlives_a_comparison_without_memory(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "compare_outputs", failing("the CPU"))
    report = measure_parity(folded(made), device="cpu", **SMALL)
    assert (report.verdict, report.runs[0].blocks) == ("failed", 5)
    assert "the comparison with PyTorch ran out of memory on cpu" in report.reason
    assert "What would fit: device='cpu' compute_dtype='bf16'" in report.reason


def test_an_engine_without_memory_says_what_would_fit(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_engines, "load_model", failing("the CPU"))
    with pytest.raises(ConfigError, match=r"PyTorch ran out of memory on cpu .*What would fit: .*compute_dtype='bf16'"):
        measure_parity(folded(made), device="cpu", **SMALL)


def test_a_device_that_is_not_there_is_refused(made: Made) -> None:
    with pytest.raises(ConfigError, match="there is no cuda:9 here"):
        measure_parity(folded(made), device="cuda:9", **SMALL)
