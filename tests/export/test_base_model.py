"""Which base model the exports use and name, and the commands that they record."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from loraover.common.command_line import run
from loraover.models.load import ModelSource
from loraover.models.stand_in import STAND_INS
from loraover_export.cli import cli
from loraover_export.onnx import genai
from loraover_export.onnx.inputs import read_inputs
from loraover_export.onnx.request import OnnxRequest

from support import onnx_export
from support.make_checkpoint import SERVABLE, Made, edit_json, make_checkpoint, reseal, tree
from support.refusals import Refused
from support.stand_ins import RECORD, adapter_config, as_stand_in, with_other_logits

pytestmark = pytest.mark.process


@pytest.fixture
def trained(tmp_path: Path) -> Made:
    """A checkpoint that was trained on a stand-in."""
    made = make_checkpoint(tmp_path / "made", tokenizer=True, base_options=SERVABLE)
    as_stand_in(made.base)
    return made


COMMANDS: dict[str, tuple[str, ...]] = {
    "fold": ("--check-error",),
    "vllm": (),
    "onnx": ("--mode", "merged", "--no-check"),
}


def export(command: str, source: Path, output: Path, *options: str) -> int:
    words = (*COMMANDS[command], *options)
    if command == "onnx":
        return onnx_export.export(source, output, *words)
    return run(cli, [command, str(source), "-o", str(output), *words])


def card(folder: Path) -> str:
    return (folder / "README.md").read_text()


def test_an_export_of_a_stand_ins_adapter_names_the_stand_in(
    trained: Made, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert export("vllm", trained.path, tmp_path / "out") == 0
    assert "warning: " not in capfd.readouterr().out
    assert f'base_model: "{trained.base}"' in card(tmp_path / "out")
    assert RECORD.sha256 in card(tmp_path / "out")
    assert adapter_config(tmp_path / "out")["base_model_name_or_path"] == str(trained.base)


@pytest.mark.parametrize("command", COMMANDS)
def test_an_export_to_another_base_names_it_and_warns(
    command: str, trained: Made, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = with_other_logits(trained.base, tmp_path / "other")
    assert export(command, trained.path, tmp_path / "out", "--model", str(other)) == 0
    said = re.search(
        r"warning: trained on a (.*)\. The logits of (\S+) differ.* by up to (\S+) ", capfd.readouterr().out
    )
    assert said is not None
    assert (said[1], said[2]) == (str(RECORD), str(other))
    assert float(said[3]) > 1e-3
    assert f'base_model: "{other}"' in card(tmp_path / "out")
    assert f"| {said[3]} |" in card(tmp_path / "out")
    if command != "onnx":
        assert adapter_config(tmp_path / "out")["base_model_name_or_path"] == str(other)
    if command == "vllm":
        (finding,) = json.loads((tmp_path / "out" / "preflight.json").read_text())["findings"]
        assert f"up to {said[3]}" in finding["found"]


def test_a_stand_in_that_is_gone_is_named(
    trained: Made, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STAND_INS, RECORD.stands_for, RECORD)
    gone = str(tmp_path / RECORD.folder.name)
    edit_json(trained.path / "adapter_config.json", lambda config: config.update(base_model_name_or_path=gone))
    edit_json(trained.path / "loraover.json", lambda meta: meta.update(base_model=gone))
    reseal(trained.path)
    for command, options in COMMANDS.items():
        remedy = f"python -m loraover.models.stand_in {RECORD.stands_for}"
        refused(command, trained.path, *options, named=(gone, remedy))
    assert export("fold", trained.path, tmp_path / "out", "--model", str(trained.base)) == 0  # the same elsewhere
    assert run(cli, ["fold", str(trained.path), "-o", str(tmp_path / "folded")]) == 0  # needs no base model
    assert RECORD.sha256 in card(tmp_path / "folded")


def test_an_export_reads_the_revision_that_the_adapter_pins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_checkpoint(tmp_path / "made", tokenizer=True, base_options=SERVABLE, revision="v2")
    asked = []

    def resolve(name: str, revision: str | None = None, **more: object) -> ModelSource:
        asked.append((name, revision))
        return ModelSource(name, name, None, f"{name} at {revision}")

    monkeypatch.setattr("loraover.checkpoint.base_model.resolve_model", resolve)
    for command in ("fold", "vllm"):
        assert export(command, made.path, tmp_path / command) == 0
    read_inputs(OnnxRequest((made.path,), tmp_path / "out", "merged"))
    assert asked == [(str(made.base), "v2")] * 3


# Commands that are recorded


def recorded(folder: Path) -> list[str]:
    """The words of the command in a card."""
    code = re.search(r"```\n(.*)\n```", card(folder))
    assert code is not None
    return shlex.split(code[1])


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("fold", ("--dtype", "bf16", "--model", "{copy}", "--prompts", "{prompts}")),
        ("vllm", ("--dtype", "fp32", "--model", "{copy}", "--name", "other name")),
        ("onnx", ("--model", "{copy}", "--precision", "fp16")),
    ],
)
def test_a_recorded_command_gives_the_same_again(
    command: str,
    options: tuple[str, ...],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(genai, "BuilderProcess", onnx_export.ForkedBuilder)
    made = make_checkpoint(tmp_path / "made", tokenizer=True, base_options=SERVABLE)
    copy = as_stand_in(shutil.copytree(as_stand_in(made.base), tmp_path / "copy"))
    places = {"copy": copy, "prompts": tmp_path / "prompts.txt"}
    (tmp_path / "prompts.txt").write_text("the train leaves at nine\na farmer\n")
    out = tmp_path / "out"
    assert export(command, made.path, out, *(option.format(**places) for option in options), "--json") == 0
    printed, before, words = capfd.readouterr().out, tree(out), recorded(out)
    assert words[:2] == ["loraover", "export"]
    assert RECORD.sha256 in card(out)
    shutil.rmtree(out)
    assert run(cli, [*words[2:], "--json"]) == 0
    assert capfd.readouterr().out == printed
    assert tree(out) == before
