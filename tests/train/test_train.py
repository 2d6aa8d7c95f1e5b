"""`loraover train` from recipe to run folder, on tiny models."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

import loraover_export.cli
from loraover import read_checkpoint
from loraover.cli import cli
from loraover.common.command_line import run
from loraover.common.errors import CheckpointError
from loraover.common.provenance import hardware, peak_bytes
from loraover.data.word_problems import split_word_problems
from loraover.training.recipe import load_recipe
from loraover.training.run_result import RunResult, read_run

from support.tiny_hub import EOS, tiny_tokenizer, write_recipe
from support.tiny_models import lora_matrices, update_norm
from support.train_command import METHODS, STEPS, TURNS, data_file, train

pytestmark = [pytest.mark.process, pytest.mark.usefixtures("no_network")]

MODELS = {"llama": transformers.AutoModelForCausalLM, "t5": transformers.AutoModelForSeq2SeqLM}


@dataclass(frozen=True)
class Trained:
    """A finished run.

    Args:
        trainer: as it was left.
        start: A and B when training began.
        printed: standard output of `train --json`.
    """

    kind: str
    method: str
    base: Path
    folder: Path
    trainer: Any
    start: dict[str, Tensor]
    printed: str

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def result(self) -> RunResult:
        return read_run(self.folder)

    def load(self, adapter: Path | None = None) -> Any:
        """The base model, with the trained adapter as PEFT reads it."""
        base = MODELS[self.kind].from_pretrained(self.base)
        return PeftModel.from_pretrained(base, str(adapter or self.adapter)).eval()


@contextlib.contextmanager
def watched() -> Iterator[list[tuple[Any, dict[str, Tensor]]]]:
    """Each trainer whose training starts in the block, with A and B at that moment."""
    seen: list[tuple[Any, dict[str, Tensor]]] = []
    train = transformers.Trainer.train

    def watching(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((self, lora_matrices(self.model)))
        return train(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.Trainer, "train", watching)
        yield seen


@pytest.fixture(scope="module")
def trained(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Trained]:
    """Both kinds of model, by both methods, from one recipe."""
    runs = {}
    for kind in MODELS:
        folder = tmp_path_factory.mktemp(kind)
        recipe = write_recipe(folder / "recipe.yaml", bases[kind])
        for method in METHODS:
            with watched() as seen, contextlib.redirect_stdout(io.StringIO()) as printed:
                assert train(recipe, folder / method, "--method", method, "--json") == 0
            trainer, start = seen[0]
            runs[kind, method] = Trained(kind, method, bases[kind], folder / method, trainer, start, printed.getvalue())
    return runs


@pytest.fixture(params=[(kind, method) for kind in MODELS for method in METHODS], ids="-".join)
def done(request: pytest.FixtureRequest, trained: dict[tuple[str, str], Trained]) -> Trained:
    return trained[request.param]


@pytest.fixture(params=MODELS)
def over(request: pytest.FixtureRequest, trained: dict[tuple[str, str], Trained]) -> Trained:
    return trained[request.param, "lora-over"]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in metrics(folder) if "loss" in row}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# What a run leaves


def test_a_run_folder_holds_what_it_should(done: Trained) -> None:
    names = {path.name for path in done.folder.iterdir()}
    assert names == {"recipe.yaml", "metrics.jsonl", "held_out.json", "run.json", "trainer", "adapter"}
    adapter = {path.name for path in done.adapter.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"} <= adapter
    assert ({"loraover.json", "loraover.safetensors"} <= adapter) is (done.method == "lora-over")
    assert not [path for path in done.adapter.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    assert not list(done.folder.rglob("*.tmp"))
    checkpoints = {path.name for path in (done.folder / "trainer").glob("checkpoint-*")}
    assert checkpoints == {"checkpoint-2", "checkpoint-4"}


@pytest.mark.parametrize(("method", "name"), [("full", "model"), ("lora-over", "adapter")])
def test_the_command_says_where_the_result_is(
    method: str, name: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train(recipe, out, "--method", method, "--steps", 1, "--set", "evaluation.before=false") == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{name}: {out / name}"
    assert (out / name / "README.md").is_file()


def test_a_gpu_is_named_and_its_memory_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "some GPU")
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda: 12345)
    assert hardware().endswith(" threads, some GPU")
    assert peak_bytes() == 12345


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a child's peak begins with its parent's")
def test_the_memory_of_a_parent_is_not_its_childs() -> None:
    child = "from loraover.common.provenance import peak_bytes; print(peak_bytes())"
    code = (
        f"import subprocess, sys; x = bytearray(2**30); subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2**30


def test_the_result_is_what_happened(done: Trained) -> None:
    result = done.result
    assert (result.method, result.model, result.steps, result.seed) == (done.method, str(done.base), STEPS, 0)
    assert result.learning_rate == 1e-2
    assert "word problems, seed 0" in result.data_origin
    assert result.train_seconds > 0
    assert result.timed_steps == STEPS
    assert result.peak_bytes is not None
    assert result.peak_bytes > 2**26
    assert {"loraover", "python", "torch", "transformers", "peft"} <= result.versions.keys()
    assert result.before is not None
    assert result.after is not None
    assert result.before.examples == result.after.examples == 4
    assert result.after.loss < result.before.loss
    scored = json.loads((done.folder / "held_out.json").read_text())
    assert len(scored) == 4
    assert result.after.loss == pytest.approx(sum(nats for nats, _ in scored) / sum(tokens for _, tokens in scored))
    assert result.before.exact_match is not None
    assert 0 <= result.before.exact_match <= 1


def test_the_result_counts_parameters(done: Trained) -> None:
    tensors = load_file(done.adapter / "adapter_model.safetensors")
    assert done.result.lora_parameters == sum(tensor.numel() for tensor in tensors.values())
    if done.method == "lora":
        assert done.result.added_parameters == 0
        return
    cores = {
        name: tensor
        for name, tensor in load_file(done.adapter / "loraover.safetensors").items()
        if name.rpartition(".core.")[2].isdigit()
    }
    added = sum(tensor.numel() for tensor in cores.values()) - done.result.lora_parameters
    assert done.result.added_parameters == added > 0


def test_every_step_is_in_the_metrics(done: Trained) -> None:
    rows = metrics(done.folder)
    assert list(losses(done.folder)) == [1, 2, 3, 4]
    assert all(row["learning_rate"] > 0 for row in rows if "loss" in row)
    assert done.result.before is not None
    assert done.result.after is not None
    evaluated = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    assert evaluated == [(0, done.result.before.loss), (STEPS, done.result.after.loss)]
    assert losses(done.folder)[4] < losses(done.folder)[1]


def test_the_recipe_that_was_run_gives_the_same_run_again(done: Trained, tmp_path: Path) -> None:
    assert load_recipe(str(done.folder / "recipe.yaml")).method == done.method
    again = tmp_path / "again"
    assert train(done.folder / "recipe.yaml", again) == 0
    assert losses(again) == losses(done.folder)
    assert (again / "recipe.yaml").read_bytes() == (done.folder / "recipe.yaml").read_bytes()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (again / "adapter" / name).read_bytes() == (done.adapter / name).read_bytes()


def test_peft_loads_the_adapter_that_was_trained(done: Trained) -> None:
    model = done.load()
    trained = lora_matrices(done.trainer.model)
    loaded = lora_matrices(model)
    assert loaded.keys() == trained.keys()
    assert all(torch.equal(loaded[name], trained[name]) for name in trained)
    assert any(not torch.equal(trained[name], done.start[name]) for name in trained)
    assert update_norm(model) == pytest.approx(done.result.update_norm, rel=1e-12)
    assert update_norm(model) > 0
    assert model.peft_config["default"].base_model_name_or_path == str(done.base)
    assert transformers.AutoTokenizer.from_pretrained(done.adapter).pad_token_id is not None


def test_the_adapter_is_a_checkpoint_that_folds(over: Trained, tmp_path: Path) -> None:
    checkpoint = read_checkpoint(over.adapter)
    assert checkpoint.meta.step == STEPS
    assert len(checkpoint.sites) == len(over.start)
    folded = tmp_path / "folded"
    assert run(loraover_export.cli.cli, ["fold", str(over.adapter), "-o", str(folded), "--check-error"]) == 0
    certificate = json.loads((folded / "fold_certificate.json").read_text())
    assert certificate["verdict"] == "passed"
    assert certificate["outputs"]["adapter_effect"] > 100 * certificate["output_bound"]
    assert update_norm(over.load(folded)) == pytest.approx(over.result.update_norm, rel=1e-6)


def test_a_plain_lora_is_no_checkpoint(trained: dict[tuple[str, str], Trained]) -> None:
    with pytest.raises(CheckpointError, match="holds a plain LoRA without the cores"):
        read_checkpoint(trained["llama", "lora"].adapter)


def test_the_model_card_states_the_facts(done: Trained) -> None:
    card = (done.adapter / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == str(done.base)
    for value in (done.method, f"{done.result.lora_parameters:,}", "word problems"):
        assert f" {value}" in card


# What is learnt


def text_of(tokenizer: Any, ids: Tensor) -> str:
    text: str = tokenizer.decode(ids[ids != tokenizer.pad_token_id])
    return text


def examples_in_batch(trainer: Any) -> list[tuple[str, str, str]]:
    """Text of the input, of what carries a label, and of what carries none, of each example of the first batch."""
    tokenizer = trainer.processing_class
    found = []
    for batch in [next(iter(trainer.get_train_dataloader())), next(iter(trainer.get_eval_dataloader()))]:
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            learnt = labels != -100
            rest = ids
            if len(ids) == len(labels) and torch.equal(ids[learnt], labels[learnt]):
                rest = ids[~learnt]
            found.append((text_of(tokenizer, ids), tokenizer.decode(labels[learnt]), text_of(tokenizer, rest)))
    return found


def word_problem_texts() -> dict[str, str]:
    rows, held_out = split_word_problems(20, 4, 0)
    return {row["prompt"].lower(): row["completion"].lower() for row in rows + held_out}


@pytest.mark.parametrize("method", METHODS)
def test_only_the_completion_is_learnt(method: str, trained: dict[tuple[str, str], Trained]) -> None:
    completions = word_problem_texts()
    found = examples_in_batch(trained["llama", method].trainer)
    assert len(found) == 8
    for whole, learnt, rest in found:
        assert learnt == completions[rest] + EOS
        assert whole == rest + learnt


def test_an_encoder_decoder_reads_the_prompt_and_learns_the_completion(
    trained: dict[tuple[str, str], Trained],
) -> None:
    completions = word_problem_texts()
    found = examples_in_batch(trained["t5", "lora-over"].trainer)
    assert len(found) == 8
    for whole, learnt, _ in found:
        assert learnt == completions[whole.removesuffix(EOS)] + EOS


@pytest.mark.parametrize("chat", [None, True])
def test_chat_turns_are_learnt_one_by_one(chat: bool | None, bases: dict[str, Path], tmp_path: Path) -> None:
    file = data_file(tmp_path / "chat.jsonl", *[{"messages": TURNS}] * 4)
    data = {"train": str(file), "test": str(file), "chat": chat}
    recipe = write_recipe(tmp_path / "recipe.yaml", bases["chat"], data=data, training={"max_steps": 1})
    with watched() as seen:
        assert train(recipe, tmp_path / "out") == 0
    found = {(learnt, rest) for _, learnt, rest in examples_in_batch(seen[0][0])}
    assert found == {
        (f"2{EOS}", "<user>1+1?<assistant>"),
        (f"#### 4{EOS}", f"<user>1+1?<assistant>2{EOS}<user>and 2+2?<assistant>"),
    }


@pytest.mark.parametrize(("chat", "prompt"), [(None, "<user>1+1?<assistant>"), (False, "1+1?")])
def test_text_goes_through_the_chat_template_unless_told_otherwise(
    chat: bool | None, prompt: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    file = data_file(tmp_path / "text.jsonl", *[{"prompt": "1+1?", "completion": "2"}] * 4)
    data = {"train": str(file), "test": str(file), "chat": chat}
    recipe = write_recipe(tmp_path / "recipe.yaml", bases["chat"], data=data, training={"max_steps": 1})
    with watched() as seen:
        assert train(recipe, tmp_path / "out") == 0
    assert {(learnt, rest) for _, learnt, rest in examples_in_batch(seen[0][0])} == {(f"2{EOS}", prompt)}


@pytest.mark.parametrize("kind", MODELS)
def test_both_methods_start_from_the_same_adapter(kind: str, trained: dict[tuple[str, str], Trained]) -> None:
    plain, cores = trained[kind, "lora"], trained[kind, "lora-over"]
    assert plain.start.keys() == cores.start.keys()
    assert all(torch.equal(plain.start[name], cores.start[name]) for name in plain.start)
    assert all(matrix.any() == ("lora_A" in name) for name, matrix in plain.start.items())
    assert plain.result.before == cores.result.before
    assert losses(cores.folder)[1] == pytest.approx(losses(plain.folder)[1], rel=1e-5)
    assert losses(cores.folder)[4] != losses(plain.folder)[4]


def test_another_seed_starts_from_another_adapter(trained: dict[tuple[str, str], Trained], tmp_path: Path) -> None:
    first = trained["llama", "lora"]
    with watched() as seen:
        assert train(first.folder / "recipe.yaml", tmp_path / "out", "--seed", 1, "--steps", 1) == 0
    name = next(name for name in first.start if "lora_A" in name)
    assert not torch.equal(seen[0][1][name], first.start[name])


def test_the_held_out_loss_is_the_mean_over_completion_tokens(bases: dict[str, Path], tmp_path: Path) -> None:
    """Of all examples together, however they are batched: long answers count by their length."""
    rows = [{"prompt": f"say {n}.", "completion": "7" * n} for n in (1, 2, 40)]
    file = data_file(tmp_path / "rows.jsonl", *rows)
    model = MODELS["llama"].from_pretrained(bases["llama"]).eval()
    tokenizer = tiny_tokenizer()
    token_losses: list[Tensor] = []
    for row in rows:
        prompt, completion = tokenizer(row["prompt"]).input_ids, tokenizer(row["completion"] + EOS).input_ids
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        token_losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(completion), reduction="none"))
    expected = float(torch.cat(token_losses).mean())
    assert abs(expected - float(torch.stack([t.mean() for t in token_losses]).mean())) > 1e-3
    data = {"train": str(file), "test": str(file)}
    training = {"max_steps": 1, "per_device_train_batch_size": 2}
    recipe = write_recipe(tmp_path / "recipe.yaml", bases["llama"], data=data, training=training)
    assert train(recipe, tmp_path / "out") == 0
    before = read_run(tmp_path / "out").before
    assert before is not None
    assert before.loss == pytest.approx(expected, rel=1e-5)


# The command


def test_flags_reach_the_recipe(bases: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"prompt": "1+1?", "completion": "2"}] * 4
    train_file, test_file = (data_file(tmp_path / f"{name}.jsonl", *rows) for name in ("train", "test"))
    options = {
        "--method": "lora",
        "--model": bases["llama"],
        "--data": train_file,
        "--test-data": test_file,
        "--steps": 2,
        "--learning-rate": 0.5,
        "--seed": 7,
        "--set": "lora.r=2",
    }
    recipe = write_recipe(tmp_path / "recipe.yaml", "absent")
    flags = [part for pair in options.items() for part in pair]
    assert train(recipe, tmp_path / "out", *flags, "--set", "evaluation.exact_match=false") == 0
    ran = load_recipe(str(tmp_path / "out" / "recipe.yaml"))
    assert (ran.method, ran.model, ran.lora.r) == ("lora", str(bases["llama"]), 2)
    assert (ran.data.train, ran.data.test) == (str(train_file), str(test_file))
    assert (ran.training.max_steps, ran.training.learning_rate, ran.training.seed) == (2, 0.5, 7)
    after = read_run(tmp_path / "out").after
    assert after is not None
    assert after.exact_match is None


def test_nothing_is_measured_without_held_out_data(recipe: Path, tmp_path: Path) -> None:
    assert train(recipe, tmp_path / "out", "--set", "evaluation.examples=0") == 0
    result = read_run(tmp_path / "out")
    assert result.before is None
    assert result.after is None
    assert list(losses(tmp_path / "out")) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "over",
    [
        {"decomposition": "svd", "sites": ["*lora_A"]},
        {"decomposition": "chain", "seed": 11},
        {"options": {"num_cores": 2}, "aux_lr_scale": 0.1, "decay_auxiliary": True},
    ],
    ids=["svd", "chain", "mpo"],
)
def test_other_choices_train_and_fold(over: dict[str, Any], bases: dict[str, Path], tmp_path: Path) -> None:
    lora = {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}, "lora_dropout": 0.1}
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        bases["llama"],
        lora=lora | {"target_modules": ["q_proj", "v_proj", "down_proj"]},
        over=over,
        training={
            "gradient_accumulation_steps": 2,
            "weight_decay": 0.1,
            "optim": "sgd",
            "gradient_checkpointing": True,
        },
    )
    assert train(recipe, tmp_path / "out") == 0
    adapter = tmp_path / "out" / "adapter"
    assert read_checkpoint(adapter).meta.config.seed == over.get("seed", 0)
    folded = tmp_path / "folded"
    assert run(loraover_export.cli.cli, ["fold", str(adapter), "-o", str(folded), "--check-error"]) == 0


def test_json_is_all_that_is_printed(done: Trained) -> None:
    assert RunResult.model_validate_json(done.printed) == done.result


def test_progress_is_printed_without_json(recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert train(recipe, tmp_path / "out") == 0
    printed = capfd.readouterr().out
    for step in range(1, STEPS + 1):
        assert f"step     {step}/{STEPS}  loss" in printed
    assert f"adapter: {tmp_path / 'out' / 'adapter'}" in printed.splitlines()
    assert "\x1b" not in printed


def test_compare_shows_runs_side_by_side(
    trained: dict[tuple[str, str], Trained], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    runs = [trained["llama", method] for method in METHODS]
    assert run(cli, ["compare", *(str(r.folder) for r in runs)]) == 0
    printed = capsys.readouterr().out
    rows = {line.strip().split("  ")[0]: line for line in printed.splitlines() if line.strip()}
    for one in runs:
        assert str(one.folder) in printed
        assert f"{one.result.added_parameters:,}" in rows["parameters added while training"]
        assert str(one.result.after) in rows["after"]
    assert rows["method"].split()[1:] == list(METHODS)


def test_compare_prints_json(trained: dict[tuple[str, str], Trained], capsys: pytest.CaptureFixture[str]) -> None:
    runs = [trained["llama", method] for method in METHODS]
    assert run(cli, ["compare", "--json", *(str(r.folder) for r in runs)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {path: RunResult.model_validate(values) for path, values in printed.items()} == {
        str(r.folder): r.result for r in runs
    }


@pytest.mark.parametrize("change", [{"schema_version": 99}, {"unknown": 1}, {"steps": "many"}])
def test_compare_refuses_a_result_that_it_does_not_know(
    change: dict[str, Any],
    trained: dict[tuple[str, str], Trained],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    values = trained["llama", "lora"].result.model_dump(mode="json")
    (tmp_path / "run.json").write_text(json.dumps(values | change))
    assert run(cli, ["compare", str(tmp_path)]) == 2
    assert next(iter(change)) in capsys.readouterr().err


def test_compare_refuses_what_is_no_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cli, ["compare", str(tmp_path)]) == 2
    assert "run.json" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["file", "folder", "link", "link to an empty folder"])
def test_an_output_that_exists_is_left_alone(
    kind: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    match kind:
        case "file":
            out.write_text("mine")
        case "folder":
            out.mkdir()
            (out / "mine").write_text("mine")
        case "link":
            out.symlink_to(tmp_path / "nowhere")
        case _:
            (tmp_path / "elsewhere").mkdir()
            out.symlink_to(tmp_path / "elsewhere")
    before = tree(tmp_path)
    assert train(recipe, out) == 2
    assert "exists already" in capsys.readouterr().err
    assert tree(tmp_path) == before


def test_tensorboard_writes_events_into_the_run(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert train(recipe, tmp_path / "out", "--set", "tensorboard=true") == 0
    found: dict[int, float] = {}
    for file in (tmp_path / "out").rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(file))
        events.Reload()
        if "train/loss" in events.Tags()["scalars"]:
            found |= {event.step: event.value for event in events.Scalars("train/loss")}
    assert found == pytest.approx(losses(tmp_path / "out"), rel=1e-6)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_no_events_are_written_unless_asked_for(done: Trained) -> None:
    assert not list(done.folder.rglob("*tfevents*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU has both precisions")
def test_bfloat16_works_on_a_cpu(recipe: Path, tmp_path: Path) -> None:
    assert train(recipe, tmp_path / "out", "--set", "training.precision=bf16") == 0
    tensors = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    folded = tmp_path / "folded"
    arguments = ["fold", str(tmp_path / "out" / "adapter"), "-o", str(folded), "--check-error"]
    assert run(loraover_export.cli.cli, arguments) == 0


def test_the_recorded_command_of_a_resumed_run_starts_anew(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    words = ["train", str(recipe), "-o", str(out), "--method", "lora"]
    assert run(cli, words) == 0
    shutil.rmtree(out / "adapter")
    monkeypatch.setattr(sys, "argv", ["loraover", *words, "--resume"])
    assert run(cli, [*words, "--resume"]) == 0
    command = f"loraover {shlex.join(words)}"
    assert f"\n{command}\n" in (out / "adapter" / "README.md").read_text()
