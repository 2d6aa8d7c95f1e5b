"""Each engine with adapters of each kind, in PEFT's form and in ours: right, refused, or wrong without a message.

The verdicts are verify's, and those of `loraover check` agree with them. `make test-engines` writes them into
docs/compatibility.md.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from loraover.common.errors import LoraOverError
from loraover_export import check_adapter
from loraover_serve.judge.models import Answers
from loraover_serve.verify.by_pytorch import judge_answers

from support.compatibility import FEATURES, FORMS, OURS, PEFT, Cell, record_cell
from support.engine_forms import MATRIX_ENGINES, PEFT_FORM, Running, present, skip_unless_installed
from support.verified import Case, make_case, save_adapter, save_base
from support.vllm_command import leaks_in_mixed_batches

PLAIN: dict[str, Any] = {"use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
LINEAR = ["q_proj", "down_proj"]
OPTIONS: dict[str, dict[str, Any]] = {
    "rsLoRA": PLAIN | {"use_rslora": True},
    "rank pattern": PLAIN | {"rank_pattern": {"q_proj": 6}},
    "alpha pattern": PLAIN | {"alpha_pattern": {"v_proj": 3}},
    "embeddings": PLAIN | {"target_modules": ["embed_tokens", *LINEAR]},
    "tied head": PLAIN | {"target_modules": ["lm_head", *LINEAR]},
}
"""Options of the adapter that has each feature, if they are not those of a plain one."""
SERVERS = ("vllm",)
HEAVY = ("onnx", "vllm", "openvino", "mlx")
"""Engines whose cells only `make test-engines` runs: a graph is built for each, or another process is started."""

CELLS = [
    pytest.param(engine, form, feature, marks=pytest.mark.matrix if engine in HEAVY else pytest.mark.engine)
    for engine in MATRIX_ENGINES
    for form in FORMS
    for feature in FEATURES
    if (form == OURS or engine in PEFT_FORM) and (feature != "mixed batch" or engine in SERVERS)
]
SILENT = {
    *(("llamacpp", PEFT, feature) for feature in ("rsLoRA", "alpha pattern")),
    ("onnx", PEFT, "embeddings"),
    *(("openvino", PEFT, feature) for feature in FEATURES),  # it reads no scaling, and every adapter here has one
    ("openvino", OURS, "embeddings"),
}
"""Cells that are wrong without a message, whatever the engine's version."""
TRIES = 5
"""How often a fault is looked for that shows only where the engine's scheduler puts both models into one batch."""
IN_OTHERS_ANSWERS = {("vllm", form, feature) for form in FORMS for feature in ("tied head", "mixed batch")}
"""Cells in which vLLM before 0.33 applies an adapter to the base model's rows on a CPU: the head's in every batch."""


class Cases:
    """An adapter for each feature, with its judge, made when it is first needed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.of = cache(self._make)

    def _make(self, feature: str) -> Case:
        name = "tied" if feature == "tied head" else "base"
        base = self._folder / name
        if not base.exists():
            save_base(base, tie_word_embeddings=name == "tied")
        return make_case(
            base, save_adapter(self._folder / feature.replace(" ", "-"), base, **OPTIONS.get(feature, PLAIN))
        )


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    return Cases(tmp_path_factory.mktemp("forms"))


@pytest.mark.usefixtures("quick_builder")
@pytest.mark.parametrize(("engine", "form", "feature"), CELLS)
def test_an_engine_is_right_or_known_to_be_wrong(
    engine: str,
    form: str,
    feature: str,
    cases: Cases,
    running: Running,
    tmp_path: Path,
) -> None:
    skip_unless_installed(engine)
    place = (engine, form, feature)
    leaks = place in IN_OTHERS_ANSWERS and leaks_in_mixed_batches()
    expected = place in SILENT or leaks
    for number in range(TRIES if leaks and feature == "mixed batch" else 1):
        scratch = tmp_path / f"{tmp_path.name}-{number}"  # an adapter is served under its folder's name
        scratch.mkdir()
        cell = judged(engine, form, feature, cases.of(feature), running, scratch)
        if cell.verdict == "wrong silently":
            break
    print(f"\n{cell}")
    record_cell(cell)
    assert (cell.verdict == "wrong silently") == expected, cell.reason
    assert cell.verdict != "inconclusive", cell.reason
    if place not in IN_OTHERS_ANSWERS:
        assert cell.verdict == foretold(engine, form, cases.of(feature))


def foretold(engine: str, form: str, case: Case) -> str:
    """The verdict of `loraover check`, which runs nothing, in the words of verify."""
    (check,) = check_adapter(case.adapter, engines=engine, model=case.base).engines
    verdict = (check.as_it_is if form == PEFT else check.exported).verdict
    return "as trained" if verdict == "right" else verdict


def judged(engine: str, form: str, feature: str, case: Case, running: Running, scratch: Path) -> Cell:
    """The verdict on one cell; whatever the export or the engine reports as an error is a refusal."""
    version, answers = None, None
    try:
        with present(engine, form, case.setting(scratch), running) as started:
            version, answers = started.version(), started.answers(case.models)
    except LoraOverError as error:
        return Cell(engine, version, form, feature, "refused", str(error))
    found = judge_answers(engine, considered(answers, feature), case.models)
    verdict = "wrong silently" if found["verdict"] == "differs" else found["verdict"]
    return Cell(engine, version, form, feature, verdict, found["reason"])


def considered(answers: Answers, feature: str) -> Answers:
    """Answers without those in mixed batches, which have a cell of their own."""
    return answers if feature == "mixed batch" else replace(answers, mixed={})
