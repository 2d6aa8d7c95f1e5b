"""HumanEval: completions that are known to be right or wrong, and a tiny model's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loraover.cli import cli
from loraover.common.command_line import run
from loraover.common.errors import DataError
from loraover_lab.evaluation import TASKS
from loraover_lab.evaluation.humaneval import STOPS, cut, program
from loraover_lab.evaluation.request import EvaluationRequest
from loraover_lab.evaluation.sandbox import check_sandbox, run_program

from support.bubblewrap import needs_bubblewrap
from support.openai_server import openai_server
from support.real_data import real_data
from support.tiny_hub import save_llama

pytestmark = pytest.mark.process

DOUBLE = {
    "task_id": "T/0",
    "prompt": 'def double(x):\n    """Twice x."""\n',
    "entry_point": "double",
    "test": "def check(candidate):\n    assert candidate(3) == 6\n    assert candidate(-1) == -2\n",
}
HALVE = {**DOUBLE, "task_id": "T/1", "prompt": "def halve(x):\n", "entry_point": "halve"} | {
    "test": "def check(candidate):\n    assert candidate(6) == 3\n"
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("code"))


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(problem) + "\n" for problem in (DOUBLE, HALVE)))
    return path


def words(model: Path, problems: Path, *more: str) -> list[str]:
    return ["eval", str(model), "--task", "humaneval", "--data", str(problems), *more]


@needs_bubblewrap
def test_served_completions_are_run_against_their_tests(model: Path, problems: Path, tmp_path: Path) -> None:
    def reply(body: dict[str, Any]) -> str:
        assert (body["stop"], body["temperature"]) == (list(STOPS), 0)
        if "halve" in body["prompt"]:
            return "    return x / 3\n"
        return "    return 2 * x\n\ndef unasked():\n    raise SystemExit\n" if body["model"] == "good" else "    x 2\n"

    out = tmp_path / "out.json"
    with openai_server(reply) as server:
        more = ["--endpoint", server.url, "--endpoint-model", "base", "--endpoint-model", "good", "-o", str(out)]
        assert run(cli, words(model, problems, "--allow-code-execution", *more)) == 0
    base, good = json.loads(out.read_text())["results"]
    assert (base["name"], base["measures"]) == ("base", {"pass@1": 0.0})
    assert (good["name"], good["measures"]) == ("good", {"pass@1": 0.5})
    assert [e["note"] for e in base["examples"]] == [
        "SyntaxError: invalid syntax (<program>, line 3)",
        "AssertionError: ",
    ]
    assert good["examples"][0] == {
        "id": "T/0",
        "score": 1.0,
        "answer": "    return 2 * x\n",
        "expected": "",
        "note": "passed",
    }


@needs_bubblewrap
def test_a_model_in_memory_completes_in_batches(model: Path, problems: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    more = ["--allow-code-execution", "--new-tokens", "8", "--batch-size", "2", "-o", str(out)]
    assert run(cli, words(model, problems, *more)) == 0
    (base,) = json.loads(out.read_text())["results"]
    assert base["measures"] == {"pass@1": 0.0}
    assert all(example["answer"] for example in base["examples"])


def test_code_is_run_only_by_consent(model: Path, problems: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cli, words(model, problems)) == 2
    assert "--allow-code-execution" in capsys.readouterr().err


def test_where_nothing_can_hold_the_code_it_is_not_generated_either(
    model: Path, problems: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(problems.parent))  # which holds no bwrap
    check_sandbox.cache_clear()
    assert run(cli, words(model, problems, "--allow-code-execution")) == 2
    assert "running generated code needs bubblewrap" in capsys.readouterr().err


def test_a_completion_ends_where_the_function_does() -> None:
    assert cut("    return 1\n\ndef other():\n    pass", STOPS) == "    return 1\n"
    assert cut("    return 1\n# done\nclass X: pass", STOPS) == "    return 1"
    assert cut("    return 1\n```\n\nIt returns 1.", STOPS) == "    return 1"
    assert cut("    if x:\n        print(x)\n    return 1", STOPS) == "    if x:\n        print(x)\n    return 1"


def test_rows_that_lack_a_field_are_named(tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps(DOUBLE) + "\n" + json.dumps({"task_id": "T/1", "prompt": "x", "test": "y"}) + "\n")
    with pytest.raises(DataError, match=r"row 2: has fields .* expected 'entry_point'"):
        TASKS["humaneval"].read(EvaluationRequest("m", "humaneval", data=str(path)))


@needs_bubblewrap
def test_canonical_solutions_pass_and_empty_ones_fail() -> None:
    path = real_data("humaneval/HumanEval.jsonl.gz")
    found = TASKS["humaneval"].read(EvaluationRequest("m", "humaneval", data=str(path)))
    assert len(found.rows) == 164
    import gzip

    with gzip.open(path, "rt") as file:
        solutions = [json.loads(line)["canonical_solution"] for line in file]
    for problem, solution in list(zip(found.rows, solutions, strict=True))[::16]:
        assert run_program(program(problem, solution)).passed, problem["task_id"]
        assert not run_program(program(problem, "    pass\n")).passed, problem["task_id"]
