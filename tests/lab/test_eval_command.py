"""`loraover eval`: several adapters side by side, and work that is kept."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import loraover_lab
from loraover.cli import cli
from loraover.common.command_line import run
from loraover.common.errors import ConfigError
from loraover_lab.evaluation import subjects
from loraover_lab.evaluation.base import Example
from loraover_lab.evaluation.request import EvaluationRequest
from loraover_lab.evaluation.results import Evaluation, ModelResult, results_table, wilson_interval

from support.bubblewrap import needs_bubblewrap
from support.machine import with_hub
from support.openai_server import openai_server
from support.tiny_hub import save_llama
from support.tiny_models import tiny_llama, with_lora

pytestmark = pytest.mark.process

pytest.importorskip("lm_eval", reason="the extra eval is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With `base`, adapters `a` and `b` on it, `other` of another size, and questions."""
    made = tmp_path_factory.mktemp("eval")
    save_llama(made / "base")
    for seed, name in enumerate("ab"):
        model = AutoModelForCausalLM.from_pretrained(made / "base")
        with_lora(model, task_type="CAUSAL_LM", seed=seed).save_pretrained(made / name)
    with_lora(tiny_llama(hidden_size=16), task_type="CAUSAL_LM").save_pretrained(made / "other")
    questions = [{"question": f"{i} plus 1?", "answer": f"#### {i + 1}"} for i in range(3)]
    (made / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    return made


def words(folder: Path, out: Path, *more: str) -> list[str]:
    made = ["eval", str(folder / "base"), "--task", "gsm8k", "--data", str(folder / "questions.jsonl"), "-o", str(out)]
    return [*made, "--new-tokens", "4", *more]


def names(out: Path) -> list[str]:
    return [Path(result["name"]).name for result in json.loads(out.read_text())["results"]]


def test_the_base_model_comes_first_and_adapters_are_compared_with_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    adapters = ["--adapter", str(folder / "a"), "--adapter", str(folder / "b")]
    assert run(cli, words(folder, out, *adapters, "--json")) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) == json.loads(out.read_text())
    found = json.loads(shown.out)
    assert names(out) == ["base", "a", "b"]
    assert (found["questions"], found["data_origin"]) == (3, "file questions.jsonl")
    assert found["settings"]["prompt"] == "plain text"
    assert {"torch", "peft", "lm-eval", "loraover"} <= found["versions"].keys()
    assert [result["sha256"] is None for result in found["results"]] == [True, False, False]
    assert "gained" in shown.err


@pytest.fixture
def chatting(folder: Path, tmp_path: Path) -> Path:
    """The adapter `a` with a chat template, which its base model lacks."""
    adapter = shutil.copytree(folder / "a", tmp_path / "chatting")
    (adapter / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    return adapter


def test_an_adapter_is_asked_in_its_own_chat_template(
    folder: Path, chatting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def answer(model: Any, requests: Any, **named: Any) -> Any:
        asked.extend(request.args[0] for request in requests)
        return original(model, requests, **named)

    from loraover_lab.evaluation import harness_models  # which imports lm_eval

    original = harness_models.HarnessModel.generate_until
    monkeypatch.setattr(harness_models.HarnessModel, "generate_until", answer)
    adapters = ["--adapter", str(chatting), "--adapter", str(folder / "b")]
    for wanted, more in ((True, ()), (False, ("--no-apply-chat-template",))):
        out = tmp_path / f"{wanted}.json"
        asked.clear()
        assert run(cli, words(folder, out, *adapters, *more)) == 0
        shown, settings = capsys.readouterr(), json.loads(out.read_text())["settings"]
        assert ["<user>" in text for text in asked] == [*3 * [False], *3 * [wanted], *3 * [False]]
        assert ("its own chat template" in shown.out + shown.err) is wanted
        assert ("chat template of adapters" in settings) is wanted


def test_a_chat_template_that_cannot_be_read_is_told_first(
    folder: Path, chatting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (chatting / "chat_template.jinja").write_bytes(b"\xff")
    assert run(cli, words(folder, tmp_path / "out.json", "--adapter", str(chatting))) == 2
    assert "chat_template.jinja cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


def test_an_adapter_that_does_not_fit_is_a_failure_and_the_next_one_is_asked(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    adapters = ["--adapter", str(folder / "other"), "--adapter", str(folder / "b")]
    assert run(cli, words(folder, out, *adapters)) == 1
    assert names(out) == ["base", "other", "b"]
    base, other, last = json.loads(out.read_text())["results"]
    assert "PEFT cannot put it on this model" in other["failure"]
    assert (other["measures"], other["examples"]) == ({}, [])
    assert base["failure"] is None
    assert last["failure"] is None


def test_what_cannot_be_used_is_told_before_anything_is_asked(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    for more, message in (
        (["--adapter", str(tmp_path / "none")], "none"),
        (["--adapter", str(folder / "base")], "adapter_config.json"),
        (["--endpoint-model", "m", "--endpoint", "ftp://x"], "not the address of a server"),
        (["--endpoint-model", "m"], "--endpoint-model needs --endpoint, which is missing"),
        (["--apply-chat-template"], "no chat template"),
        (["--judge-url", "http://localhost:1", "--judge-model", "m"], "--judge-url is for --task mtbench"),
        (["--endpoint", "http://localhost:1", "--endpoint-model", "m", "--dtype", "bf16"], "--dtype: only for models"),
        (["--task", "qnli"], "--new-tokens: qnli compares the likelihoods"),
        (["--task", "humaneval", "--apply-chat-template"], "prompts of humaneval are always plain text"),
        (["--task", "humaneval"], "--allow-code-execution"),
        (["--task", "mtbench"], "needs --data FOLDER with question.jsonl, judge_prompts.jsonl"),
        (["--task", "mtbench"], "github.com/lm-sys/FastChat"),
    ):
        assert run(cli, words(folder, out, *more)) == 2, more
        assert message in capsys.readouterr().err
    assert not out.exists()


def test_an_output_that_cannot_be_written_is_told_before_anything_is_asked(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(cli, words(folder, tmp_path / "missing" / "out.json")) == 2
    shown = capsys.readouterr()
    assert "cannot write" in shown.err
    assert "base" not in shown.out
    assert list(tmp_path.iterdir()) == []


def test_what_was_finished_before_ctrl_c_is_kept_and_gone_on_from(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, load = tmp_path / "out.json", subjects.in_memory
    command = words(folder, out, *(word for name in "ab" for word in ("--adapter", str(folder / name))))

    def interrupted(source: Any, tokenizer: Any, adapter: Path | None, **options: Any) -> Any:
        if adapter is not None:
            raise KeyboardInterrupt
        return load(source, tokenizer, adapter, **options)

    with monkeypatch.context() as patch:
        patch.setattr("loraover_lab.evaluation.run.in_memory", interrupted)
        assert run(cli, command) == 130
    assert "exact_match" in capsys.readouterr().out
    assert names(out) == ["base"]
    begun = json.loads(out.read_text())["results"]
    assert run(cli, command) == 0
    assert names(out) == ["base", "a", "b"]
    assert json.loads(out.read_text())["results"][0] == begun[0]


def test_what_is_not_asked_for_stays(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    a, b = (["--adapter", str(folder / name)] for name in "ab")
    assert run(cli, words(folder, out, *a)) == 0
    assert run(cli, words(folder, out, *b)) == 0
    assert sorted(names(out)) == ["a", "b", "base"]
    before = json.loads(out.read_text())
    assert run(cli, words(folder, out, *a, *b)) == 0
    assert json.loads(out.read_text())["results"] == before["results"]


def test_answers_without_scores_are_of_no_such_task(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    assert run(cli, words(folder, out)) == 0
    found = json.loads(out.read_text())
    found["results"][0] |= {"failure": "no", "measures": {}}
    out.write_text(json.dumps(found))
    capsys.readouterr()
    assert run(cli, words(folder, out)) == 2
    assert "answers without scores" in capsys.readouterr().err
    assert json.loads(out.read_text()) == found


def test_a_device_is_no_file_of_results(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cli, words(folder, Path("/dev/full"))) == 2
    assert capsys.readouterr().err.count("error: ") == 1


def test_only_what_is_the_same_is_kept(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, adapter = tmp_path / "out.json", tmp_path / "adapter"
    shutil.copytree(folder / "a", adapter)
    assert run(cli, words(folder, out, "--adapter", str(adapter))) == 0
    before = json.loads(out.read_text())["results"]
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(folder / "b" / name, adapter / name)
    assert run(cli, words(folder, out, "--adapter", str(adapter))) == 0
    after = json.loads(out.read_text())["results"]
    assert before[0] == after[0]
    assert before[1]["sha256"] != after[1]["sha256"]
    capsys.readouterr()
    assert run(cli, words(folder, out, "--limit", "2")) == 2
    assert "holds another evaluation (data_sha256, questions differ)" in capsys.readouterr().err
    assert json.loads(out.read_text())["results"] == after


def test_models_at_an_endpoint_are_gone_on_with_too(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, ill = tmp_path / "out.json", ["n"]
    with openai_server(lambda body: 400 if body["model"] in ill else " 1") as server:
        more = ["--endpoint", server.url, "--endpoint-model", "m", "--endpoint-model", "n"]
        assert run(cli, words(folder, out, *more)) == 1
        assert names(out) == ["m", "n"]
        asked = len(server.bodies)
        ill.clear()
        assert run(cli, words(folder, out, *more)) == 0
        assert {body["model"] for body in server.bodies[asked:]} == {"n"}
        before = out.read_text()
        assert run(cli, words(folder, out, *more, "--new-tokens", "5")) == 2
    assert "holds another evaluation (settings differ)" in capsys.readouterr().err
    assert out.read_text() == before


def test_results_of_another_base_model_in_the_same_folder_are_not_mixed_in(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, out = tmp_path / "base", tmp_path / "out.json"
    command = ["eval", str(save_llama(base)), *words(folder, out)[2:]]
    assert run(cli, command) == 0
    save_llama(base, seed=1)
    capsys.readouterr()
    assert run(cli, command) == 2
    assert "holds another evaluation (model_digest differ)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("gsm8k", "openai/gsm8k"),
        ("qnli", "nyu-mll/glue"),
        pytest.param("humaneval", "openai/openai_humaneval", marks=needs_bubblewrap),
    ],
)
def test_a_task_without_its_data_says_what_to_download_and_where_to_put_it(
    task: str,
    name: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with_hub(monkeypatch, HF_HUB_CACHE=str(tmp_path), HF_HUB_OFFLINE=True)
    assert run(cli, ["eval", str(folder / "base"), "--task", task, "--allow-code-execution"]) == 2
    said = capsys.readouterr().err
    assert f"hf download {name} --repo-type dataset" in said
    assert "one JSON object a line, with --data" in said


@pytest.mark.parametrize(
    ("right", "total", "low", "high"), [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (50, 50, 0.9287, 1.0)]
)
def test_the_interval_is_wilsons(right: int, total: int, low: float, high: float) -> None:
    assert wilson_interval(right, total) == pytest.approx((low, high), abs=1e-4)


def result(name: str, scores: list[float | None]) -> ModelResult:
    examples = [Example(str(i), score, "") for i, score in enumerate(scores)]
    return ModelResult(name=name, measures={"acc": 0.5}, interval=(0.1, 0.9), examples=examples)


def test_changes_against_the_base_model_are_counted(evaluation: dict[str, Any]) -> None:
    models = [result("base", [1, 0, 0, 1]), result("a", [0, 1, 1, 1]), ModelResult(name="b", failure="no")]
    table = results_table(Evaluation(**evaluation, results=models))
    rows = [[column.cell(row) for column in table.columns] for row in table.rows]
    assert [column.head for column in table.columns] == ["model", "acc", "right, 95 %", "gained", "lost"]
    assert rows[0] == ["base", "50.0%", "10.0% to 90.0%", "-", "-"]
    assert rows[1][3:] == ["2", "1"]
    assert rows[2] == ["b", "-", "-", "-", "-"]


@pytest.fixture
def evaluation() -> dict[str, Any]:
    return {
        "task": "gsm8k",
        "model": "m",
        "model_origin": "folder m",
        "data_origin": "file",
        "data_sha256": "",
        "questions": 4,
        "is_right_or_wrong": True,
        "settings": {},
        "versions": {},
        "hardware": "",
        "command": "",
    }


def test_the_function_prints_nothing_and_returns_what_is_written(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    seen: list[int] = []
    capfd.readouterr()
    found = loraover_lab.evaluate(
        folder / "base",
        "gsm8k",
        adapters=[folder / "a", folder / "other"],
        data=folder / "questions.jsonl",
        new_tokens=4,
        dtype="float32",
        output=out,
        on_result=lambda evaluation: seen.append(len(evaluation.results)),
    )
    assert capfd.readouterr() == ("", "")
    assert found == Evaluation.model_validate_json(out.read_text())
    assert found.model_digest is not None
    assert seen == [1, 2, 3]
    assert found.results[2].failure is not None
    adapters = ["--adapter", str(folder / "a"), "--adapter", str(folder / "other")]
    words = ["loraover", "eval", str(folder / "base"), "--task", "gsm8k", *adapters]
    words += ["--data", str(folder / "questions.jsonl")]
    assert found.command == shlex.join([*words, "--new-tokens", "4", "-o", str(out)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "gsm9k"}, "expected one of gsm8k"),
        ({"limit": 0}, "limit is 0, expected 1 or more"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"judge_model": "m"}, "judge_model needs judge_url, which is missing"),
        ({"endpoint": "http://localhost:1"}, "endpoint needs endpoint_models"),
        ({"key_variable": "KEY"}, "key_variable needs endpoint"),
        ({"judge_key_variable": "KEY"}, "judge_key_variable needs judge_url"),
    ],
)
def test_a_request_is_checked_where_it_is_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EvaluationRequest(**{"model": "m", "task": "gsm8k", **options})
