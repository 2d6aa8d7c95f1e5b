"""Training examples that are cut, or that have nothing to learn, are counted and said; open values are chosen."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import loraover
from loraover.cli import cli
from loraover.common.command_line import run
from loraover.common.errors import ConfigError, DataError
from loraover.common.reporter import SILENT
from loraover.data.sources import Counted, Rows
from loraover.models.device import Allowance, choose_device, prefers_bf16
from loraover.models.load import load_config, load_model, load_tokenizer, resolve_model
from loraover.training.launch.defaults import LEARNING_RATES, with_defaults
from loraover.training.plan import make_plan
from loraover.training.recipe import load_recipe
from loraover.training.rows.lengths import Tokens, count_tokens, summarise
from loraover.training.run.build import build
from loraover.training.run_result import Lengths, read_run

from support.lines import Lines
from support.machine import with_memory
from support.tiny_hub import write_recipe
from support.train_command import TURNS, data_file, train

pytestmark = pytest.mark.process


CUT: dict[str, Any] = {"evaluation": {"examples": 0}, "training": {"max_length": 16}}


@pytest.mark.parametrize("kind", ["llama", "chat"])
def test_tokens_are_those_that_trl_trains_on(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    source = resolve_model(str(bases[kind]))
    tokenizer = load_tokenizer(source)
    texts: list[dict[str, Any]] = [{"prompt": "1+1?", "completion": " 2" * n} for n in (1, 5)]
    chats: list[dict[str, Any]] = [{"prompt": TURNS[:n], "completion": TURNS[n : n + 1]} for n in (1, 3)]
    rows = chats if kind == "chat" else texts
    config = SFTConfig(str(tmp_path), max_length=None, bf16=False, use_cpu=True, report_to="none")
    made = SFTTrainer(load_model(source), config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    labelled = [sum(label != -100 for label in row["labels"]) for row in made.train_dataset]
    found = count_tokens(Rows(rows, ""), "sft", tokenizer)
    assert [one.total for one in found] == [len(row["input_ids"]) for row in made.train_dataset]
    assert [one.total - one.prompt for one in found] == labelled


def test_input_and_target_of_an_encoder_decoder_are_cut_apart(bases: dict[str, Path]) -> None:
    rows = [{"prompt": "1+1?", "completion": "2" * 9}, {"prompt": "1" * 20, "completion": "2"}]
    found = count_tokens(Rows(rows, ""), "seq2seq", load_tokenizer(resolve_model(str(bases["t5"]))))
    assert found == [Tokens(0, 10), Tokens(0, 21)]


TOKENS = [Tokens(4, 10)] * 197 + [Tokens(20, 30), Tokens(4, 40), Tokens(4, 17)]


def summary(trainer: str = "sft", **training: Any) -> Lengths:
    recipe = load_recipe("demo", {f"training.{key}": value for key, value in ({"max_length": 16} | training).items()})
    return summarise(TOKENS, Rows([{}] * 200, "", numbers=range(11, 211)), recipe, trainer)


def test_what_is_cut_is_counted() -> None:
    found = summary()
    assert (found.cut, found.unlabelled, found.longest, found.keeps_99) == (3, 1, 40, 17)
    assert (found.cut_rows, found.unlabelled_rows) == ([208, 209, 210], [208])
    assert found.histogram == {16: 197, 32: 2, 64: 1}


def test_an_example_that_is_left_out_does_not_lengthen_the_others(base: Path) -> None:
    config = load_config(resolve_model(str(base)))  # of 256 tokens
    recipe = load_recipe("demo", {"training.max_length": None})
    for tokens, trainer, expected in (
        ([Tokens(4, 54), Tokens(300, 310)], None, 54),
        ([Tokens(4, 54), Tokens(100, 310)], None, 256),  # which is cut
        ([Tokens(4, 54), Tokens(100, 310)], "reward", 54),
        ([Tokens(300, 310)], None, 256),
    ):
        asked = recipe.model_copy(update={"trainer": trainer})
        assert with_defaults(asked, config, tokens, SILENT).training.max_length == expected


@pytest.mark.parametrize(
    ("found", "cut", "unlabelled"),
    [
        (summary("reward"), 3, 3),
        (summary(truncation_mode="keep_end"), 3, 0),
        (summary(completion_only_loss=False), 3, 0),
        (summary(packing=True), 3, 1),
        (summary(packing=True, packing_strategy="wrapped"), 0, 0),
    ],
)
def test_what_is_cut_depends_on_the_trainer(found: Lengths, cut: int, unlabelled: int) -> None:
    assert (found.cut, found.unlabelled) == (cut, unlabelled)


ASKED = [{"role": "user", "content": "1" * (60 if n in (1, 4) else 2)} for n in range(6)]


@pytest.mark.parametrize("trainer", ["reward", "dpo"])
@pytest.mark.parametrize(
    ("rows", "max_length", "left_out"),
    [
        ([{"chosen": [a, TURNS[1]], "rejected": [a, TURNS[3]]} for a in ASKED], 40, [2, 5]),
        ([{"chosen": "1 2 3", "rejected": "1 2"}] * 4, None, []),  # the end of a text has room
    ],
)
def test_preferences_that_trl_leaves_out_are_counted(
    trainer: str,
    rows: list[dict[str, Any]],
    max_length: int | None,
    left_out: list[int],
    bases: dict[str, Path],
    tmp_path: Path,
) -> None:
    """TRL finds the prompt of a preference in what both conversations begin with."""
    data = {"train": str(data_file(tmp_path / "rows.jsonl", *rows)), "train_examples": None}
    changes: dict[str, Any] = {
        "trainer": trainer,
        "evaluation": {"examples": 0},
        "training": {"max_length": max_length},
    }
    base = bases["chat" if left_out else "llama"]
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", base, method="lora", data=data, **changes))
    (tmp_path / "out").mkdir()
    prepared = build(recipe, tmp_path / "out", SILENT)
    assert prepared.lengths is not None
    assert prepared.lengths.unlabelled_rows == left_out
    assert len(prepared.trainer.train_dataset) == 4


def test_held_out_rows_that_are_cut_are_said(bases: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"prompt": "1 =", "completion": " 1" * (30 if n == 2 else 2)} for n in range(4)]
    files = {
        "train": str(data_file(tmp_path / "a.jsonl", rows[0])),
        "test": str(data_file(tmp_path / "b.jsonl", *rows)),
    }
    recipe = write_recipe(tmp_path / "r.yaml", bases["llama"], method="lora", data=files)
    asked = {"evaluation.examples": 4, "evaluation.exact_match": False, "training.max_length": 16}
    make_plan(load_recipe(str(recipe), asked), report := Lines())
    line = "1 of 4 held-out examples are longer than training.max_length = 16, so their ends are cut (rows 3)"
    assert f"{line}, and count so in the loss" in report.lines


KIND = {"role": "system", "content": "Be kind."}
TOOL = {"type": "function", "function": {"name": "add", "description": "", "parameters": {}}}
CALLS = [{"type": "function", "function": {"name": "add"}}]
CALL = {"role": "assistant", "content": "", "tool_calls": CALLS}
PLAIN = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (PLAIN, {"tools": [TOOL]}, "row 2 has a column 'tools', which the model's chat template leaves out"),
        (
            PLAIN.replace("{% endfor", "{{ (message['tool_calls'] or [''])[0] }}{% endfor"),
            {"completion": [CALL | {"tool_calls": CALLS * 2}]},
            "row 2 has a call of a tool, which the model's chat template leaves out",
        ),
        (
            PLAIN.replace("{{ message['role'] }}: ", "{% if message['role'] != 'tool' %}").replace(
                "{% endfor", "{% endif %}{% endfor"
            ),
            {"prompt": [TURNS[0], {"role": "tool", "content": TURNS[1]["content"]}]},
            "row 2 has a message of the role 'tool', which the model's chat template leaves out",
        ),
        (PLAIN, {"completion": [CALL]}, "row 2 has a call of a tool, which the model's chat template leaves out"),
        (
            PLAIN.replace("{{ message['role'] }}", "{% if message['role'] != 'system' or loop.first %}").replace(
                "{% endfor", "{% endif %}{% endfor"
            ),
            {"prompt": [KIND, TURNS[0], KIND | {"content": "Be brief."}, TURNS[0]]},
            "row 2 has a message of the role 'system', which the model's chat template leaves out",
        ),
        (
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN,
            {"prompt": [KIND, TURNS[0]]},
            "row 2: the model's chat template refuses it: no system",
        ),
        (
            "{% if messages[-1]['role'] == 'system' %}{{ raise_exception('no question') }}{% endif %}" + PLAIN,
            {"prompt": [KIND], "completion": TURNS[:2]},
            "row 2: the model's chat template refuses it: no question",
        ),
    ],
)
def test_what_a_chat_template_does_not_write_is_refused(
    template: str, row: dict[str, Any], message: str, bases: dict[str, Path]
) -> None:
    tokenizer = load_tokenizer(resolve_model(str(bases["chat"])))
    tokenizer.chat_template = template
    asked = {"prompt": TURNS[:1], "completion": [TURNS[1] | {"tool_calls": None}]}
    with pytest.raises(DataError, match=message):
        count_tokens(Rows([asked, asked | row], "rows"), "sft", tokenizer)
    assert count_tokens(Rows([asked, asked], "rows"), "sft", tokenizer)


def test_a_preference_may_call_a_tool_in_one_answer_only(bases: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(resolve_model(str(bases["chat"])))
    tokenizer.chat_template = PLAIN.replace("{% endfor", "{{ message['tool_calls'] }}{% endfor")
    for chosen, rejected in ((TURNS[1], CALL), (CALL, TURNS[1])):
        row = {"prompt": TURNS[:1], "chosen": [chosen], "rejected": [rejected]}
        assert count_tokens(Rows([row], "rows"), "dpo", tokenizer)


def test_the_prompt_that_trl_finds_has_the_tools_of_its_row(bases: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(resolve_model(str(bases["chat"])))
    tokenizer.chat_template = "{{ tools }}" + PLAIN
    pair: dict[str, Any] = {"chosen": TURNS[:2], "rejected": [TURNS[0], TURNS[1] | {"content": "no"}], "tools": [TOOL]}
    written = {"prompt": TURNS[:1], "chosen": pair["chosen"][1:], "rejected": pair["rejected"][1:], "tools": [TOOL]}
    found, expected = (count_tokens(Rows([row], "rows"), "dpo", tokenizer) for row in (pair, written))
    assert found == expected


def test_what_a_reward_reads_is_not_counted(bases: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(resolve_model(str(bases["chat"])))
    row: dict[str, Any] = {"prompt": TURNS[:1]}
    expected = count_tokens(Rows([row], "rows"), "grpo", tokenizer)
    assert count_tokens(Rows([row | {"completion": 7, "text": ["8"]}], "rows"), "grpo", tokenizer) == expected


def test_cut_examples_are_said_with_their_lines_and_kept(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "1+1?", "completion": " 2" * (20 if n in (3, 5) else 1)} for n in range(40)]
    rows[7] = {"prompt": "1" * 30, "completion": " 2"}
    file = data_file(tmp_path / "rows.jsonl", *rows)
    changes = {"data": {"train": str(file), "train_examples": None}, **CUT}
    recipe = write_recipe(tmp_path / "r.yaml", base, method="lora", **changes)
    assert train(recipe, tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert (
        "warning: 3 of 40 examples are longer than training.max_length = 16, so their ends are cut (rows 4, 6, 8)"
        in said
    )
    assert "1 of 40 examples have no room for their completion within training.max_length = 16 and are left out" in said
    assert "left out (rows 8)" in said
    kept = read_run(tmp_path / "out").lengths
    assert kept is not None
    assert (kept.cut, kept.unlabelled, kept.cut_rows) == (3, 1, [4, 6, 8])
    assert run(cli, ["train", str(recipe), "--plan"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "up to 8 tokens ######################## 37" in shown
    assert "3 of 40 (7.5%) at max_length 16; 1 of them have nothing to learn" in shown


def test_data_and_a_model_are_enough(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": f"{n}+1?", "completion": f" {n + 1}"} for n in range(40)]
    file = data_file(tmp_path / "rows.jsonl", *rows)
    monkeypatch.chdir(tmp_path)
    assert run(cli, ["train", "--data", str(file), "--model", str(base)]) == 0
    made = load_recipe(str(tmp_path / "runs" / "rows-1" / "recipe.yaml"))
    found = read_run(tmp_path / "runs" / "rows-1")
    assert found.lengths is not None
    assert (found.steps, found.lengths.cut) == (5, 0)
    assert made.training.learning_rate == found.learning_rate == pytest.approx(LEARNING_RATES["lora-over"] * 576 / 32)
    assert (made.training.micro_batch, made.training.max_length) == (8, found.lengths.longest)
    assert (made.training.warmup_steps, made.training.bf16) == (0.03, prefers_bf16(choose_device()))
    assert found.before is not None
    assert (found.before.examples, found.before.exact_match) == (2, None)


def test_one_step_trains(base: Path, tmp_path: Path) -> None:
    file = data_file(tmp_path / "rows.jsonl", *[{"prompt": f"{n}+1?", "completion": f" {n + 1}"} for n in range(8)])
    said, options = Lines(), {"data.train": str(file), "model": str(base)}
    assert loraover.train(None, tmp_path / "out", overrides=options).update_norm
    assert loraover.train(None, tmp_path / "share", report=said, overrides=options | {"training.warmup_steps": 0.5})
    assert "training.warmup_steps: none, since 0.5 of 1 steps is less than one" in said.lines
    still = loraover.train(None, tmp_path / "still", report=said, overrides=options | {"training.warmup_steps": 1})
    assert still.update_norm == 0
    assert "warning: 1 step changed nothing: the adapter computes the same as before" in said.lines


def test_rows_and_columns_that_are_not_learned_are_kept(base: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}+1?", "completion": f" {n + 1}", "level": n or None} for n in range(40)]
    files = [str(data_file(tmp_path / f"{k}.jsonl", *rows)) for k in range(2)]
    changes: dict[str, Any] = {"data": {"train": files, "train_examples": None, "keep": {"prompt": "[^3]\\+"}}, **CUT}
    said = Lines()
    recipe = str(write_recipe(tmp_path / "r.yaml", base, method="lora", **changes))
    found = loraover.train(recipe, tmp_path / "out", report=said, overrides={"training.max_steps": 1})
    named = [f"{number} of file 0.jsonl" for number in (4, 14, 24)]
    assert (found.filtered.count, found.filtered.first) == (8, named)
    assert found.unread == {"level": Counted(70, [f"{number} of file 0.jsonl" for number in (2, 3, 5)])}
    shown = ", ".join(named)
    assert f"8 rows are left out, since data.keep excludes them (rows {shown}, ...)" in said.lines
    assert "column 'level' is not learned; 70 rows have it (rows 2 of file 0.jsonl, " in "".join(said.lines)


def test_rows_that_a_template_refuses_are_listed_or_skipped(bases: dict[str, Path], tmp_path: Path) -> None:
    """Before the model is loaded."""
    base = shutil.copytree(bases["chat"], tmp_path / "base")
    template = base / "chat_template.jinja"
    strict = "{% if messages[0].content == '1' %}{{ raise_exception('no') }}{% endif %}"
    template.write_text(strict + template.read_text())
    rows = [{"prompt": str(n % 2), "completion": str(n)} for n in range(12)]
    file = data_file(tmp_path / "rows.jsonl", *rows, {"prompt": "a"})
    changes: dict[str, Any] = {"data": {"train": str(file), "train_examples": None}, "evaluation": {"examples": 0}}
    recipe = write_recipe(tmp_path / "r.yaml", base, method="lora", **changes)
    said = Lines()
    result = loraover.train(recipe, tmp_path / "out", report=said, overrides={"data.skip_bad_rows": True})
    assert result.lengths is not None
    assert (result.lengths.examples, result.skipped.count, result.skipped.first) == (6, 7, [13, 2, 4])
    assert "warning: 6 rows are skipped, since they cannot be learned (rows 2, 4, 6, ...)" in said.lines
    (base / "model.safetensors").unlink()
    data_file(tmp_path / "rows.jsonl", *rows)
    with pytest.raises(DataError, match="6 rows cannot be learned") as caught:
        loraover.train(recipe, tmp_path / "no")
    assert sum("row" in line and "refuses it: no" in line for line in str(caught.value).splitlines()) == 6
    data_file(tmp_path / "rows.jsonl", *({"prompt": "0", "level": level} for level in (1, "a")))
    rewarded = {"trainer": "grpo", "reward_funcs": ["think_format_reward"], "training.num_generations": 2}
    with pytest.raises(DataError, match="has values of several types"):
        loraover.train(recipe, tmp_path / "no", overrides=rewarded)


def test_a_plan_counts_the_rows_that_a_run_trains_on(base: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "1" * (2 if n == 7 else 30), "completion": f" {n}"} for n in range(40)]
    data = {"train": str(data_file(tmp_path / "rows.jsonl", *rows)), "train_examples": None}
    training = {"max_length": 16, "max_steps": None, "num_train_epochs": 1}
    recipe = write_recipe(tmp_path / "r.yaml", base, data=data, training=training)
    made = make_plan(load_recipe(recipe))
    assert made.lengths is not None
    assert (made.steps, made.lengths.examples, made.lengths.unlabelled) == (1, 38, 37)
    data_file(tmp_path / "rows.jsonl", *rows[8:])
    with pytest.raises(DataError, match=r"no example fits training.max_length = 16.*34 tokens"):
        make_plan(load_recipe(recipe))


@pytest.mark.parametrize(("words", "said"), [([], "required"), (["--data", "a.jsonl"], "model: required and missing")])
def test_without_a_recipe_model_and_data_are_asked_for(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(cli, ["train", *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("gigabytes", "batch", "checkpointing"), [(1, 8, False), (0.002, 2, False), (0.0007, 1, True)])
def test_auto_takes_the_largest_batch_that_fits(
    gigabytes: float, batch: int, checkpointing: bool, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_memory(monkeypatch, [Allowance(int(gigabytes * 1e9), free=0)])
    said = Lines()
    found = make_plan(load_recipe(str(recipe), {"training.per_device_train_batch_size": "auto"}), said)
    assert found.lengths is not None
    assert (found.lengths.examples, found.lengths.cut) == (20, 0)
    (line,) = [line for line in said.lines if "per_device_train_batch_size" in line]
    assert f"per_device_train_batch_size: {batch}, which" in line
    assert f"gradient_accumulation_steps: {8 // batch}" in line
    assert ("gradient_checkpointing" in line) is checkpointing


def test_auto_on_a_machine_that_is_too_small_is_refused(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_memory(monkeypatch, [Allowance(10_000, free=0)])
    with pytest.raises(ConfigError, match="not even one example of 128 tokens fits"):
        make_plan(load_recipe(str(recipe), {"training.per_device_train_batch_size": "auto"}))
