"""Verification on each engine that is started without a server: right adapters, planted faults, and SmolLM2.

Engines in environments of their own are skipped where LORAOVER_MLX or LORAOVER_OPENVINO names none.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loraover.common.errors import ExportError
from loraover.models.load import resolve_model
from loraover_serve import EngineResult, verify_adapter
from loraover_serve.engines import ENGINES, engine_class
from loraover_serve.engines.elsewhere import ElsewhereEngine
from loraover_serve.judge.limits import ADAPTER
from loraover_serve.judge.names import LEFT_OUT, NOT_APPLIED
from loraover_serve.verify.by_pytorch import verify_engine

from support.compatibility import PEFT
from support.engine_forms import Running, present, skip_unless_installed
from support.make_checkpoint import Made
from support.verified import FAULTS, WRONG_PREFIX, Case, judged, make_case, plant, save_adapter

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("quick_builder")]

APART = [name for name in ENGINES if issubclass(engine_class(name), ElsewhereEngine)]
"""Engines in separate environments, which `make engines` installs."""
HERE = [name for name, entry in ENGINES.items() if not entry.is_batching and name not in (*APART, "torch")]
"""Engines that run in this process, without PyTorch, which `test_verify.py` takes."""
ELSEWHERE = [pytest.param(name, marks=pytest.mark.matrix) for name in APART]
SAVED, EMBEDDING = {"modules_to_save": ["norm"]}, {"target_modules": ["embed_tokens", "q_proj", "down_proj"]}
REFUSING = ("llamacpp", "mlx", "openvino")
"""Engines for which an adapter with fully trained parameters cannot be exported."""
SILENT = {"openvino": "embed_tokens is not adapted"}
"""Engines that leave out an embedding's adapter without a message, and the fault in words."""
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
ALLOWED = {"llamacpp": 2e-4, "mlx": 5e-4, "openvino": 5e-4}
"""Largest difference of a logprob on SmolLM2, whose logits lie within +-40, where one rounding is 2e-6."""
TELLING = ("scaling dropped", "not loaded", "transposed", "permutation dropped")
"""Faults that every run plants; `make test-engines` plants all."""


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> str:
    """Name of an engine; skips the test if it is not installed."""
    name = str(request.param)
    skip_unless_installed(name)
    return name


on_every_engine = pytest.mark.parametrize("engine", [*HERE, *ELSEWHERE], indirect=True)


@on_every_engine
def test_a_checkpoint_is_as_trained(engine: str, made: Made, tmp_path: Path) -> None:
    case = make_case(made.base, made.path)
    found = verify_engine(engine, case.setting(tmp_path), case.models)
    assert found.verdict == "as trained", found.reason
    assert found.compared == ("top tokens" if engine == "openvino" else "all tokens")


@on_every_engine
@pytest.mark.parametrize("lora", [{}, EMBEDDING, SAVED])
def test_an_adapter_is_as_trained(engine: str, lora: dict[str, Any], case: Case, tmp_path: Path) -> None:
    mine = case if not lora else make_case(case.base, save_adapter(tmp_path / "mine", case.base, **lora))
    if lora == SAVED and engine in REFUSING:
        with pytest.raises(ExportError):
            verify_engine(engine, mine.setting(tmp_path), mine.models)
        return
    found = verify_engine(engine, mine.setting(tmp_path), mine.models)
    if lora == EMBEDDING and engine in SILENT:
        assert (found.verdict, found.fault) == ("differs", LEFT_OUT), found.reason
        assert SILENT[engine] in found.reason
        return
    assert found.verdict == "as trained", found.reason


@on_every_engine
@pytest.mark.parametrize(
    "name", [name if name in TELLING else pytest.param(name, marks=pytest.mark.matrix) for name in FAULTS]
)
def test_a_planted_fault_is_found_and_named(engine: str, name: str, case: Case, tmp_path: Path) -> None:
    wrong = plant(FAULTS[name], case.adapter, tmp_path / "wrong")
    found = verify_engine(engine, case.setting(tmp_path, adapter=wrong), case.models)
    assert (found.verdict, found.fault) == ("differs", FAULTS[name].fault), found.reason
    assert FAULTS[name].words in found.reason


@pytest.mark.matrix
@pytest.mark.parametrize("engine", ALLOWED, indirect=True)
def test_smollm2_is_as_trained(engine: str, tmp_path: Path) -> None:
    base = Path(resolve_model(SMOLLM2).location)
    adapter = save_adapter(tmp_path / "mine", base, r=8, rank_pattern={"q_proj": 12})
    (found,) = verify_adapter(adapter, engines=[engine], new_tokens=4).engines
    print(f"\n{engine}: {found.reason}; {found.seconds:.0f} s; {found.base}; {found.adapter}")
    assert (found.verdict, found.number_format) == ("as trained", "fp32"), found.reason
    assert found.base is not None
    assert found.adapter is not None
    assert max(found.base.largest, found.adapter.largest) <= ALLOWED[engine]
    assert found.greedy is not None
    assert found.greedy.gap <= found.greedy.allowed


READERS = ["onnx", pytest.param("vllm", marks=pytest.mark.matrix)]
"""Engines that get PEFT's files, or a graph that is made from them."""


def as_peft_saved_it(engine: str, wrong: Path, case: Case, running: Running, scratch: Path) -> EngineResult:
    """Verify an engine that was given another adapter's files than the judge knows."""
    with present(engine, PEFT, replace(case.setting(scratch), adapters={ADAPTER: wrong}), running) as started:
        answers = started.answers(case.models)
    return judged(answers, case.models)


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
