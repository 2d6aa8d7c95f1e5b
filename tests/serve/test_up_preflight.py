"""`loraover serve up` refuses adapters that vLLM would serve wrongly, before anything starts."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from loraover.common.command_line import run
from loraover_export.cli import cli as export_cli
from loraover_serve.cli import cli
from loraover_serve.vllm import serve as serving
from loraover_serve.vllm.server import vllm_version

from support.plain_adapter import make_adapter, write_adapter
from support.vllm_damage import config
from support.vllm_stand_in import VERSION, stand_in

pytestmark = pytest.mark.process

Up = Callable[..., tuple[int, str]]


class StartedError(Exception):
    """Raised in place of starting a server."""


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain LoRA of one rank and scaling."""
    return make_adapter(tmp_path_factory.mktemp("up preflight"), "Llama", rank_pattern={})


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Up:
    """Runs `up`; returns its exit code, 0 where it would have started the server, and its messages."""

    def serve(*_: object, **__: object) -> None:
        raise StartedError

    def call(*adapters: Path | str, mode: str = "answers", options: tuple[str, ...] = ()) -> tuple[int, str]:
        monkeypatch.setattr(serving, "serve_vllm", serve)
        try:
            code = run(cli, ["up", *map(str, adapters), "--vllm", stand_in(tmp_path, mode), "--", *options])
        except StartedError:
            code = 0
        return code, capsys.readouterr().err

    return call


def damaged(adapter: Path, folder: Path, change: Callable[[Path], object]) -> Path:
    shutil.copytree(adapter, folder)
    change(folder)
    return folder


def test_a_plain_lora_is_served_and_faults_of_the_release_are_named(adapter: Path, start: Up) -> None:
    code, shown = start(adapter)
    assert code == 0
    assert "error" not in shown
    assert f"warning: adapter: engine: vLLM {VERSION}: in a batch that mixes requests" in shown


@pytest.mark.parametrize(
    "options", [("--lora-target-modules", "o_proj", "qkv_proj"), ("--lora_target_modules=o_proj",)]
)
def test_modules_that_an_option_leaves_out_are_named(options: tuple[str, ...], adapter: Path, start: Up) -> None:
    code, messages = start(adapter, options=options)
    assert code == 2
    assert "leaves out these modules" in messages
    assert "down_proj" in messages


@pytest.mark.parametrize(
    ("options", "is_served"),
    [
        ((), False),
        (("--enable-tower-connector-lora",), True),
        (("--enable_tower_connector_lora", "--no-enable-tower-connector-lora"), False),
    ],
)
def test_an_adapter_of_the_vision_tower_needs_an_option(
    options: tuple[str, ...], is_served: bool, tmp_path: Path, start: Up
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    parts = {"text_config": {"model_type": "llama", **sizes, "vocab_size": 64}, "vision_config": sizes}
    AutoConfig.for_model("smolvlm", architectures=["SmolVLMForConditionalGeneration"], **parts).save_pretrained(
        tmp_path / "base"
    )
    matrices = {"model.vision_model.encoder.layers.0.self_attn.q_proj": (torch.ones(4, 64), torch.ones(64, 4))}
    adapter = write_adapter(tmp_path / "seen", matrices, base_model_name_or_path=str(tmp_path / "base"))
    code, messages = start(adapter, options=options)
    assert code == (0 if is_served else 2), messages
    assert ("calls LoRA of towers and connectors experimental" in messages) == is_served
    assert ("unless it is started with --enable-tower-connector-lora" in messages) == (not is_served)


def test_the_plug_in_takes_no_option_that_leaves_modules_out(tmp_path: Path, start: Up) -> None:
    code, messages = start("--adapters", tmp_path, "--model", "base", options=("--lora_target_modules", "q_proj"))
    assert code == 2
    assert "--lora-target-modules cannot be given to vLLM here" in messages


def test_what_the_export_mends_is_refused_with_its_command(adapter: Path, tmp_path: Path, start: Up) -> None:
    folder = damaged(adapter, tmp_path / "in", config(alpha_pattern={"q_proj": 1}))
    code, shown = start(folder)
    assert code == 2
    assert "error: vLLM was not started: in: patterns: alpha_pattern gives" in shown
    assert not (tmp_path / "pids").exists()
    command = shown[shown.index("loraover export ") :].splitlines()[0]
    assert run(export_cli, shlex.split(command)[2:]) == 0
    assert start(Path(f"{folder}-vllm"))[0] == 0


def test_two_adapters_with_one_fault_are_named_together(adapter: Path, tmp_path: Path, start: Up) -> None:
    folders = [damaged(adapter, tmp_path / name, config(bias="all")) for name in ("a", "b")]
    code, shown = start(*folders)
    assert code == 2
    assert shown.count("a, b: bias: ") == 1


def test_a_command_without_a_version_gets_the_tables_rules(adapter: Path, start: Up) -> None:
    code, shown = start(adapter, mode="hides its version")
    assert code == 0
    assert "prints no version; the rules of 0.32.0 are applied" in shown
    assert "engine" not in shown


def test_the_version_of_a_command(tmp_path: Path) -> None:
    assert vllm_version(stand_in(tmp_path, "answers")) == VERSION
    assert vllm_version(stand_in(tmp_path, "hides its version")) is None


@pytest.mark.parametrize(
    ("imports", "found"), [("from vllm.cli import main", "9.8.7+cpu"), ("from wrapper import main", "1.2.3")]
)
def test_an_installers_script_is_not_run_for_its_version(imports: str, found: str, tmp_path: Path) -> None:
    python, script = tmp_path / "python3", tmp_path / "vllm"
    python.write_text('#!/bin/sh\ntest "$1" = -I && echo 9.8.7+cpu || echo 1.2.3\n')
    script.write_text(f"#!{python}\nimport sys\n{imports}\n")
    for file in (python, script):
        file.chmod(0o755)
    assert vllm_version(str(script)) == found
