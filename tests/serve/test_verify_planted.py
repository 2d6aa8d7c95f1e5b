"""Faults planted in what an engine itself reads: a wrong prefix on each engine, and every fault on a running vLLM.

`test_verify_engines.py` plants the others on the engines that run without a server.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from loraover_serve import EngineResult
from loraover_serve.engines.answers import ADAPTER
from loraover_serve.judge.names import NOT_APPLIED

from support.compatibility import PEFT
from support.engine_forms import Running, present, skip_unless_installed
from support.verified import FAULTS, WRONG_PREFIX, Case, judged, plant

pytestmark = pytest.mark.engine

READERS = ["onnx", pytest.param("vllm", marks=pytest.mark.matrix)]
"""Engines that get PEFT's files, or a graph that is made from them."""


def as_peft_saved_it(engine: str, wrong: Path, case: Case, running: Running, scratch: Path) -> EngineResult:
    """Verify an engine that was given another adapter's files than the judge knows."""
    with present(engine, PEFT, replace(case.setting(scratch), adapters={ADAPTER: wrong}), running) as started:
        answers = started.answers(case.models)
    return judged(answers, case.models)


@pytest.mark.usefixtures("quick_builder")
@pytest.mark.parametrize("engine", READERS)
@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_a_wrong_prefix_is_named(engine: str, case: Case, running: Running, tmp_path: Path) -> None:
    skip_unless_installed(engine)
    wrong = plant(WRONG_PREFIX, case.adapter, tmp_path / "wrong")
    found = as_peft_saved_it(engine, wrong, case, running, tmp_path)
    assert (found.verdict, found.fault) == ("differs", NOT_APPLIED), found.reason


@pytest.mark.matrix
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_on_a_running_vllm(name: str, case: Case, running: Running, tmp_path: Path) -> None:
    wrong = plant(FAULTS[name], case.adapter, tmp_path / "wrong")
    found = as_peft_saved_it("vllm", wrong, case, running, tmp_path)
    assert (found.verdict, found.fault) == ("differs", FAULTS[name].fault), found.reason
    assert FAULTS[name].words in found.reason
