"""The tables of the paper, each run whole by its command on tiny models of the kinds that it names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from loraover.cli import cli
from loraover.common.command_line import run
from loraover.common.errors import ConfigError
from loraover.training.recipe import load_recipe
from loraover_lab.evaluation.results import Evaluation, ModelResult
from loraover_lab.evaluation.run import evaluate
from loraover_lab.study import runner
from loraover_lab.study.forecast import plan_study
from loraover_lab.study.outcome import read_kept
from loraover_lab.study.report import StudyReport
from loraover_lab.study.request import PAPER_TABLES, StudyRequest, read_table, table_choices
from loraover_lab.study.runner import run_study

from support.bubblewrap import needs_bubblewrap
from support.fastchat import fastchat
from support.openai_server import openai_server
from support.published import LLAMA_2, LLAMA_3_1, SLICES, TEXT
from support.tiny_hub import save_llama, save_t5

pytestmark = pytest.mark.process

METHODS = ("lora", "lora+", "mpo-static", "mpo-dynamic", "eigen")
WHOLE = pytest.param(METHODS, marks=pytest.mark.matrix, id="whole")
"""All methods of a table, which take a minute."""
PROBLEM = {
    "task_id": "T/0",
    "prompt": "def double(x):\n",
    "entry_point": "double",
    "test": "def check(candidate):\n    assert candidate(3) == 6\n",
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    folder = tmp_path_factory.mktemp("bases")
    llamas = [save_llama(folder / "llama-2", **LLAMA_2), save_llama(folder / "llama-3.1", **LLAMA_3_1)]
    return {"t5": [save_t5(folder / "t5")], "llama": llamas}


def rows(table: str, folder: Path) -> Path:
    """A folder with a training and a test file that have the columns of all recipes of a table."""
    columns = {key: value for recipe in read_table(table)["recipes"] for key, value in SLICES[recipe].items()}
    columns |= {"label": 1} if "label" in columns else {}
    for split, count in (("train", 12), ("test", 4)):
        some = [columns | {key: f"{TEXT} {split} {i}" for key in columns if columns[key] == TEXT} for i in range(count)]
        (folder / f"{split}.jsonl").write_text(
            "".join(json.dumps(row | {"idx": i}) + "\n" for i, row in enumerate(some))
        )
    return folder


def words(
    table: str, folder: Path, bases: dict[str, list[Path]], *more: str, seeds: int = 1, sweep: str = "1e-2"
) -> list[str]:
    """The command of a table, with few steps on a tiny model and files in place of the hub's."""
    data = rows(table, folder)
    keys = {"data.train": data / "train.jsonl", "data.test": data / "test.jsonl", "data.train_examples": 12}
    keys |= {"data.train_split": "train", "data.test_split": "test"}
    keys |= {"training.num_train_epochs": "null", "training.max_steps": 2, "training.gradient_accumulation_steps": 1}
    keys |= {"training.bf16": "false", "training.per_device_train_batch_size": 4, "over.rounds": 1}
    models = bases["t5" if table == "paper-glue" else "llama"]
    options = [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
    options += [word for model in models for word in ("--model", str(model))]
    return ["study", table, "-o", str(folder / "out"), "--seeds", str(seeds), "--lr-sweep", sweep, *options, *more]


class Asked(NamedTuple):
    """A table, and options of its benchmark."""

    table: str
    options: list[str]


@pytest.fixture
def asked(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Asked]:
    """A table, with a judge where its benchmark needs one."""
    with ExitStack() as until:
        if request.param == "paper-mtbench":
            judge = until.enter_context(openai_server(lambda body: "Rating: [[7]]"))
            more = [f"data={fastchat(tmp_path / 'questions')}", f"judge_url={judge.url}", "judge_model=tester"]
        elif request.param == "paper-humaneval":
            (tmp_path / "problems.jsonl").write_text(json.dumps(PROBLEM) + "\n")
            more = [f"data={tmp_path / 'problems.jsonl'}", "allow_code_execution=true"]
        else:
            more = [sums(tmp_path)]
        yield Asked(request.param, asking(*more))


def sums(folder: Path) -> str:
    """Write a question of GSM8K; returns the option that names it."""
    (folder / "sums.jsonl").write_text(json.dumps({"question": "2 + 2?", "answer": "#### 4"}) + "\n")
    return f"data={folder / 'sums.jsonl'}"


def asking(*options: str) -> list[str]:
    return [word for option in (*options, "new_tokens=4", "dtype=fp32") for word in ("--ask", option)]


def report_of(folder: Path) -> StudyReport:
    return StudyReport.model_validate_json((folder / "out" / "study.json").read_text())


@pytest.mark.parametrize("methods", [("lora", "mpo-dynamic"), WHOLE])
def test_glue_is_scored_by_the_answers_to_held_out_rows(
    methods: tuple[str, ...], bases: dict[str, list[Path]], tmp_path: Path
) -> None:
    assert run(cli, words("paper-glue", tmp_path, bases, "--methods", ",".join(methods))) == 0
    found = report_of(tmp_path)
    assert [task.task for task in found.tasks] == read_table("paper-glue")["recipes"]
    assert found.command.startswith("loraover study paper-glue ")
    for task in found.tasks:
        assert [task.shown(one.method) for one in task.methods] == [*methods]
        assert all(one.score is not None and one.score % 25 == 0 for one in task.methods)  # of four rows
    table = (tmp_path / "out" / "study.md").read_text().partition("### Scores")[2].partition("###")[0]
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0].strip("| ") for line in lines] == ["method", "---", *methods]
    assert lines[0].endswith(" | mean |")
    assert all(f"- {choice}" in table for choice in table_choices("paper-glue"))


@pytest.mark.parametrize(
    ("asked", "methods"),
    [
        ("paper-mtbench", ("lora+", "eigen")),
        pytest.param("paper-humaneval", ("lora+", "eigen"), marks=needs_bubblewrap),
        pytest.param("paper-gsm8k", METHODS, marks=pytest.mark.matrix),
        pytest.param("paper-mtbench", METHODS, marks=pytest.mark.matrix),
        pytest.param("paper-humaneval", METHODS, marks=[pytest.mark.matrix, needs_bubblewrap]),
    ],
    indirect=["asked"],
)
def test_a_table_of_two_models_is_scored_by_its_benchmark(
    methods: tuple[str, ...],
    asked: Asked,
    bases: dict[str, list[Path]],
    tmp_path: Path,
) -> None:
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    table = asked.table
    command = words(table, tmp_path, bases, *asked.options, "--methods", ",".join(methods))
    assert run(cli, command) == 0
    found = report_of(tmp_path)
    (recipe,) = read_table(table)["recipes"]
    assert [task.task for task in found.tasks] == [f"{recipe}-llama-2", f"{recipe}-llama-3.1"]
    assert found.scores.untrained.keys() == {task.task for task in found.tasks}
    for task in found.tasks:
        (file,) = (tmp_path / "out" / runner.FOLDER).glob(f"{task.task}.*.json")
        _, *results = Evaluation.model_validate_json(file.read_text()).results
        scores = [one.score for one in task.methods]
        assert scores == [runner.score_of(one) for one in results]
        assert all(score == 7 for score in scores) is (table == "paper-mtbench")

    # The same command asks nothing again.
    answers = sorted((tmp_path / "out" / runner.FOLDER).iterdir())
    before = [(file, file.stat().st_mtime_ns) for file in answers]
    assert run(cli, command) == 0
    assert [(file, file.stat().st_mtime_ns) for file in answers] == before
    assert report_of(tmp_path).tasks == found.tasks
    page = (tmp_path / "out" / "study.html").read_text()
    assert page.count("untrained") == 1


def test_a_benchmark_that_fails_leaves_no_score(
    bases: dict[str, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")

    def failing(function: Any, request: Any) -> None:
        found = evaluate.__wrapped__(request)  # type: ignore[attr-defined]
        last = ModelResult(name=found.results[-1].name, failure="out of memory")
        failed = found.model_copy(update={"results": [*found.results[:-1], last]})
        request.output.write_text(failed.model_dump_json())

    monkeypatch.setattr(runner, "perform", failing)
    more = [*asking(sums(tmp_path)), "--methods", "lora,lora+"]
    command = words("paper-gsm8k", tmp_path, {"llama": bases["llama"][:1]}, *more)
    assert run(cli, command) == 0
    (task,) = report_of(tmp_path).tasks
    assert [one.score is None for one in task.methods] == [False, True]

    # The same command asks the adapter that failed again.
    monkeypatch.undo()
    assert run(cli, command) == 0
    (task,) = report_of(tmp_path).tasks
    assert [one.score is None for one in task.methods] == [False, False]


def test_adapters_at_the_chosen_rate_alone_are_scored(bases: dict[str, list[Path]], tmp_path: Path) -> None:
    """Also those of seeds that are added to a study that is finished, and after other questions."""
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    one, more = {"llama": bases["llama"][:1]}, [*asking(sums(tmp_path)), "--methods", "lora"]
    for seeds in (1, 2):
        command = words("paper-gsm8k", tmp_path, one, *more, seeds=seeds, sweep="1e-4,1e-2")
        assert run(cli, command) == 0
    found = report_of(tmp_path)
    (best,) = {one.rate for one in found.tasks[0].methods}
    (file,) = (tmp_path / "out" / runner.FOLDER).iterdir()
    _, *results = Evaluation.model_validate_json(file.read_text()).results
    scored = sorted(Path(result.name).parts[-3:-1] for result in results)
    assert scored == [(f"lr-{best:g}", "seed-0"), (f"lr-{best:g}", "seed-1")]
    kept = [one.score for one in read_kept(tmp_path / "out")]
    assert kept == [None] * 3  # whatever the benchmark is

    assert run(cli, [*command, "--report-only"]) == 0
    assert report_of(tmp_path).tasks == found.tasks
    assert run(cli, [*command, "--report-only", "--ask", "limit=1"]) == 0
    assert [one.score for one in report_of(tmp_path).tasks[0].methods] == [None]
    shutil.rmtree(tmp_path / "out" / "runs")
    assert run(cli, command) == 0  # answers that are kept need no adapter
    assert run(cli, [*command, "--ask", "limit=1"]) == 2


@pytest.mark.parametrize("table", PAPER_TABLES)
def test_a_table_is_a_study_that_arguments_change(table: str, tmp_path: Path) -> None:
    whole = StudyRequest(table, tmp_path, settings={"training.max_steps": 3}).whole()
    assert whole.methods == METHODS
    assert (whole.seeds, whole.tuning_seeds) == (3, 1)
    assert {len(rates) for rates in whole.rates.values()} == {3}
    assert whole.settings == {"training.max_steps": 3} | (read_table(table).get("settings") or {})
    assert all(load_recipe(recipe).lora.r == 8 for recipe in whole.recipes)
    fewer = StudyRequest(table, tmp_path, methods="lora,eigen", lr_sweep=(1e-3,), models="one").whole()
    assert fewer.methods == ("lora", "eigen")
    assert set(fewer.rates.values()) == {(1e-3,)}
    assert fewer.tasks == whole.recipes
    assert table_choices(table)[0] == table_choices("paper-glue")[0]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"benchmark_settings": {"limi": 3}}, "benchmark_settings names 'limi', expected one of data, limit"),
        ({"benchmark_settings": {"limit": 0}}, "limit is 0, expected 1 or more"),
        ({"benchmark_settings": {"judge_url": "http://a"}}, "judge_url needs judge_model"),
        ({"benchmark_settings": {"adapters": "a"}}, "names 'adapters'"),
        ({"ray": "local"}, "benchmark needs the adapters"),
        ({"settings": {"evaluation.exact_match": True}}, "both give the scores"),
        ({"methods": "lora,eigen-2", "lr_sweep": {"eigen": (1e-3,), "": (1e-3,)}}, "lr_sweep names 'eigen'"),
        ({"required": 3}, "required=3: expected 1 to 2"),
    ],
)
def test_what_a_table_cannot_be_asked_is_refused(more: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        StudyRequest("paper-gsm8k", tmp_path, **more)


def test_a_benchmark_is_checked_before_the_first_run(bases: dict[str, list[Path]], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"mtbench needs data.*Options of the benchmark: benchmark_settings"):
        run_study("paper-mtbench", tmp_path / "out", models=bases["llama"])
    assert not (tmp_path / "out").exists()
    for names in ("paper-gsm8", ("paper-gsm8k", "demo")):
        with pytest.raises(ConfigError, match="stands alone, and is one of paper-glue, "):
            StudyRequest(names, tmp_path)
    with pytest.raises(ConfigError, match="benchmark_settings needs benchmark"):
        StudyRequest("demo", tmp_path, benchmark_settings={"limit": 3})


def test_a_plan_counts_the_runs_of_a_table_and_trains_nothing(
    bases: dict[str, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--methods", "lora,mpo-dynamic", "--plan"]
    one = {"llama": bases["llama"][:1]}
    command = words("paper-gsm8k", tmp_path, one, *more, seeds=3, sweep="1e-3,1e-2")
    assert run(cli, command) == 0
    shown = capsys.readouterr().out
    assert "8 runs; " in shown  # two rates and two further seeds of two methods
    assert run(cli, [*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(one["method"], one["runs"], one["steps"]) for one in found["methods"]] == [
        ("lora", 4, 2),
        ("mpo-dynamic", 4, 2),
    ]
    assert all(one["step_seconds"] > 0 for one in found["methods"])
    lora, over = (one["held_bytes"] for one in found["methods"])
    assert over > lora
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="call plan_study"):
        run_study("paper-gsm8k", tmp_path, plan=True)
    with pytest.raises(ConfigError, match="two questions"):
        plan_study("paper-gsm8k", tmp_path, plan=True, power=tmp_path, seeds=2)
