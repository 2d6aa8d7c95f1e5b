"""`loraover export vllm` as users run it: its folder, its launch commands, and every refusal."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from loraover.adapters.uniform.certificate import CONVERSION_FILE, LoraCertificate
from loraover.common.command_line import run
from loraover.models.model_file import known_licence
from loraover_export import convert_adapter, export_vllm
from loraover_export.cli import cli
from loraover_export.formats.vllm.rules import Preflight
from loraover_export.formats.vllm.run import VllmCertificate, lora_module

from support.conversions import SOURCES, make_base, make_source
from support.make_checkpoint import make_checkpoint, tree
from support.plain_adapter import make_adapter
from support.refusals import Refused
from support.vllm_damage import config

pytestmark = pytest.mark.process

ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
FILES = ADAPTER | {"vllm_certificate.json", "preflight.json", "README.md"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("llama"), "Llama")


def export(source: Path | str, output: Path | str, *options: str) -> int:
    return run(cli, ["vllm", str(source), "-o", str(output), *options])


def exported(source: Path, output: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    """What --json prints."""
    capsys.readouterr()
    assert export(source, output, "--json", *options) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("kind", ["checkpoint", "folded", "plain"])
def test_every_kind_of_source(kind: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if kind != "plain":
        source = make_checkpoint(tmp_path, base_options={"head_dim": 8}).path
    if kind == "folded":
        assert run(cli, ["fold", str(source), "-o", str(tmp_path / "folded")]) == 0
        source = tmp_path / "folded"
    before = tree(source)
    result = exported(source, tmp_path / "out", capsys)
    assert tree(source) == before
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == FILES
    assert result["preflight"] == json.loads((out / "preflight.json").read_text())
    assert result["certificate"] == json.loads((out / "vllm_certificate.json").read_text())
    certificate = VllmCertificate.model_validate(result["certificate"])
    assert certificate.verdict == Preflight.model_validate(result["preflight"]).verdict == "passed"
    assert {matrix.over_parameterised for matrix in certificate.matrices} == {kind == "checkpoint"}
    for name in ADAPTER:
        assert b"loraover" not in (out / name).read_bytes().lower()


def test_the_configuration_leaves_nothing_to_an_engine(source: Path, tmp_path: Path) -> None:
    assert export(source, tmp_path / "out") == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(source.parent / "base"),
        "revision": None,
        "inference_mode": True,
        "r": 6,
        "lora_alpha": 6,
        "target_modules": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
    }


@pytest.mark.parametrize("name", ["plain", "-x it's a=b, $(touch x) ünï;&|d"])
def test_the_printed_lines_survive_a_shell(
    name: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = exported(source, tmp_path / name, capsys)
    script = 'show() { printf \'%s\\0\' "$@"; }\nvllm() { show "$@"; }\ncurl() { show "$@"; }\n'
    words = {
        key: subprocess.run(["sh", "-c", script + result[key]], capture_output=True, check=True).stdout.decode()
        for key in ("serve", "load")
    }
    serve, load = (words[key].split("\0")[:-1] for key in ("serve", "load"))
    base = str((source.parent / "base").resolve())
    assert serve[:6] == ["serve", base, "--enable-lora", "--max-lora-rank", "8", "--lora-modules"]
    assert parsed(serve[6]) == (name, str(tmp_path / name))
    assert len(serve) == 7
    assert load[0] == "http://localhost:8000/v1/load_lora_adapter"
    assert json.loads(load[-1]) == {"lora_name": name, "lora_path": str(tmp_path / name)}


def parsed(item: str) -> tuple[str, str]:
    """As LoRAParserAction of vLLM 0.32 (vllm/entrypoints/launchers/cli_args.py) takes a word apart."""
    assert not item.startswith("-"), "argparse would take it for an option"
    if "=" in item and "," not in item:
        name, path = item.split("=", 1)
        return name, path
    found = json.loads(item)
    return found["name"], found["path"]


TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1)


@given(TEXT, TEXT)
def test_any_name_and_path_reach_vllm(name: str, path: str) -> None:
    assert parsed(lora_module(name, Path("/" + path))) == (name, str(Path("/" + path)))


def test_the_name_and_the_served_model_are_options(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twin = tmp_path / "the twin"
    shutil.copytree(source.parent / "base", twin)
    result = exported(source, tmp_path / "out", capsys, "--model", str(twin), "--name", "shop")
    words = shlex.split(result["serve"])
    assert words[2] == str(twin)
    assert words[-1] == f"shop={tmp_path / 'out'}"


def test_the_card_names_base_licence_command_and_figures(source: Path, tmp_path: Path) -> None:
    base = tmp_path / "base [x](y)"
    shutil.copytree(source.parent / "base", base)
    (base / "README.md").write_text("---\nlicense: apache-2.0\ntags: [a]\n---\n# Base\nlicense: mit\n")
    config(base_model_name_or_path=str(base))(shutil.copytree(source, tmp_path / "in"))
    assert export(tmp_path / "in", tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["base_model"], front["license"]) == (str(base), "apache-2.0")
    assert "28 of 28 within their bounds" in card
    assert re.search(r"largest relative error \| \d\.\d\de-\d\d", card)
    assert "base \\[x\\](y)" in card
    assert f"loraover export vllm {tmp_path / 'in'} -o {tmp_path / 'out'}" in card


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        (None, None),
        ("# no front matter\nlicense: mit\n", None),
        ("---\nlicense: mit\n---\n", "mit"),
        ("---\r\nlicense: mit\r\n---\r\ntext", "mit"),
        ("---\nlicense: [a, b]\n---\n", None),
        ("---\n- a\n---\n", None),
        ("---\n: [\n---\n", None),
        ("---\nlicense: mit\ndate: 2024-02-30\n---\n", None),
        ("---\nlicense: mit\nyes: !!bool maybe\nat: !!timestamp soon\n---\n", None),
        ("---\nlicense: !!python/object/apply:os.getcwd []\n---\n", None),
        ("---\nlicense: mit\n", None),
    ],
)
def test_a_licence_is_what_the_front_matter_says(card: str | None, licence: str | None, tmp_path: Path) -> None:
    if card is not None:
        (tmp_path / "README.md").write_bytes(card.encode())
    assert known_licence(str(tmp_path)) == licence


def test_the_packaged_models_licence_is_known() -> None:
    assert known_licence("HuggingFaceTB/SmolLM2-135M-Instruct") == "apache-2.0"
    assert known_licence("nobody/nothing") is None
    assert known_licence("no hub name at all") is None


def test_force_warns_of_the_replaced_export(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(source, tmp_path / "out") == 0
    result = exported(source, tmp_path / "out", capsys, "--dtype", "fp32", "--force")
    assert result["preflight"]["rules"]["replacement"] == "warning"


def test_an_unusable_source_or_base_model_is_named(source: Path, tmp_path: Path, refused: Refused) -> None:
    copied = shutil.copytree(source, tmp_path / "in")
    (copied / "adapter_model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    refused("vllm", copied, named=("safetensors",))
    shutil.rmtree(copied)
    refused("vllm", copied, named=("no such folder",))
    (tmp_path / "base").mkdir()
    for content in (None, "{}", '{"model_type": "surprise"}', "["):
        if content is not None:
            (tmp_path / "base" / "config.json").write_text(content)
        refused("vllm", source, "--model", tmp_path / "base", named=("config.json",))


def test_no_base_model_at_all(source: Path, tmp_path: Path, refused: Refused) -> None:
    copied = shutil.copytree(source, tmp_path / "in")
    config(base_model_name_or_path=None)(copied)
    refused("vllm", copied, named=("--model",))
    report = export_vllm(copied, tmp_path / "out", model=source.parent / "base")
    assert report.preflight.rules["base model"] == "warning"
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(source.parent / "base")


@pytest.mark.parametrize("kind", ["loha", "pissa"])
def test_another_kind_is_converted_first(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = make_source(make_base(tmp_path / "base", "even"), tmp_path / "in", SOURCES[kind])
    report = exported(adapter, tmp_path / "out", capsys, "--dtype", "fp32")
    made = convert_adapter(adapter, tmp_path / "lora", dtype="fp32").certificate
    assert report["conversion"]["modules"] == made.model_dump(mode="json")["modules"]
    assert LoraCertificate.model_validate_json((tmp_path / "out" / CONVERSION_FILE).read_text()).passed
    converted, written = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("lora", "out"))
    assert converted.keys() == written.keys()
    assert all(torch.equal(tensor, converted[key]) for key, tensor in written.items())
    assert set(tree(tmp_path / "out")) == FILES | {CONVERSION_FILE}
    shown = export(adapter, tmp_path / "out", "--force")
    assert (shown, f"converted into a plain LoRA of rank {made.rank}" in capsys.readouterr().out) == (0, True)
    assert export(adapter, tmp_path / "other", "--no-convert") == 2


@pytest.mark.parametrize("kind", ["oft", "dora", "shira"])
def test_a_kind_without_an_exact_lora_is_refused(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = make_source(make_base(tmp_path / "base", "even"), tmp_path / "in", SOURCES[kind])
    assert export(adapter, tmp_path / "out") == 2
    assert "loraover export convert` and --approximate-to-rank" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
