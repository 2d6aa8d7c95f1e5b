"""MT-Bench in FastChat's format, with a judge of a few lines."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraover.cli import cli
from loraover.client import endpoint as endpoint_module
from loraover.common.command_line import run
from loraover.common.errors import DataError
from loraover_lab.evaluation import TASKS
from loraover_lab.evaluation.mt_bench import QUESTIONS, REFERENCES, find_rating
from loraover_lab.evaluation.request import EvaluationRequest

from support.fastchat import ASKED, fastchat, write_rows
from support.openai_server import Recorded, openai_server
from support.real_data import data_folder, real_data
from support.tiny_hub import save_llama

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("chat"), chat=True)


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "PAUSES_S", (0.0, 0.0))


def evaluated(
    model: Path, folder: Path, reply: Callable[[dict[str, Any]], Any], *more: str
) -> tuple[dict[str, Any], Recorded, int]:
    """What the command wrote, what the judge was sent, and the exit code."""
    with openai_server(reply) as judge:
        return evaluated_by(judge, model, folder, *more)


def words(judge: Recorded, model: Path, folder: Path) -> list[str]:
    asked = ["eval", str(model), "--task", "mtbench", "--data", str(fastchat(folder)), "--new-tokens", "6"]
    return [*asked, "--judge-url", judge.url, "--judge-model", "tester", "-o", str(folder / "out.json")]


def evaluated_by(judge: Recorded, model: Path, folder: Path, *more: str) -> tuple[dict[str, Any], Recorded, int]:
    code, out = run(cli, [*words(judge, model, folder), *more]), folder / "out.json"
    return (json.loads(out.read_text()) if out.exists() else {}), judge, code


def test_both_turns_are_rated_and_the_judge_is_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, judge, code = evaluated(model, tmp_path, lambda body: f"so: [[{len(body['messages'][0]['content']) // 5}]]")
    assert code == 0
    (result,) = found["results"]
    by_id = {example["id"]: example["score"] for example in result["examples"]}
    assert by_id == {"81, turn 1": 3, "81, turn 2": 5, "101, turn 1": 4, "101, turn 2": 6}
    assert len(judge.bodies) == 4
    shown = capsys.readouterr().out
    assert "tester" in found["settings"]["judge"]
    assert "judge: tester at http" in shown
    assert "ratings of different judges cannot be compared" in shown


def test_the_judge_sees_questions_answers_and_references(model: Path, tmp_path: Path) -> None:
    found, judge, _ = evaluated(model, tmp_path, lambda body: "Rating: [[7]]")
    asked = {body["messages"][0]["content"]: body["messages"][1]["content"] for body in judge.bodies}
    answers = {e["id"]: e["answer"] for e in found["results"][0]["examples"]}
    assert asked["judge single-v1"] == f"[Question]\nwrite {{this}}\n[Answer]\n{answers['81, turn 1']}"
    assert asked["judge single-math-v1"].endswith(f"[Reference]\nme\n[Answer]\n{answers['101, turn 1']}")
    two = f"who?|{answers['101, turn 1']}|why?|{answers['101, turn 2']}"
    assert asked["judge single-math-v1-multi-turn"] == f"me|because|{two}"
    assert answers["81, turn 1"] != ""
    assert found["results"][0]["measures"] == {"rating": 7.0, "turn 1": 7.0, "turn 2": 7.0}


@pytest.mark.parametrize(("second", "asked"), [("I would rather not say", 3), (500, 3), (400, 1)])
def test_a_question_without_a_rating_is_missing_and_no_other(
    second: str | int, asked: int, model: Path, tmp_path: Path
) -> None:
    """It is asked again where that may help only; a number that is no rating is."""

    def reply(body: dict[str, Any]) -> str | int:
        if "multi-turn" in body["messages"][0]["content"]:
            return second
        return "[[4]]" if body["temperature"] else "[[11]]"

    found, judge, code = evaluated(model, tmp_path, reply)
    (result,) = found["results"]
    assert (code, result["missing"], result["measures"]) == (0, 2, {"rating": 4.0, "turn 1": 4.0})
    assert [e["score"] for e in result["examples"]] == [4.0, None, 4.0, None]
    assert len(judge.bodies) == 2 * 2 + 2 * asked


def test_the_same_command_asks_only_for_ratings_that_are_missing(model: Path, tmp_path: Path) -> None:
    replies = iter(["[[4]]", *["no"] * 9, *["[[6]]"] * 9])
    with openai_server(lambda body: next(replies)) as judge:
        found, _, code = evaluated_by(judge, model, tmp_path)
        assert (code, found["results"][0]["missing"]) == (0, 3)
        later, _, code = evaluated_by(judge, model, tmp_path)
    (result,) = later["results"]
    assert (code, result["missing"], len(judge.bodies)) == (0, 0, 1 + 9 + 3)
    assert sorted(example["score"] for example in result["examples"]) == [4.0, 6.0, 6.0, 6.0]


@pytest.mark.parametrize(("reply", "said"), [(500, "answered 500"), ("a fine answer",) * 2])
def test_a_judge_that_rates_no_answer_at_all_ends_it(
    reply: str | int, said: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For example since it does not know a parameter that every request has."""
    found, _, code = evaluated(model, tmp_path, lambda body: reply)
    assert code == 2
    assert_unrated(found)
    error = capsys.readouterr().err
    assert "rated none of the answers" in error
    assert said in error


def assert_unrated(found: dict[str, Any]) -> None:
    (result,) = found["results"]
    assert result["failure"]
    assert (result["measures"], [example["score"] for example in result["examples"]]) == ({}, [None] * 4)
    assert all(example["answer"] for example in result["examples"])


def test_answers_are_kept_where_a_judge_refuses_the_key_and_rated_later(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the judge of another address, too, since nothing has been rated yet. The key stays secret."""
    monkeypatch.setenv("MY_KEY", "sk-sesame")
    with_key = ("--judge-key-variable", "MY_KEY")
    unrated, judge, code = evaluated(model, tmp_path, lambda body: 401, *with_key)
    assert code == 2
    assert judge.headers[0]["Authorization"] == "Bearer sk-sesame"
    assert_unrated(unrated)
    refused = capsys.readouterr()
    assert f"answers are kept in {tmp_path / 'out.json'}; the same command rates them" in refused.err

    rated, judge, code = evaluated(model, tmp_path, lambda body: "[[5]]", *with_key)
    assert code == 0
    shown = capsys.readouterr()
    assert "base: answered already" in shown.out
    assert "sesame" not in "".join([*refused, *shown, (tmp_path / "out.json").read_text()])
    assert len(judge.bodies) == 4
    (before,), (after,) = unrated["results"], rated["results"]
    assert after["measures"] == {"rating": 5.0, "turn 1": 5.0, "turn 2": 5.0}
    assert after["failure"] is None
    assert [e["answer"] for e in after["examples"]] == [e["answer"] for e in before["examples"]]
    assert evaluated(model, tmp_path, lambda body: "[[6]]")[2] == 2, "what one judge has rated is not another's"


def test_ctrl_c_does_not_wait_for_a_judge_and_keeps_the_answers(model: Path, tmp_path: Path) -> None:
    asked, done = threading.Event(), threading.Event()

    def hang(body: dict[str, Any]) -> str:
        asked.set()
        done.wait(300)
        return "[[5]]"

    with openai_server(hang) as judge:
        command = [sys.executable, "-m", "loraover.cli", *words(judge, model, tmp_path)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert asked.wait(120)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=120)
        done.set()
    assert process.returncode == 130, error
    assert_unrated(json.loads((tmp_path / "out.json").read_text()))


def test_answers_to_other_questions_are_not_rated(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unrated, _, _ = evaluated(model, tmp_path, lambda body: 401)
    del unrated["results"][0]["examples"][1:]
    (tmp_path / "out.json").write_text(json.dumps(unrated))
    capsys.readouterr()
    assert evaluated(model, tmp_path, lambda body: "[[6]]")[2] == 2
    assert "belong to other questions" in capsys.readouterr().err


def test_a_question_beyond_the_models_context_is_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = {"question_id": 82, "category": "writing", "turns": ["a" * 300, "again"]}
    write_rows(fastchat(tmp_path / "long") / QUESTIONS, [ASKED[0], long])
    found, judge, code = evaluated(model, tmp_path, lambda body: "[[6]]", "--data", str(tmp_path / "long"))
    assert (found, judge.bodies, code) == ({}, [], 2)
    assert "question 2: its 317 tokens leave no room in the model's context of 256" in capsys.readouterr().err


def test_a_model_without_a_chat_template_is_asked_in_alpacas_prompt(tmp_path: Path) -> None:
    plain = save_llama(tmp_path / "plain")
    asked: list[str] = []

    def reply(body: dict[str, Any]) -> str:
        asked.append(body["prompt"])
        return f" answer {len(asked)}\n\n### Instruction:\nmine"

    with openai_server(reply) as server:
        names = ["--endpoint", server.url, "--endpoint-model", "plain", "--batch-size", "1"]
        found, judge, code = evaluated(plain, tmp_path, lambda body: "[[3]]", *names)
    assert code == 0
    assert found["settings"]["prompt"] == "Alpaca's"
    assert asked[1].startswith("Below is an instruction")
    assert asked[1].endswith("### Instruction:\nwho?\n\n### Response:\n")
    assert asked[3] == f"{asked[1]}answer 2\n\n### Instruction:\nwhy?\n\n### Response:\n"
    assert {e["id"]: e["answer"] for e in found["results"][0]["examples"]}["101, turn 2"] == "answer 4"
    assert len(judge.bodies) == 4


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Rating: [[5]]", 5.0),
        ("[[7.5]] then [[2]]", 7.5),
        ("Rating: [8]", 8.0),
        ("`nums[1]` is off by one, I cannot rate this", None),
        ("[[0]]", None),
        ("", None),
    ],
)
def test_ratings_are_read_as_fastchat_does(text: str, rating: float | None) -> None:
    assert find_rating(text) == rating


@pytest.mark.parametrize(
    ("file", "row", "message"),
    [
        (QUESTIONS, {"question_id": 1, "category": "x", "turns": ["one"]}, "row 3: field 'turns'"),
        (QUESTIONS, {"question_id": 1, "turns": ["a", "b"]}, "row 3: has fields .* expected 'category'"),
        (QUESTIONS, {"question_id": 1, "category": "math", "turns": ["a", "b"]}, "no answer to question 1"),
        (REFERENCES[0], {"question_id": 1, "choices": []}, r"row 2, choices\[0\]: field 'turns'"),
        (
            "judge_prompts.jsonl",
            {"name": "single-v1", "system_prompt": "", "prompt_template": "{secret}"},
            "row 5: prompt_template names an unknown field",
        ),
    ],
)
def test_rows_that_do_not_fit_are_named(file: str, row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with (fastchat(tmp_path) / file).open("a") as more:
        more.write(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=message):
        TASKS["mtbench"].read(EvaluationRequest("m", "mtbench", data=str(tmp_path)))


def test_a_missing_file_or_prompt_is_named(tmp_path: Path) -> None:
    folder = fastchat(tmp_path)
    write_rows(folder / "judge_prompts.jsonl", [])
    with pytest.raises(DataError, match="judge_prompts"):
        TASKS["mtbench"].read(EvaluationRequest("m", "mtbench", data=str(folder)))
    shutil.rmtree(folder / "reference_answer")
    fastchat(tmp_path)
    (folder / QUESTIONS).unlink()
    with pytest.raises(DataError, match=re.escape(QUESTIONS)):
        TASKS["mtbench"].read(EvaluationRequest("m", "mtbench", data=str(folder)))


def test_the_real_files_are_read() -> None:
    real_data("mt_bench/question.jsonl")
    found = TASKS["mtbench"].read(EvaluationRequest("m", "mtbench", data=str(data_folder() / "mt_bench")))
    assert len(found.rows) == 80
    assert sum(row["references"] is not None for row in found.rows) == 30
    assert found.rows[0]["prompts"][1]["name"] == "single-v1-multi-turn"
