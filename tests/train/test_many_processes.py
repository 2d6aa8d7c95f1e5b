"""`loraover train` in two processes that torchrun starts: one run, as one process trains it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from loraover import read_checkpoint
from loraover.cli import cli
from loraover.common.errors import ConfigError
from loraover.common.reporter import SILENT
from loraover.training.launch.distribution import convert_for_processes
from loraover.training.run_result import read_run

from support.parallel_command import ALONE, HALTED, LAUNCH, PATIENCE_S, RUNS, STEPS
from support.parallel_faults import FAULTS
from support.processes import TESTS, TORCHRUN, launched
from support.resumed_run import stopped
from support.small_disk import small_disk
from support.tiny_hub import write_recipe
from support.train_command import train
from support.trained_run import loss, losses, metrics

pytestmark = pytest.mark.process

TOLERANCE = 1e-5
"""Largest relative difference of a loss: sums of float32 gradients in another order, through four steps."""


@pytest.fixture(scope="module")
def folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    recipe = write_recipe(
        folder / "recipe.yaml",
        base,
        data={"train_examples": 24},
        training={"max_steps": STEPS, "gradient_accumulation_steps": 2},
        evaluation={"examples": 5},
    )
    shutil.copy(recipe, folder / "only-0.yaml")
    pairs = [json.dumps({"prompt": f"{n} + 1 =", "chosen": f" {n + 1}", "rejected": f" {n}"}) for n in range(40)]
    (folder / "pairs.jsonl").write_text("\n".join(pairs))
    data = {"train": str(folder / "pairs.jsonl")}
    write_recipe(
        folder / "dpo.yaml",
        base,
        trainer="dpo",
        data=data,
        training={"max_steps": 1, "per_device_train_batch_size": 12},
    )
    stopped(recipe, folder / "alone", 3)
    launched(TORCHRUN, TESTS / "support" / "parallel_command.py", folder, fails=True)
    return folder


@pytest.fixture(scope="module")
def saw(folder: Path) -> list[dict[str, Any]]:
    """What each process saw of the commands."""
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def one_process(folder: Path) -> dict[str, Path]:
    """Runs of `ALONE`, of the same recipe in one process."""
    for name, words in ALONE.items():
        assert train(folder / "recipe.yaml", folder / f"one-{name}", *words) == 0
    return {name: folder / f"one-{name}" for name in ALONE}


@pytest.mark.matrix
@pytest.mark.parametrize("name", RUNS)
def test_every_engine_trains_and_measures_as_one_process_does(
    name: str, folder: Path, saw: list[dict[str, Any]], one_process: dict[str, Path]
) -> None:
    assert [found[name]["code"] for found in saw] == [0, 0], saw[0][name]["error"] + saw[1][name]["error"]
    expected = one_process[name.partition("-")[2] or "lora-over"]
    assert losses(folder / name) == pytest.approx(losses(expected), rel=TOLERANCE)
    result, alone = read_run(folder / name), read_run(expected)
    assert (result.processes, result.steps, result.trained_parameters) == (2, STEPS, alone.trained_parameters)
    assert loss(result.after) == pytest.approx(loss(alone.after), rel=TOLERANCE)
    assert result.update_norm == pytest.approx(alone.update_norm, rel=1e-3)
    rows, all_rows = (json.loads((run / "held_out.json").read_text()) for run in (folder / name, expected))
    assert [tokens for _, tokens in rows] == [tokens for _, tokens in all_rows]
    if (folder / name / "adapter" / "loraover.json").exists():
        assert read_checkpoint(folder / name / "adapter").meta.world_size == 2


@pytest.mark.matrix
def test_rows_that_a_trainer_takes_twice_are_counted(folder: Path, saw: list[dict[str, Any]]) -> None:
    assert [found["dpo"]["code"] for found in saw] == [0, 0], saw[0]["dpo"]["error"]
    said = "repeats 4 of its first examples, since 20 examples do not divide into micro-batches"
    assert said in saw[0]["dpo"]["out"]
    assert "of its first examples" not in saw[0]["ddp-ragged"]["out"]


@pytest.mark.matrix
def test_zero_3_cuts_the_weights_while_they_are_loaded(saw: list[dict[str, Any]]) -> None:
    for found in saw:
        assert [name for name in RUNS if found[name]["is_cut"] == [True]] == ["zero3", "zero3-loraplus"]


@pytest.mark.matrix
def test_a_run_has_one_folder_one_writer_and_one_voice(folder: Path, saw: list[dict[str, Any]]) -> None:
    assert saw[1]["ddp"]["out"] == saw[1]["ddp"]["error"] == ""
    assert saw[0]["ddp"]["out"].count("step     1/4") == 1
    steps = [row["step"] for row in metrics(folder / "ddp") if "loss" in row]
    assert steps == [1, 2, 3, 4]
    assert (folder / "ddp" / "adapter" / "loraover.json").is_file()


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("federated", "method federated trains in one process, since its clients take their steps one after another"),
        ("value", "training.optim is 'adamx'; did you mean"),
        ("uneven", "a step of this run has 3 micro-batches (3 process(es), gradient_accumulation_steps 1)"),
        ("cut", "evaluation.exact_match generates answers, but distributed.engine zero3 cannot"),
        ("beside", "method soma changes weights or their states itself, but distributed.engine zero2 shards"),
        ("apart", "no such YAML file"),
    ],
)
def test_a_refusal_ends_both_processes_with_one_message(
    name: str, named: str, folder: Path, saw: list[dict[str, Any]]
) -> None:
    first, second = (found[name] for found in saw)
    assert (first["code"], second["code"]) == (2, 2)
    assert named in first["error"]
    assert second["error"] == second["out"] == ""
    assert not (folder / name).exists()


@pytest.mark.matrix
def test_the_same_command_again_is_done_at_once(folder: Path, saw: list[dict[str, Any]]) -> None:
    assert [found["again"]["code"] for found in saw] == [0, 0]
    assert "the run is finished already" in saw[0]["again"]["out"]
    assert "training steps" not in saw[0]["again"]["out"]


@pytest.mark.matrix
def test_two_processes_go_on_for_one_and_one_for_two(
    folder: Path, saw: list[dict[str, Any]], one_process: dict[str, Path]
) -> None:
    assert [found["others"]["code"] for found in saw] == [0, 0], saw[0]["others"]["error"]
    assert losses(folder / "alone") == pytest.approx(losses(one_process["lora-over"]), rel=TOLERANCE)
    left = Path(shutil.copytree(folder / "ddp", folder / "left"))
    undone(left)
    assert train(folder / "recipe.yaml", left, *RUNS["ddp"], "--resume") == 0
    assert losses(left) == pytest.approx(losses(one_process["lora-over"]), rel=TOLERANCE)
    assert read_run(left).processes == 1


@pytest.mark.matrix
def test_what_an_engine_cannot_measure_without_a_step_is_said(folder: Path, saw: list[dict[str, Any]]) -> None:
    """The loss of a run that was killed after its last step, and that of preferences before the first one."""
    assert [found[name]["code"] for found in saw for name in ("unfinished", "dpo")] == [0] * 4, saw[0]
    assert "not measured after training: zero3 places the weights" in saw[0]["unfinished"]["out"]
    ended, whole = read_run(folder / "unfinished"), read_run(folder / "zero3")
    assert (ended.after, ended.timed_steps, ended.update_norm) == (None, 0, whole.update_norm)
    adapters = [folder / run / "adapter" / "adapter_model.safetensors" for run in ("unfinished", "zero3")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    assert "not measured before training: zero2 places the weights" in saw[0]["dpo"]["out"]
    assert read_run(folder / "dpo").after is not None


@pytest.mark.matrix
def test_a_process_that_hangs_ends_the_run_with_a_message(folder: Path, saw: list[dict[str, Any]]) -> None:
    hung = saw[0]["hung"]
    assert (hung["code"], "hung" in saw[1]) == (2, False)
    assert f"process 1 of 2 has ended without a message, or has not answered for {PATIENCE_S:g} s" in hung["error"]
    failure = json.loads((folder / "hung" / "failure.json").read_text())
    assert failure["kind"] == "failed"


def words_of(text: str) -> list[str]:
    """What follows `train` in the command of a launch configuration."""
    joined = text.replace(",", " ").replace("]", "\n")
    (found,) = re.findall(r"-m\s+loraover\.cli\s+train (.*)", joined)
    return str(found).split()


@pytest.mark.parametrize("name", ["accelerate.yaml", "slurm.sh", "skypilot.yaml", "kubernetes.yaml", "jobset.yaml"])
def test_a_launch_configuration_starts_a_command_that_can_be_started_again(name: str) -> None:
    text = (LAUNCH / name).read_text()
    command = cli.get_command(click.Context(cli), "train")
    assert command is not None
    with command.make_context("train", words_of(text)) as context:
        assert (context.params["recipe"], context.params["resume"]) == ("recipe.yaml", "auto")
    found = {} if name.endswith(".sh") else yaml.safe_load(text)
    if name in ("slurm.sh", "skypilot.yaml"):
        subprocess.run(["bash", "-n"], input=found.get("run", text), text=True, check=True)
    elif name == "accelerate.yaml":
        assert load_config_from_file(str(LAUNCH / name)).num_processes == 2
    elif name == "kubernetes.yaml":
        replicas = found["spec"]["pytorchReplicaSpecs"]
        assert replicas["Worker"] == replicas["Master"]
    else:
        (job,) = found["spec"]["replicatedJobs"]
        pods = job["template"]["spec"]
        words = pods["template"]["spec"]["containers"][0]["command"]
        named = dict(pairwise(words))
        assert pods["parallelism"] == pods["completions"] == int(named["--nnodes"])
        first = f"{found['metadata']['name']}-{job['name']}-0-0.{found['metadata']['name']}"  # as JobSet names pods
        assert named["--rdzv-endpoint"].partition(":")[0] == first


@pytest.mark.matrix
def test_every_engine_continues_in_another_number_of_processes(folder: Path, tmp_path: Path) -> None:
    """LoRA-Over, begun in two processes, in one; plain LoRA, all of whose state the engine keeps, the other way."""
    script, recipe = TESTS / "support" / "parallel_resized.py", shutil.copy(folder / "recipe.yaml", tmp_path)
    engines = ("fsdp2", "zero2", "zero3")
    lora = [f"{engine}-lora" for engine in engines]
    for name in engines:
        undone(shutil.copytree(folder / name, tmp_path / name))
    launched((*TORCHRUN[:-1], "1"), script, recipe, *engines, *lora)
    expected = {name: read_run(folder / name) for name in engines} | {name: read_run(tmp_path / name) for name in lora}
    all_losses = {name: losses(folder / name) for name in engines} | {name: losses(tmp_path / name) for name in lora}
    for name in lora:
        undone(tmp_path / name)
    launched(TORCHRUN, script, recipe, *lora)
    for name, reference in expected.items():
        assert losses(tmp_path / name) == pytest.approx(all_losses[name], rel=TOLERANCE)
        found = read_run(tmp_path / name)
        assert (found.processes, found.timed_steps) == (3 - reference.processes, STEPS - HALTED)
        assert found.update_norm == pytest.approx(reference.update_norm, rel=1e-3)


def test_an_optimizer_whose_state_cannot_be_cut_anew_is_refused(tmp_path: Path) -> None:
    for rank in range(2):
        piece = tmp_path / "checkpoint-2" / "global_step2" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        piece.parent.mkdir(parents=True, exist_ok=True)
        piece.touch()
    trainer = SimpleNamespace(args=SimpleNamespace(optim="sgd"))
    with pytest.raises(ConfigError, match=r"was saved by 2 process\(es\), but this run has 1.*only the state of Adam"):
        convert_for_processes(tmp_path / "checkpoint-2", trainer, SILENT)


def undone(run: Path) -> None:
    """Remove the result of a run, and its last checkpoint."""
    (run / "run.json").unlink()
    for left in (run / "adapter", run / "trainer" / f"checkpoint-{STEPS}"):
        shutil.rmtree(left)


@pytest.mark.matrix
def test_accelerate_starts_the_command_with_its_configuration(folder: Path, tmp_path: Path) -> None:
    launcher = ["accelerate.commands.launch", "--config_file", str(LAUNCH / "accelerate.yaml"), "-m", "loraover.cli"]
    words = ["train", str(folder / "recipe.yaml"), "-o", str(tmp_path / "out"), *RUNS["ddp"], "--resume", "auto"]
    subprocess.run([sys.executable, "-m", *launcher, *words], check=True, env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"})
    assert losses(tmp_path / "out") == losses(folder / "ddp")


@pytest.mark.matrix
def test_a_run_that_torchrun_starts_again_ends_as_if_nothing_had_happened(folder: Path, tmp_path: Path) -> None:
    """Each attempt but the last fails as `FAULTS` says; the next one continues from the last complete checkpoint."""
    with small_disk(tmp_path / "disk", 16 * 1024) as disk:
        script = TESTS / "support" / "parallel_faults.py"
        again = (*TORCHRUN, "--max-restarts", str(len(FAULTS)))
        launched(again, script, disk, folder / "recipe.yaml", limit_s=1500)  # a minute an attempt on a busy machine
        ended, undisturbed = disk / "run", folder / "ddp"
        assert losses(ended) == losses(undisturbed)
        found, expected = read_run(ended), read_run(undisturbed)
        assert (found.timed_steps, found.after, found.update_norm) == (0, expected.after, expected.update_norm)
        assert not (ended / "failure.json").exists()
    for attempt, (fault, at, began) in enumerate(FAULTS):
        files = {rank: folder / f"fault-{attempt}-{rank}.json" for rank in range(2)}
        left = {rank: json.loads(file.read_text()) for rank, file in files.items() if file.exists()}
        assert left.keys() == ({0, 1} if fault == "disk" else {1 - at})
        first = left[min(left)]
        assert (first["code"], first["steps"][:1]) == (2, began)
        lost = f"process {at} of 2 has ended without a message"
        assert ("No space left on device" if fault == "disk" else lost) in first["error"]
        assert "".join(process["error"] for process in left.values()) == first["error"]
