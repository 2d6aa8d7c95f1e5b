"""Scripts in docs/examples: some train, and leave a plain LoRA and a checkpoint that folds; some use the library."""

from __future__ import annotations

import inspect
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaConfig

import loraover
import loraover_export
import loraover_serve
from loraover import read_checkpoint
from loraover.checkpoint.files import REFERENCE_FILE, TENSORS_FILE
from loraover.checkpoint.peft_adapter import read_adapter_dir
from loraover.common.command_line import run
from loraover.models.load import resolve_model
from loraover_export.cli import cli
from loraover_export.formats.gguf.base import write_base
from loraover_serve import serve_adapters
from loraover_serve.judge.names import STALE_OF_ADAPTER, STALE_OF_EARLIER
from loraover_serve.vllm.client import VllmServer
from loraover_serve.vllm.request import LOOPBACK
from loraover_serve.vllm.serve import example_request
from loraover_serve.vllm.server import free_port

from support.long_questions import make_long_case
from support.make_checkpoint import SERVABLE, Made, make_checkpoint
from support.plugin import with_entry_points
from support.real_servers import llama_base, python_of
from support.reports import DEMO_METRICS, DEMO_RUN, demo_checks, fold_certificate
from support.tiny_models import lora_matrices
from support.vllm_command import vllm_command

pytestmark = pytest.mark.process

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
DISTRIBUTED = {"ddp", "fsdp2"}
"""Run with several processes, in another file of tests."""
EXPORTS = {"export_vllm", "export_onnx", "export_gguf", "export_mlx"}
LIBRARY = EXPORTS | {
    "check",
    "conversions",
    "convert",
    "fold",
    "large_check",
    "run_onnx",
    "run_onnxruntime",
    "catch_a_fault",
    "llama_server_cache",
    "grpo_plugin",
    "judge_other_loops",
    "demo_page",
    "verify",
    "parity",
}
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
EXPLAINED = (
    *("Budget", "ConsoleReporter", "DiagnosticsCallback", "LoraOverCallback", "LoraOverConfig", "Probe", "Reporter"),
    *("SealCheckpoints", "write_checkpoint", "restore", "trainable_state_dict", "trainer_loss"),
)
"""Names whose docstrings have an example; one that writes a checkpoint comes before the one that reads it."""
FLEETS = {"prepare_on_ray"}
"""Run by the tests of fleets."""
"""Call one function of the library, on paths that they take as arguments."""


@dataclass(frozen=True)
class Example:
    """What a script leaves in its output folder.

    Args:
        adapter: Folder of the plain LoRA.
        checkpoint: Folder of the checkpoint with its cores.
        needs: A package of the `dev` extra.
        options: Beside --model and --output.
        backwards: In one optimizer step.
    """

    adapter: str = "."
    checkpoint: str = "."
    needs: str = "peft"
    steps: int = 5
    options: tuple[str, ...] = ()
    backwards: int = 1
    base: str = "llama"


SCRIPTS = {
    "trainer": Example("adapter", "checkpoint-5"),
    "seq2seq": Example("adapter", "checkpoint-5", base="t5"),
    "sft": Example("adapter", "checkpoint-5", needs="trl"),
    "dpo": Example("adapter", "checkpoint-5", needs="trl"),
    "lightning_trainer": Example(needs="lightning"),
    "plain_loop": Example("adapter", "checkpoint-10", steps=10, options=("--save-every", "5"), backwards=2),
    "compile": Example(options=("--backend", "aot_eager")),
    "qlora": Example("adapter", "checkpoint-5", needs="bitsandbytes"),
    "schedule": Example(),
}


@dataclass(frozen=True)
class Ran:
    """A script that was run: the losses that it went backward from, and its folders."""

    example: Example
    losses: list[float]
    base: Path
    output: Path

    @property
    def adapter(self) -> Path:
        return self.output / self.example.adapter

    @property
    def checkpoint(self) -> Path:
        return self.output / self.example.checkpoint

    def load_adapter(self) -> PeftModel:
        kind = AutoModelForSeq2SeqLM if self.example.base == "t5" else AutoModelForCausalLM
        return PeftModel.from_pretrained(kind.from_pretrained(self.base), str(self.adapter))


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.matrix if name == "compile" else ()) for name in SCRIPTS],
)
def ran(request: pytest.FixtureRequest, bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Ran:
    example = SCRIPTS[request.param]
    pytest.importorskip(example.needs, reason=f"{example.needs} is not installed")
    output, losses = tmp_path_factory.mktemp(request.param), []
    arguments = ["--model", str(bases[example.base]), "--output", str(output), "--steps", str(example.steps)]
    backward: Any = Tensor.backward

    def noted(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        losses.append(loss.item())
        backward(loss, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "backward", noted)
        run_script(request.param, *arguments, *example.options)
    return Ran(example, losses, bases[example.base], output)


def run_script(name: str, *arguments: str | Path) -> dict[str, Any]:
    """Run an example in this process, and return its variables; those that it adds to the environment are removed."""
    with pytest.MonkeyPatch.context() as patch, mock.patch.dict(os.environ):
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A checkpoint of a tiny Llama that every engine takes."""
    return make_checkpoint(tmp_path_factory.mktemp("library"), tokenizer=True, base_options=SERVABLE)


@pytest.fixture(scope="module")
def folded(made: Made) -> Path:
    folder = made.path.parent / "folded"
    assert run_script("fold", made.path, folder)["certificate"].verdict == "passed"
    return folder


def test_every_script_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == DISTRIBUTED | LIBRARY | FLEETS | SCRIPTS.keys()


def test_an_example_takes_its_steps(ran: Ran) -> None:
    assert len(ran.losses) == ran.example.steps * ran.example.backwards
    assert all(map(math.isfinite, ran.losses))


def test_an_example_leaves_a_lora_that_peft_loads(ran: Ran) -> None:
    matrices = lora_matrices(ran.load_adapter())
    assert all(matrix.any() for matrix in matrices.values())
    assert {key.replace(".default", "") for key in matrices} == load_file(ran.adapter / TENSORS_FILE).keys()


def test_an_example_leaves_cores_that_fold_into_that_lora(ran: Ran, tmp_path: Path) -> None:
    assert read_checkpoint(ran.checkpoint).sites
    trained, kept = (load_file(folder / TENSORS_FILE) for folder in (ran.checkpoint, ran.adapter))
    assert trained.keys() == kept.keys()
    assert all(torch.equal(matrix, kept[key]) for key, matrix in trained.items())
    assert run(cli, ["fold", str(ran.checkpoint), "-o", str(tmp_path / "folded")]) == 0


def test_folding_from_python(made: Made, folded: Path) -> None:
    assert (folded / "fold_certificate.json").is_file()
    assert PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(made.base), str(folded))


@pytest.fixture(scope="module")
def explained(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The examples of docstrings, by name, with a tiny base model; they run in a new folder."""
    docs = {name: inspect.getdoc(getattr(loraover, name)) or "" for name in loraover.__all__}
    found = {name: re.search(r"```python\n(.*?)```", text, re.DOTALL) for name, text in docs.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("docstrings"))
        patch.setattr(loraover, "train", lambda *places, **keywords: None)  # of the demo, which takes minutes
        yield {name: each[1].replace(BASE, str(made.base)) for name, each in found.items() if each is not None}


@pytest.mark.parametrize("name", EXPLAINED)
def test_an_example_of_a_docstring_runs_as_it_stands(name: str, explained: dict[str, str]) -> None:
    assert explained.keys() == set(EXPLAINED)
    exec(compile(textwrap.dedent(explained[name]), name, "exec"), {})  # noqa: S102


def test_a_large_check_from_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a small model in the place of the large one."""
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 96}
    monkeypatch.setattr("transformers.LlamaConfig", lambda **given: LlamaConfig(**(given | small)))
    assert run_script("large_check", tmp_path, "cpu", "fp32")["certificate"].verdict == "passed"
    assert "the adapter moves logits by up to" in capsys.readouterr().out


def test_an_export_for_vllm_from_python(folded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_script("export_vllm", folded, tmp_path / "mine")["report"].passed
    assert "--lora-modules" in capsys.readouterr().out
    assert (tmp_path / "mine" / "preflight.json").is_file()


def test_an_export_for_mlx_lm_from_python(folded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_script("export_mlx", folded, tmp_path / "mine")["report"].passed
    assert "config.json: {'rope_theta': " in capsys.readouterr().out
    assert (tmp_path / "mine" / "adapters.safetensors").is_file()


@pytest.mark.engine
def test_an_export_for_onnx_from_python(made: Made, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_script("export_onnx", made.path, tmp_path / "onnx")["report"].verdict == "passed"
    assert "passed: checkpoint\n" in capfd.readouterr().out
    assert (tmp_path / "onnx" / "checkpoint.onnx_adapter").is_file()
    run_script("run_onnx", tmp_path / "onnx", "2 + 2 =")
    answers = [line for line in capfd.readouterr().out.splitlines() if ": '" in line]
    assert [line.partition(": ")[0] for line in answers] == ["base model", "checkpoint"]
    assert len({line.partition(": ")[2] for line in answers}) == 2
    run_script("run_onnxruntime", tmp_path / "onnx", "2 + 2 =")
    plain = capfd.readouterr()
    assert plain.out.splitlines() == answers, "without onnxruntime-genai"
    assert "appears in graph inputs" not in plain.err


@pytest.mark.engine
def test_an_export_for_llama_cpp_from_python(
    made: Made, folded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_base(AutoModelForCausalLM.from_pretrained(made.base), tmp_path / "base.gguf")
    assert run_script("export_gguf", folded, tmp_path / "adapter.gguf", base)["report"].passed
    assert capsys.readouterr().out.startswith("passed: largest logit error ")
    assert run_script("export_gguf", folded, tmp_path / "unchecked.gguf")["report"].verdict == "not checked"
    assert {path.name for path in tmp_path.iterdir()} == {"base.gguf", "adapter.gguf", "unchecked.gguf"}


@pytest.fixture
def plug_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let scripts start vLLM with the plug-in, as if it were installed, on a port that no other test uses."""
    (tmp_path / "installed").mkdir()
    for name, value in {
        "LORAOVER_VLLM": str(vllm_command()),
        "PYTHONPATH": with_entry_points(tmp_path / "installed"),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("loraover_serve.vllm.serve.FIRST_PORT", free_port(LOOPBACK))


@pytest.mark.matrix
@pytest.mark.engine
@pytest.mark.usefixtures("plug_in")
def test_a_replaced_adapter_is_caught_and_cured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    long_case = make_long_case(tmp_path)
    mine, earlier = tmp_path / "mine", tmp_path / "before"
    for version, plain in ((long_case.adapter, mine), (long_case.earlier, earlier)):
        loraover_export.export_vllm(version, output=plain, dtype="fp32")
    shutil.copy(long_case.recorded, mine / REFERENCE_FILE)
    started: list[psutil.Process] = []

    @contextmanager
    def asked_once_more(adapters: Sequence[Path] = (), **given: Any) -> Iterator[VllmServer]:
        """At the end of the script's block: the request that users are shown, and the server's processes."""
        with serve_adapters(adapters, **given) as server:
            yield server
            curl = f"{example_request(server)} --silent".replace("NAME", "demo")
            answer = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, check=True)
            assert json.loads(answer.stdout)["usage"]["completion_tokens"] > 0
            started.extend([psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)])

    monkeypatch.setattr("loraover_serve.serve_adapters", asked_once_more)
    stock, cured = (
        run_script("catch_a_fault", mine, earlier, tmp_path / "verified", kind)["report"].engines[0]
        for kind in ("stock", "plug-in")
    )
    assert (stock.verdict, stock.fault) == ("differs", STALE_OF_EARLIER), stock.reason
    assert (cured.verdict, cured.fault) == ("as trained", None), cured.reason
    assert "Stale cache of an earlier version: answers of the adapter" in capsys.readouterr().out
    assert all((tmp_path / "verified" / kind / "verify.html").is_file() for kind in ("stock", "plug-in"))
    assert len(started) > 2
    assert not [process for process in started if runs(process)], "nothing is left afterwards"


@pytest.mark.matrix
@pytest.mark.engine
@pytest.mark.usefixtures("plug_in")
def test_under_the_plug_in_no_version_answers_on_what_an_older_one_has_cached(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = resolve_model("HuggingFaceTB/SmolLM2-135M-Instruct").location
    run_script("grpo_plugin", tmp_path / "run", "--model", model, "--steps", "4")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert ["; as trained: " in line for line in lines] == [False, True, True, True], lines


def test_llama_servers_cache_of_prompts_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long_case = make_long_case(tmp_path)
    monkeypatch.setenv("LORAOVER_LLAMA_SERVER", str(python_of("LORAOVER_LLAMA_SERVER", "llama-server")))
    mine = Path(shutil.copytree(long_case.adapter, tmp_path / "mine"))
    shutil.copy(long_case.recorded, mine / REFERENCE_FILE)
    base = llama_base(long_case.base, tmp_path)
    reports = run_script("llama_server_cache", mine, base, tmp_path / "verified")["reports"]
    found = {kind: (report.engines[0].verdict, report.engines[0].fault) for kind, report in reports.items()}
    assert found == {"stock": ("differs", STALE_OF_ADAPTER), "without-cache-ram": ("as trained", None)}


@pytest.mark.parametrize(("fault", "word"), [(STALE_OF_EARLIER, "nothing was lost"), (None, "not what this demo")])
def test_the_demo_ends_with_one_page(fault: str | None, word: str, tmp_path: Path) -> None:
    stock, cured = demo_checks(fault)
    for file, content in {
        "lora-over/run.json": json.dumps(DEMO_RUN),
        "lora-over/metrics.jsonl": "\n".join(map(json.dumps, DEMO_METRICS)),
        "folded/fold_certificate.json": fold_certificate().model_dump_json(),
        "verified/stock/verify.json": stock.model_dump_json(),
        "verified/plug-in/verify.json": cured.model_dump_json(),
    }.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(content)
    run_script("demo_page", tmp_path)
    page = (tmp_path / "demo.html").read_text()
    assert f"<title>Demo: {word}" in page
    assert page.count("<figure>") == 3, "training, fold, and answers on kept keys and values"
    assert (tmp_path / "caught.svg").read_text().startswith("<svg xmlns=")


def runs(process: psutil.Process) -> bool:
    """Whether a process has not ended; one that waits for its parent to ask has."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@pytest.mark.engine
def test_parity_from_python(
    made: Made, folded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With shorter prompts and answers than usual."""
    measure = loraover_serve.measure_parity
    monkeypatch.setattr(
        loraover_serve,
        "measure_parity",
        lambda *args, **given: measure(*args, **given | {"prompt_tokens": 16, "new_tokens": 2}),
    )
    report = run_script("parity", folded, made.path, tmp_path / "parity")["report"]
    assert report.verdict in ("equivalent", "different", "inconclusive"), "times vary on a shared machine"
    assert capsys.readouterr().out == f"{report.verdict}: {report.reason}\n", "nothing but the script's own line"
    assert (tmp_path / "parity" / "parity.html").is_file()


def test_check_from_python(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    run_script("check", made.path)
    lines = capsys.readouterr().out.splitlines()
    assert "vllm: right" in lines
    assert f"mlx: refused; loraover export mlx {made.path} -o {made.path}-mlx" in lines


def test_convert_from_python(folded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_script("convert", folded, tmp_path / "mine")["report"].passed
    assert capsys.readouterr().out.startswith("LORA of rank ")


def test_conversions_from_python(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_script("conversions", made.path, tmp_path / "smaller")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 1
    assert lines[-1].endswith("of the adapter's norm")
    assert read_adapter_dir(tmp_path / "smaller").config.r == 2


def test_verify_from_python(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run_script("verify", made.path, tmp_path / "verified")["report"]
    assert report.verdict == "as trained"
    assert capsys.readouterr().out.startswith("torch: as trained. ")
    assert (tmp_path / "verified" / "verify.html").is_file()
