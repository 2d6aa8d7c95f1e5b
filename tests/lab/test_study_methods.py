"""`loraover study` with methods beside plain LoRA and LoRA-Over."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from loraover.cli import cli
from loraover.common.command_line import run
from loraover.training.recipe import load_recipe
from loraover_lab.study.outcome import execute
from loraover_lab.study.report import StudyReport

pytest.importorskip("opacus", reason="the extra private is not installed")

pytestmark = pytest.mark.process

METHODS = [
    "lora",
    "soma:soma.frozen_blocks=1",
    "lorasc:lorasc.stages=3:lorasc.noise=0.1",
    "federated:r=2",
    "tensorguide:tensorguide.tt_rank=2",
]


def test_the_report_has_the_rank_and_bytes_that_each_method_serves(recipe: Path, tmp_path: Path) -> None:
    words = ["study", str(recipe), "--methods", ",".join(METHODS), "--seeds", "1", "--lr-sweep", "1e-3"]
    assert run(cli, [*words, "-o", str(tmp_path / "out")]) == 0
    report = StudyReport.model_validate_json((tmp_path / "out" / "study.json").read_text())
    methods = {result.method: result for result in report.tasks[0].methods}
    assert {method: methods[method].served_rank for method in METHODS} == dict(
        zip(METHODS, (4, 8, 12, 2, 4), strict=True)
    )
    lora, soma, lorasc, federated, tensorguide = (methods[method] for method in METHODS)
    assert lora.served_bytes == 4 * lora.served_parameters == 4 * lora.trained_parameters
    assert soma.trained_parameters * 2 == soma.served_parameters == lora.served_parameters  # half of the blocks
    assert lorasc.served_bytes == 3 * (lora.served_bytes or 0)
    assert federated.trained_parameters < federated.served_parameters
    assert tensorguide.trained_parameters < tensorguide.served_parameters == lora.served_parameters
    table = (tmp_path / "out" / "study.md").read_text()
    assert "| served rank | served bytes |" in table
    assert f"| 12 | {lorasc.served_bytes:,} |" in table
    assert "<th" in (page := (tmp_path / "out" / "study.html").read_text())
    assert "served rank" in page


def test_a_run_that_cannot_be_resumed_starts_again(recipe: Path, tmp_path: Path) -> None:
    asked = load_recipe(str(recipe), {"method": "federated", "training.max_steps": 2})
    folder = tmp_path / "run"
    folder.mkdir()
    text = yaml.safe_dump(asked.model_dump(mode="json"))
    (folder / "recipe.yaml").write_text(text)  # as a process leaves it that was killed
    folder.with_suffix(".yaml").write_text(text)
    assert execute(asked, folder, 1).nats
