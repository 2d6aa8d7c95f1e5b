"""`loraover inspect`: what a folder is, and the decisions, map and picture of a checkpoint."""

from __future__ import annotations

import io
import json
import shlex
import shutil
from pathlib import Path

import click
import pytest
import torch
from rich.console import Console
from torch.optim import AdamW

from loraover import Budget, LoraOverConfig, OverParameterization, inspect_folder, read_checkpoint, write_checkpoint
from loraover.checkpoint.metadata import Meta
from loraover.cli import cli
from loraover.common.command_line import run
from loraover.common.errors import LoraOverError
from loraover.inspection.folder import SIGNS, read_schedule
from loraover.inspection.show import verdict_of
from loraover.reporting.schedule import placed, plot_schedule, show_schedule
from loraover_export.formats.onnx.report import OnnxReport

from support.make_checkpoint import edit_json
from support.plain_adapter import write_adapter
from support.tiny_experts import EXPERTS, expert_lora, tiny_moe
from support.tiny_hub import save_llama, write_recipe
from support.tiny_models import tiny_llama, tiny_t5, token_ids, trainable, with_lora
from support.versions import needs_expert_stacks

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
    assert run(cli, ["inspect", str(dynamic)]) == 0
    shown = capsys.readouterr().out
    assert "dynamic by fisher: 14 over-parameterised matrices" in shown
    lines = [line.split() for line in shown.splitlines()]
    assert [line[:3] for line in lines if line[:1] in (["1"], ["2"]) and len(line) == 7] == [
        ["1", "2", "7"],
        ["2", "5", "7"],
    ]


def test_json_has_all_scores(dynamic: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cli, ["inspect", str(dynamic), "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["cores"]["rounds"]
    assert (len(first["scores"]), len(second["scores"])) == (28, 21)
    assert set(first["chosen"]).isdisjoint(second["chosen"])
    for matrix in "AB":
        scores = {name: score for name, score in first["scores"].items() if name.endswith(matrix)}
        chosen = [name for name in first["chosen"] if name.endswith(matrix)]
        assert set(chosen) == set(sorted(scores, key=lambda name: -scores[name])[: len(chosen)])


@pytest.mark.parametrize(("option", "name"), [("--plot", "map.svg"), ("--html", "inspect.html")])
def test_a_picture_or_page_is_written_once(
    option: str, name: str, dynamic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["inspect", str(dynamic), option, str(tmp_path / name)]
    assert run(cli, words) == 0
    assert f"wrote {tmp_path / name}" in capsys.readouterr().out
    content = (tmp_path / name).read_text()
    assert "Round in which each matrix got cores" in content
    assert "self_attn.q_proj: scores" in content
    assert run(cli, words) == 2
    assert "is there already" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == content


@pytest.mark.parametrize(("option", "ending"), [("--plot", ".svg"), ("--html", ".html")])
def test_a_file_of_another_type_is_refused(
    option: str, ending: str, dynamic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["inspect", str(dynamic), "--plot", str(tmp_path / "map.svg"), option, str(tmp_path / "map.docx")]
    assert run(cli, words) == 2
    assert f"ends in {ending}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_without_a_schedule_is_all_of_round_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = trained(tmp_path / "all", LoraOverConfig(sites=["*q_proj*"]))
    assert run(cli, ["inspect", str(folder), "--plot", str(tmp_path / "map.svg")]) == 0
    assert "schedule all: 4 over-parameterised" in capsys.readouterr().out
    assert set(placed(read_checkpoint(folder).meta).values()) == {1}


def test_encoder_and_decoder_have_rows_of_their_own(tmp_path: Path) -> None:
    folder = trained(tmp_path / "t5", LoraOverConfig(), is_t5=True)
    layers = list(dict.fromkeys(place.layer for place in placed(read_checkpoint(folder).meta)))
    assert layers == ["encoder 0", "encoder 1", "decoder 0", "decoder 1"]


ONNX_REPORT = OnnxReport(
    verdict="not checked",
    mode="merged",
    precision="fp32",
    device="cpu",
    cache=True,
    checked_on="cpu",
    base_model="owner/model",
    adapters={"mine": "runs/a/adapter"},
    checks=[],
    matrices=[],
    versions={},
    hardware="",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder of each kind, all from one run; their names say nothing."""
    made = tmp_path_factory.mktemp("kinds")
    recipe = write_recipe(made / "recipe.yaml", save_llama(made / "base"))
    found = {"run": made / "a", "folded adapter": made / "b", "vLLM export": made / "c", "ONNX export": made / "d"}
    found["checkpoint"] = found["run"] / "adapter"
    source = str(found["checkpoint"])
    for words in (
        ["train", str(recipe), "-o", str(found["run"])],
        ["train", str(recipe), "--method", "lora", "-o", str(made / "plain")],
        ["export", "fold", source, "-o", str(found["folded adapter"])],
        ["export", "vllm", source, "-o", str(found["vLLM export"])],
    ):
        assert run(cli, words) == 0
    found["ONNX export"].mkdir()
    (found["ONNX export"] / "onnx_report.json").write_text(ONNX_REPORT.model_dump_json())
    return found | {"adapter": made / "plain" / "adapter"}


def parse(command: str) -> None:
    """Parse a command line with the parser of its command, and run nothing."""
    program, *words = shlex.split(command)
    assert program == "loraover"
    group: click.Command = cli
    context = click.Context(cli)
    while isinstance(group, click.Group):
        name, found, words = group.resolve_command(context, words)
        assert found is not None
        assert name is not None
        group, context = found, click.Context(found, parent=context, info_name=name)
    group.parse_args(context, words)


@pytest.mark.parametrize("kind", list(SIGNS))
def test_each_kind_of_folder_is_recognised_and_has_commands_that_work(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Those that need no engine and no data are run; the others are parsed."""
    found = inspect_folder(folders[kind])
    assert found.kind == kind
    assert bool(found.next_steps) == (kind != "ONNX export")
    for number, step in enumerate(found.next_steps):
        parse(step.command)
        _, *words = shlex.split(step.command)
        if words[0] == "export" and words[1] != "onnx":
            words[words.index("-o") + 1] = str(tmp_path / str(number))
            assert run(cli, words) == 0, step.command


def test_what_was_trained_is_described(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    found = inspect_folder(folders["run"])
    assert found.adapter is not None
    assert found.cores is not None
    assert found.run is not None
    assert (found.adapter.kind, found.adapter.ranks, found.adapter.modules) == ("LORA", [4], 14)
    assert found.adapter.base_model == str(folders["run"].parent / "base")
    assert (found.cores.decomposition, found.cores.sites, found.cores.schedule) == ("mpo", 28, "all")
    assert found.run.state == "finished"
    assert found.run.last_loss is not None
    assert found.run.result is not None
    assert found.run.result.after is not None
    assert found.next_steps[1].command == (
        f"loraover export fold {folders['checkpoint']} -o {folders['checkpoint']}-folded --check-error"
    )
    assert run(cli, ["inspect", str(folders["run"])]) == 0
    shown = capsys.readouterr().out
    assert found.next_steps[1].command in shown
    assert "LORA, rank 4, alpha 8" in shown
    assert "schedule all: 28 over-parameterised matrices" in shown
    assert read_schedule(folders["run"]).step == found.cores.step


def test_a_rank_above_the_inputs_of_a_module_is_shown(tmp_path: Path) -> None:
    pairs = {"narrow": (torch.ones(8, 3), torch.ones(5, 8)), "wide": (torch.ones(4, 16), torch.ones(2, 4))}
    facts = inspect_folder(write_adapter(tmp_path / "adapter", pairs, rank_pattern={"wide": 4})).adapter
    assert facts is not None
    assert facts.ranks == [4, 8]


@needs_expert_stacks
def test_each_adapted_expert_is_counted(tmp_path: Path) -> None:
    expert_lora(tiny_moe(), tmp_path)
    facts = inspect_folder(tmp_path).adapter
    assert facts is not None
    assert (facts.ranks, facts.modules) == ([3, 4], 2 * (2 + 2 * EXPERTS))
    assert facts.targets == ["down_proj", "gate_up_proj", "q_proj", "v_proj"]


def test_an_export_shows_its_verdicts(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_folder(folders["folded adapter"]).verdicts == {"fold_certificate.json": "passed"}
    vllm = inspect_folder(folders["vLLM export"])
    assert vllm.verdicts == {"vllm_certificate.json": "passed", "preflight.json": "passed"}
    onnx = inspect_folder(folders["ONNX export"]).onnx
    assert onnx is not None
    assert (onnx.mode, onnx.verdict) == ("merged", "not checked")
    for kind in ("vLLM export", "ONNX export", "adapter"):
        assert run(cli, ["inspect", str(folders[kind])]) == 0
        assert kind in capsys.readouterr().out


def test_the_head_of_a_page_says_what_a_folder_is_and_how_it_stands(folders: dict[str, Path]) -> None:
    heads = {kind: verdict_of(inspect_folder(folder)) for kind, folder in folders.items()}
    tones = {"run": "good", "folded adapter": "good", "vLLM export": "good"}
    assert {kind: head.tone for kind, head in heads.items()} == dict.fromkeys(heads, "plain") | tones
    assert heads["checkpoint"].sentence.startswith("A checkpoint: LORA of rank 4 on 14 modules, ")
    assert "28 matrices have cores (mpo), after 4" in heads["checkpoint"].sentence
    assert "The run is finished, after 4 steps; held-out loss " in heads["run"].sentence
    assert "The check in ONNX Runtime: not checked." in heads["ONNX export"].sentence
    refused = inspect_folder(folders["vLLM export"]).model_copy(update={"verdicts": {"preflight.json": "failed"}})
    assert (verdict_of(refused).tone, verdict_of(refused).sentence[-23:]) == ("bad", "preflight.json: failed.")


def test_a_plot_needs_cores(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cli, ["inspect", str(folders["adapter"]), "--plot", str(tmp_path / "map.svg")]) == 2
    assert "without the cores" in capsys.readouterr().err
    assert not (tmp_path / "map.svg").exists()


@pytest.mark.parametrize("name", [names[0] for names in SIGNS.values()])
def test_hostile_files_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"[" * 100_000)
    with pytest.raises(LoraOverError, match=name.replace(".", r"\.")):
        inspect_folder(tmp_path)


def test_a_folder_without_a_known_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("adapter_config.json")
    for folder, said in ((tmp_path, "adapter_config.json (adapter)"), (tmp_path / "nothing", "no such folder")):
        assert run(cli, ["inspect", str(folder)]) == 2
        assert said in capsys.readouterr().err


def test_names_in_files_cannot_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = {"mode": "merged", "precision": "fp32", "base_model": "\x1b[2Jbase", "adapters": {}, "verdict": "[bold]"}
    (tmp_path / "onnx_report.json").write_text(json.dumps(facts))
    assert run(cli, ["inspect", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "\\x1b[2Jbase" in shown
    assert "[bold]" in shown


def odd_round(dynamic: Path, **scores: float) -> Meta:
    """The checkpoint's metadata with one more matrix of each name in its first round."""
    meta = read_checkpoint(dynamic).meta
    first = meta.rounds[0]
    return meta.model_copy(update={"rounds": [first.model_copy(update={"scores": first.scores | scores})]})


def test_odd_names_and_extreme_scores_can_be_shown(dynamic: Path, tmp_path: Path) -> None:
    names = ("oddname.lora_", "", "layers.\N{SUPERSCRIPT TWO}.x.lora_A", "var(--zz).lora_B")
    for i, scores in enumerate((dict.fromkeys(names, 1e308), {"a.lora_A": -1e308, "b.lora_A": 1e308, "c": 1e308})):
        meta = odd_round(dynamic, **scores)
        show_schedule(meta, Console(file=io.StringIO()))
        plot_schedule(meta, tmp_path / f"{i}.svg")
        assert "nan" not in (tmp_path / f"{i}.svg").read_text()


def test_names_of_matrices_cannot_steer_the_terminal(dynamic: Path) -> None:
    meta = odd_round(dynamic, **{"\x1b]0;mine\x07.x\x1b[2J[bold].lora_A": 1.0})
    console = Console(file=io.StringIO(), width=400)
    show_schedule(meta, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b" not in shown
    assert "\\x1b]0;mine\\x07" in shown
    assert "[bold]" in shown


def test_a_run_that_cannot_be_continued_is_started_again(folders: dict[str, Path], tmp_path: Path) -> None:
    recipe = (folders["run"] / "recipe.yaml").read_text()
    (tmp_path / "recipe.yaml").write_text(recipe.replace("method: lora-over", "method: federated"))
    (step,) = inspect_folder(tmp_path).next_steps
    assert "--resume" not in step.command
    assert step.command.startswith(f"loraover train {tmp_path}/recipe.yaml -o ")


def test_an_unfinished_run_says_how_to_continue(folders: dict[str, Path], tmp_path: Path) -> None:
    recipe = (folders["run"] / "recipe.yaml").read_text()
    folder = tmp_path / "with space"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(recipe)
    (folder / "metrics.jsonl").write_text('{"loss": 2.5}\n{"loss": NaN}\n[1]\n' + "[" * 100_000 + '\n{"lo')
    for name in ("checkpoint-1/complete.json", "checkpoint-2/model.safetensors"):
        (folder / "trainer" / name).parent.mkdir(parents=True)
        (folder / "trainer" / name).write_text("")
    found = inspect_folder(folder)
    assert found.run is not None
    assert (found.run.state, found.run.last_loss, found.run.checkpoint_step) == ("unfinished", 2.5, 1)
    head = verdict_of(found)
    assert (head.tone, head.sentence) == ("open", "A run. The run is not finished; its newest checkpoint is of step 1.")
    assert [step.command for step in found.next_steps] == [
        f"loraover train '{folder}/recipe.yaml' -o '{folder}' --resume"
    ]
    assert run(cli, shlex.split(found.next_steps[0].command)[1:]) == 0
    after = inspect_folder(folder).run
    assert after is not None
    assert after.state == "finished"


def test_a_failed_run_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failure = {"schema_version": 1, "kind": "out_of_memory", "message": "no room"}
    (tmp_path / "failure.json").write_text(json.dumps(failure))
    head = verdict_of(inspect_folder(tmp_path))
    assert (head.tone, head.sentence) == ("bad", "A run. The run failed: no room.")
    assert run(cli, ["inspect", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "failed" in shown
    assert "no room" in shown


def test_an_adapter_of_another_kind_is_converted_first(folders: dict[str, Path], tmp_path: Path) -> None:
    adapter = shutil.copytree(folders["adapter"], tmp_path / "loha")
    edit_json(adapter / "adapter_config.json", lambda config: config.update(peft_type="LOHA"))
    commands = [step.command for step in inspect_folder(adapter).next_steps]
    assert commands[0] == f"loraover export convert {adapter} -o {adapter}-lora"
    assert not any("export vllm" in command for command in commands)
