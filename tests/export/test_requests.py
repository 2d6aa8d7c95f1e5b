"""Requests check themselves when they are made, and each command shows examples that it accepts."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

import loraover_export
from loraover.common.command_line import Command, run
from loraover.common.errors import ConfigError
from loraover_export import export_onnx, export_vllm, fold_checkpoint
from loraover_export.cli import COMMANDS, cli
from loraover_export.fold.request import FoldRequest
from loraover_export.onnx.request import OnnxRequest
from loraover_export.vllm.request import VllmRequest

OUT = Path("out")


def command(name: str) -> Command:
    found = cli.get_command(click.Context(cli), name)
    assert isinstance(found, Command)
    return found


@pytest.mark.parametrize("options", [{"model": "x"}, {"prompts": Path("x")}], ids=str)
def test_options_of_the_check_need_the_check(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--check-error"):
        FoldRequest(Path("in"), OUT, **options)
    FoldRequest(Path("in"), OUT, check_error=True, **options)


@pytest.mark.parametrize("name", ["", " ", "a\nb", "\x1b[31m"])
def test_a_name_that_no_request_could_carry_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"--name: .* cannot be sent in a request"):
        VllmRequest(Path("in"), OUT, name=name)
    with pytest.raises(ConfigError, match=r"--name: .* cannot be sent in a request"):
        VllmRequest(Path("in"), OUT / (name or "\t"))


FIRST, SECOND = Path("first"), Path("second")
WRONG: dict[str, tuple[tuple[Path, ...], dict[str, Any], str]] = {
    "no source": ((), {"mode": "swappable"}, "SOURCE: expected one adapter at least"),
    "two sources": ((FIRST, SECOND), {"mode": "merged"}, "--mode merged takes one SOURCE, found 2"),
    "a graph": ((FIRST,), {"mode": "merged", "graph": Path("g")}, "--graph .* --mode swappable"),
    "names": ((FIRST,), {"mode": "swappable", "names": ("a", "b")}, "--name is given 2 times for 1 sources"),
    "one name": ((FIRST, Path("x/first")), {"mode": "swappable"}, "'first'.* --name"),
    "spaces": ((Path("my first adapter"),), {"mode": "swappable"}, "'my first adapter'.* --name"),
    "mode": ((FIRST,), {"mode": "fused"}, "--mode: found 'fused', expected one of merged, swappable"),
    "a name of no file": ((FIRST,), {"mode": "merged", "names": ("a",)}, "--name .* --mode swappable"),
    "precision": ((FIRST,), {"mode": "merged", "precision": "bf16"}, "--precision: .*'bf16'.* fp32, fp16, int4"),
    "device": ((FIRST,), {"mode": "merged", "device": "tpu"}, "--device: .*'tpu'.* cpu, cuda"),
}


@pytest.mark.parametrize("case", WRONG)
def test_arguments_that_contradict_one_another_are_refused(case: str) -> None:
    sources, options, message = WRONG[case]
    with pytest.raises(ConfigError, match=message):
        OnnxRequest(sources, OUT, **options)


@pytest.mark.parametrize("name", ["", ".", "..", "../up", "/etc/name", "a b", "-a", "ä", "a" * 101, "a\n", "a\x1b[31m"])
def test_a_name_that_is_no_file_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot be the name of an adapter's file.* --name"):
        OnnxRequest((FIRST,), OUT, "swappable", names=(name,))


def test_a_merged_graph_has_no_adapter_to_name() -> None:
    assert OnnxRequest((Path("my first adapter"),), OUT, "merged").adapter_names == ("my first adapter",)


def test_library_functions_refuse_what_their_requests_refuse(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--check-error"):
        fold_checkpoint("in", tmp_path / "out", model="x")
    with pytest.raises(ConfigError, match="'int8', expected one of fp32"):
        fold_checkpoint("in", tmp_path / "out", dtype="int8")
    with pytest.raises(ConfigError, match="'int8', expected one of fp32"):
        export_vllm("in", tmp_path / "out", dtype="int8")
    with pytest.raises(ConfigError, match="found 2"):
        export_onnx(["a", "b"], tmp_path / "out", mode="merged")
    with pytest.raises(ConfigError, match="'fused'"):
        export_onnx("in", tmp_path / "out", mode="fused")
    assert list(tmp_path.iterdir()) == []


# Help


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_shows_examples_that_parse(name: str) -> None:
    shown = CliRunner().invoke(cli, [name, "--help"]).output
    assert command(name).examples
    for example in command(name).examples:
        assert example in shown
        program, stage, verb, *words = shlex.split(example)
        assert (program, stage, verb) == ("loraover", "export", name)
        context = command(name).make_context(name, words)
        assert context.params.get("output", "a command that writes nothing")


@pytest.mark.parametrize("option", ["--base m", "--base=m"])
@pytest.mark.parametrize("name", ["fold", "onnx"])
def test_the_old_spelling_is_refused_with_the_new_one(
    name: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(cli, [name, "in", "-o", "out", *option.split()]) == 2
    assert "--base is now called --model." in capsys.readouterr().err


@pytest.mark.parametrize(("name", "key", "long"), [("fold", "dtype", "bfloat16"), ("vllm", "dtype", "float16")])
def test_data_types_have_two_spellings(name: str, key: str, long: str) -> None:
    short = {"bfloat16": "bf16", "float16": "fp16"}[long]
    assert command(name).make_context(name, ["in", "-o", "out", "--dtype", long]).params[key] == short


def test_public_names_are_the_listed_ones() -> None:
    for name in loraover_export.__all__:
        assert getattr(loraover_export, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = loraover_export.nothing
