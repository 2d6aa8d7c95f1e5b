"""Which base model the exports name, the commands that they record, and the functions under the commands."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from loraover.checkpoint.base_model import resolve_base
from loraover.common.command_line import quiet_libraries, run
from loraover.common.errors import ConfigError
from loraover.models.stand_in import STAND_INS
from loraover.reporting.reporter import ConsoleReporter
from loraover_export import FoldCertificate, OnnxReport, VllmReport, export_onnx, export_vllm, fold_checkpoint
from loraover_export.cli import cli
from loraover_export.formats.onnx.inputs import read_inputs
from loraover_export.requests import OnnxRequest

from support.hub_cache import HubCache
from support.lines import Lines
from support.make_checkpoint import SERVABLE, Made, edit_json, make_checkpoint, reseal, tree
from support.onnx_export import llama_checkpoint
from support.refusals import Refused
from support.stand_ins import RECORD, adapter_config, as_stand_in, with_other_logits

pytestmark = [pytest.mark.process, pytest.mark.usefixtures("quick_builder")]


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
    return run(cli, [command, str(source), "-o", str(output), *COMMANDS[command], *options])


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


def test_an_export_reads_the_revision_that_the_adapter_pins(tmp_path: Path, hub_cache: HubCache) -> None:
    """There is no other in the cache."""
    made = make_checkpoint(tmp_path / "made", tokenizer=True, base_options=SERVABLE, revision="v2")
    commit = hub_cache("owner/model", "v2", made.base)
    edit_json(made.path / "adapter_config.json", lambda config: config.update(base_model_name_or_path="owner/model"))
    edit_json(made.path / "loraover.json", lambda meta: meta.update(base_model="owner/model"))
    reseal(made.path)
    for command in ("fold", "vllm"):
        assert export(command, made.path, tmp_path / command) == 0
    certificate = FoldCertificate.model_validate_json((tmp_path / "fold" / "fold_certificate.json").read_bytes())
    assert certificate.outputs is not None
    assert commit[:12] in certificate.outputs.base
    assert read_inputs(OnnxRequest((made.path,), tmp_path / "out", "merged")).base.revision == commit


@pytest.mark.parametrize(
    ("name", "revision"),
    [
        ("owner/model", "owner/model@v4"),
        ("hf://owner/model", "hf://owner/model@v4"),
        ("https://huggingface.co/owner/model", "https://huggingface.co/owner/model/tree/v4"),
    ],
)
def test_the_pinned_revision_holds_however_the_base_is_named(
    name: str, revision: str, tmp_path: Path, hub_cache: HubCache
) -> None:
    (tmp_path / "config.json").write_text("{}")
    commits = [hub_cache("owner/model", revision, tmp_path) for revision in ("v2", "v4")]
    adapters: list[Any] = [
        SimpleNamespace(path=Path(pinned), config=SimpleNamespace(base_model_name_or_path=base, revision=pinned))
        for base, pinned in (("owner/model", "v2"), ("owner/model", "v3"), ("owner/other", "v1"))
    ]
    found = [resolve_base(adapters[:1], given, option="--model", say=print) for given in (name, revision)]
    assert [each.revision for each in found] == commits
    with pytest.raises(ConfigError, match="No revision fits all"):
        resolve_base(adapters, name, option="--model", say=print)


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
) -> None:
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


# The library functions under the commands


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A checkpoint that all three functions take; tests read it only."""
    return llama_checkpoint(tmp_path_factory.mktemp("made"))


CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any], tuple[str, ...], type]] = {
    "fold": (fold_checkpoint, {"dtype": "bfloat16"}, ("--dtype", "bf16"), FoldCertificate),
    "vllm": (export_vllm, {"dtype": "bfloat16", "name": "mine"}, ("--name", "mine"), VllmReport),
    "onnx": (
        export_onnx,
        {"mode": "swappable", "precision": "float16", "check": False},
        ("--mode", "swappable", "--precision", "fp16", "--no-check"),
        OnnxReport,
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_function_writes_what_its_command_writes(
    name: str, made: Made, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Byte for byte, model card included; str paths and PyTorch's names of data types are taken."""
    quiet_libraries()
    function, arguments, options, report = CALLS[name]
    out = tmp_path / "out"
    found = function(str(made.path), str(out), **arguments)
    assert capfd.readouterr() == ("", "")
    assert type(found) is report
    written = tree(out)
    assert run(cli, [name, str(made.path), "-o", str(out), *options, "--force"]) == 0
    replaced = tree(out)
    if name == "vllm":  # whose report and card tell that an adapter was replaced
        for file in ("preflight.json", "README.md"):
            del written[file], replaced[file]
    assert written == replaced


def test_a_reporter_hears_what_is_done(made: Made, tmp_path: Path) -> None:
    heard = Lines()
    fold_checkpoint(made.path, tmp_path / "fold", check_error=True, device="cpu", report=heard)
    assert heard.lines[0].startswith("the check of the outputs needs about ")
    assert heard.lines[1] == f"loading the base model from folder {made.base} to cpu, fp32"
    export_onnx(made.path, tmp_path / "onnx", mode="swappable", check=False, report=heard)
    assert any(line.startswith("building the fp32 graph of LlamaForCausalLM") for line in heard.lines)


def test_names_in_files_cannot_control_the_terminal() -> None:
    shown = io.StringIO()
    ConsoleReporter(Console(file=shown)).line("loading [red]a\x1b[31m\rb\nnext")
    assert shown.getvalue() == "loading [red]a\\x1b[31m\\rb\nnext\n"
