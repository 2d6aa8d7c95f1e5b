"""`loraover schedule`: decisions, map and picture of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.optim import AdamW

from loraover import Budget, LoraOverConfig, OverParameterization, read_checkpoint, write_checkpoint
from loraover.cli import cli
from loraover.common.command_line import run
from loraover.reporting.schedule_map import placed

from support.tiny_models import tiny_gpt2, tiny_llama, tiny_t5, token_ids, trainable, with_lora

pytestmark = pytest.mark.process


def trained(folder: Path, config: LoraOverConfig, *, is_t5: bool = False) -> Path:
    """A checkpoint after 6 steps of 10."""
    model = with_lora(tiny_t5() if is_t5 else tiny_llama(), task_type="SEQ_2_SEQ_LM" if is_t5 else "CAUSAL_LM")
    over = OverParameterization(model, config, steps=10)
    optimizer = AdamW(trainable(model), lr=1e-2)
    over.attach(optimizer)
    ids = token_ids()
    for _ in range(6):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    write_checkpoint(folder, over, step=6)
    return folder


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LoraOverConfig(schedule="dynamic", budget=Budget(fraction=0.5), rounds=2, start=0.2, end=0.5)
    return trained(tmp_path_factory.mktemp("dynamic") / "checkpoint", config)


def test_every_decision_is_shown(dynamic: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cli, ["schedule", str(dynamic)]) == 0
    shown = capsys.readouterr().out
    assert "dynamic by fisher: 14 over-parameterised matrices" in shown
    lines = [line.split() for line in shown.splitlines()]
    assert [line[:3] for line in lines if line[:1] in (["1"], ["2"]) and len(line) == 7] == [
        ["1", "2", "7"],
        ["2", "5", "7"],
    ]


def test_json_has_all_scores(dynamic: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cli, ["schedule", str(dynamic), "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert (len(first["scores"]), len(second["scores"])) == (28, 21)
    assert set(first["chosen"]).isdisjoint(second["chosen"])
    for matrix in "AB":
        scores = {name: score for name, score in first["scores"].items() if name.endswith(matrix)}
        chosen = [name for name in first["chosen"] if name.endswith(matrix)]
        assert set(chosen) == set(sorted(scores, key=lambda name: -scores[name])[: len(chosen)])


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_a_picture_is_written_once(
    dynamic: Path, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / f"map.{kind}"
    assert run(cli, ["schedule", str(dynamic), "--plot", str(picture)]) == 0
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG" if kind == "png" else b"<?xml")
    assert run(cli, ["schedule", str(dynamic), "--plot", str(picture)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert picture.read_bytes() == content


def test_a_picture_of_another_type_is_refused(
    dynamic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(cli, ["schedule", str(dynamic), "--plot", str(tmp_path / "map.docx")]) == 2
    assert ".svg or .png" in capsys.readouterr().err


def test_a_checkpoint_without_a_schedule_is_all_of_round_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = trained(tmp_path / "all", LoraOverConfig(sites=["*q_proj*"]))
    assert run(cli, ["schedule", str(folder), "--plot", str(tmp_path / "map.svg")]) == 0
    assert "schedule all: 4 over-parameterised" in capsys.readouterr().out
    assert set(placed(read_checkpoint(folder).meta).values()) == {1}


def test_encoder_and_decoder_have_rows_of_their_own(tmp_path: Path) -> None:
    folder = trained(tmp_path / "t5", LoraOverConfig(), is_t5=True)
    layers = list(dict.fromkeys(place.layer for place in placed(read_checkpoint(folder).meta)))
    assert layers == ["encoder 0", "encoder 1", "decoder 0", "decoder 1"]


@pytest.mark.parametrize("base", [tiny_llama, tiny_t5, tiny_gpt2])
def test_every_matrix_has_a_place_of_its_own(base: Callable[[], Any], tmp_path: Path) -> None:
    over = OverParameterization(model := with_lora(base()))
    model.save_pretrained(tmp_path)
    write_checkpoint(tmp_path, over, step=0)
    assert len(placed(read_checkpoint(tmp_path).meta)) == len(over.sites)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cli, ["schedule", str(tmp_path / "nothing")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_scores_below_zero_can_be_drawn(tmp_path: Path) -> None:
    config = LoraOverConfig(schedule="dynamic", score="inverse", budget=Budget(sites=2), rounds=1, start=0.2, end=0.2)
    folder = trained(tmp_path / "inverse", config)
    assert run(cli, ["schedule", str(folder), "--plot", str(tmp_path / "map.svg")]) == 0
