"""Requests check themselves when they are made, and exports check their outputs before they work."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import pytest

import loraover_export
from loraover.adapters.combine.requests import DiffRequest
from loraover.adapters.convert.request import ConvertRequest
from loraover.common.command_line import Command, run
from loraover.common.errors import ConfigError
from loraover.common.request import Request
from loraover_export.cli import cli
from loraover_export.publishing import PRODUCTS
from loraover_export.requests import FoldRequest, GgufRequest, OnnxRequest, VllmRequest

from support.make_checkpoint import SERVABLE, make_checkpoint
from support.refusals import Refused

OUT = Path("out")


def command(name: str) -> Command:
    found = cli.get_command(click.Context(cli), name)
    assert isinstance(found, Command)
    return found


CHECKS: dict[str, tuple[Callable[..., Request], str, str]] = {
    "fold": (partial(FoldRequest, "in", OUT), "check_error", "model prompts device compute_dtype"),
    "convert": (partial(ConvertRequest, "in", OUT), "check_error", "prompts device compute_dtype"),
    "diff": (partial(DiffRequest, "in", "other"), "logits", "model prompts device compute_dtype"),
    "onnx": (partial(OnnxRequest, "in", OUT, "merged"), "check", "check_device compute_dtype"),
    "gguf": (partial(GgufRequest, "in", OUT), "base_gguf", "threads"),
}


@pytest.mark.parametrize(
    ("name", "argument"), [(name, word) for name, (*_, words) in CHECKS.items() for word in words.split()]
)
def test_arguments_of_a_check_need_the_check(name: str, argument: str) -> None:
    request, switch, _ = CHECKS[name]
    given = {argument: {"compute_dtype": "bf16", "threads": 1}.get(argument, "cpu")}
    with pytest.raises(ConfigError, match=rf"^{argument}\b.* {switch}\b"):
        request(**{switch: None if name == "gguf" else False}, **given)
    request(**{switch: True if name != "gguf" else "base.gguf"}, **given)


@pytest.mark.parametrize("name", ["", " ", "a\nb", "\x1b[31m"])
def test_a_name_that_no_request_could_carry_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"name: .* cannot be sent in a request"):
        VllmRequest("in", OUT, name=name)
    with pytest.raises(ConfigError, match=r"name: .* cannot be sent in a request"):
        VllmRequest("in", OUT / (name or "\t"))


FIRST, SECOND = Path("first"), Path("second")
WRONG: dict[str, tuple[tuple[Path, ...], dict[str, Any], str]] = {
    "two sources": ((FIRST, SECOND), {"mode": "merged"}, "mode='merged' takes one adapter, found 2"),
    "a graph": ((FIRST,), {"mode": "merged", "graph": "g"}, "graph: for mode='swappable' only"),
    "names": ((FIRST,), {"mode": "swappable", "names": ("a", "b")}, "names is given 2 times for 1 sources"),
    "one name": ((FIRST, Path("x/first")), {"mode": "swappable"}, "'first'.* names"),
    "spaces": ((Path("my first adapter"),), {"mode": "swappable"}, "'my first adapter'.* names"),
    "a name of no file": ((FIRST,), {"mode": "merged", "names": ("a",)}, "names: for mode='swappable' only"),
    "web on a GPU": ((FIRST,), {"mode": "swappable", "web": True, "device": "cuda"}, "web .*found device='cuda'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_arguments_that_contradict_one_another_are_refused(case: str) -> None:
    sources, options, message = WRONG[case]
    with pytest.raises(ConfigError, match=message):
        OnnxRequest(sources, OUT, **options)


@pytest.mark.parametrize("name", ["", ".", "..", "../up", "/etc/name", "a b", "-a", "ä", "a" * 101, "a\n", "a\x1b[31m"])
def test_a_name_that_is_no_file_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot be the name of an adapter's file.* names"):
        OnnxRequest((FIRST,), OUT, "swappable", names=(name,))


def test_a_merged_graph_has_no_adapter_to_name() -> None:
    assert OnnxRequest((Path("my first adapter"),), OUT, "merged").adapter_names == ("my first adapter",)


@pytest.mark.parametrize(("name", "key", "long"), [("fold", "dtype", "bfloat16"), ("vllm", "dtype", "float16")])
def test_data_types_have_two_spellings(name: str, key: str, long: str) -> None:
    short = {"bfloat16": "bf16", "float16": "fp16"}[long]
    assert command(name).make_context(name, ["in", "-o", "out", "--dtype", long]).params[key] == short


def test_public_names_are_the_listed_ones() -> None:
    for name in loraover_export.__all__:
        assert getattr(loraover_export, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = loraover_export.nothing


# What an export does with an output that is there already


WRITTEN = {
    "convert": "certified adapters",
    "combine": "certified adapters",
    "shrink --rank 1": "certified adapters",
    **{verb: f"{product.name}s" for verb, product in PRODUCTS.items() if verb != "onnx"},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("made"), base_options=SERVABLE).path


@pytest.mark.parametrize("verb", WRITTEN)
def test_force_replaces_an_output_whole_if_it_is_one_of_ours(
    verb: str, checkpoint: Path, tmp_path: Path, refused: Refused
) -> None:
    """Another folder may be the base model, or a checkpoint of a training."""
    out, words = tmp_path / "out", [*verb.split(), str(checkpoint)]
    assert run(cli, [*words, "-o", str(out)]) == 0
    files = {path.name for path in out.iterdir()}
    (out / "stray").write_text("of the older one")
    refused(*words, named=(str(out), "exists already and is a folder"))
    assert run(cli, [*words, "-o", str(out), "--force"]) == 0
    assert {path.name for path in out.iterdir()} == files
    assert list(tmp_path.iterdir()) == [out]
    other = shutil.copytree(checkpoint, tmp_path / "other")
    refused(*words, "--force", output=other, named=(str(other), f"--force replaces {WRITTEN[verb]} only"))


@pytest.mark.parametrize("verb", WRITTEN)
def test_an_output_around_or_inside_the_input_is_refused(
    verb: str, checkpoint: Path, tmp_path: Path, refused: Refused
) -> None:
    source = shutil.copytree(checkpoint, tmp_path / "deep" / "in")
    for place in ("deep/in/out", "deep", "deep/in"):
        refused(*verb.split(), source, "--force", output=tmp_path / place, named=(str(source),))
