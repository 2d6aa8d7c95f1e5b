"""Benchmarks of lm-evaluation-harness on a tiny model and on answers that are known."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from loraover.cli import cli
from loraover.common.command_line import run
from loraover.common.errors import DataError
from loraover.training.run.answers import greedy_answers
from loraover_lab.evaluation import TASKS
from loraover_lab.evaluation.base import Questions
from loraover_lab.evaluation.harness import HarnessTask, number_matches
from loraover_lab.evaluation.request import EvaluationRequest

from support.openai_server import openai_server
from support.tiny_hub import save_llama, save_t5
from support.tiny_models import with_lora

pytestmark = pytest.mark.process

pytest.importorskip("lm_eval", reason="the extra eval is not installed")

SUMS = [
    {"question": f"what is {i} plus {i}?", "answer": f"it is <<{i}+{i}={2 * i}>>{2 * i}\n#### {2 * i}"}
    for i in range(3)
]
PAIRS = [
    {"sentence1": "who came?", "sentence2": "ada came.", "label": "entailment"},
    {"sentence1": "who left?", "sentence2": "it rained.", "label": "not_entailment"},
    {"sentence1": "where?", "sentence2": "in oslo.", "label": "entailment"},
]


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny chat model and an adapter on it that changes its answers."""
    folder = tmp_path_factory.mktemp("models")
    base = save_llama(folder / "base", chat=True)
    model = AutoModelForCausalLM.from_pretrained(base)
    with_lora(model, task_type="CAUSAL_LM", lora_alpha=64).save_pretrained(folder / "adapter")
    return base, folder / "adapter"


def results(words: list[str], out: Path) -> list[dict[str, Any]]:
    assert run(cli, ["eval", *words, "-o", str(out)]) == 0
    found: list[dict[str, Any]] = json.loads(out.read_text())["results"]
    return found


@pytest.mark.parametrize("is_chat", [True, False])
def test_gsm8k_is_what_the_model_generates(models: tuple[Path, Path], is_chat: bool, tmp_path: Path) -> None:
    base, adapter = models
    data = written(tmp_path / "sums.jsonl", SUMS)
    words = [str(base), "--adapter", str(adapter), "--task", "gsm8k", "--data", data, "--new-tokens", "12"]
    found = results([*words, "--apply-chat-template" if is_chat else "--no-apply-chat-template"], tmp_path / "out.json")
    texts = [f"Question: {row['question']}\nAnswer:" for row in SUMS]
    prompts: Any = [[{"role": "user", "content": text}] for text in texts] if is_chat else texts
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    expected = [greedy_answers(model, tokenizer, prompts, max_new_tokens=12, batch_size=1)]
    adapted = PeftModel.from_pretrained(model, str(adapter))
    expected.append(greedy_answers(adapted, tokenizer, prompts, max_new_tokens=12, batch_size=1))
    assert expected[0] != expected[1]
    assert [[example["answer"] for example in result["examples"]] for result in found] == expected
    assert [example["expected"] for example in found[0]["examples"]] == ["0", "2", "4"]
    assert [result["name"] for result in found] == ["base", str(adapter)]


def test_the_harness_answers_are_greedy_whatever_the_models_folder_sets(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = models
    data = written(tmp_path / "sums.jsonl", SUMS)
    shutil.copytree(base, tmp_path / "base")
    settings = GenerationConfig.from_pretrained(base)
    settings.update(repetition_penalty=9.0, num_beams=3, suppress_tokens=list(range(20, 60)))
    settings.save_pretrained(tmp_path / "base")
    words = ["--adapter", str(adapter), "--task", "gsm8k", "--data", data, "--new-tokens", "12"]
    plain, changed = (results([str(f), *words], f.parent / "sums.json") for f in (base, tmp_path / "base"))
    for one, other in zip(plain, changed, strict=True):
        assert one["examples"] == other["examples"]


@pytest.mark.parametrize(
    ("answer", "is_right"), [("#### 1,234.50", True), ("so it costs $1234.5 each", True), ("#### -1234.5", False)]
)
def test_numbers_are_compared_as_numbers(answer: str, is_right: bool) -> None:
    assert number_matches({"answer": "#### 1234.5"}, [answer]) == {"exact_match": float(is_right)}


def test_a_right_answer_behind_an_endpoint_counts(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-sesame")
    data = written(tmp_path / "sums.jsonl", SUMS)
    with openai_server(lambda body: " #### 2" if body["model"] == "one" else " none") as server:
        words = [str(models[0]), "--task", "gsm8k", "--data", data, "--endpoint", server.url]
        found = results([*words, "--endpoint-model", "one", "--endpoint-model", "two"], tmp_path / "out.json")
    assert [[example["score"] for example in result["examples"]] for result in found] == [[0, 1, 0], [0, 0, 0]]
    assert found[0]["measures"] == {"exact_match": pytest.approx(1 / 3)}
    assert {body["path"] for body in server.bodies} == {"/v1/completions"}
    assert not any("Authorization" in headers for headers in server.headers)
    asked = AutoTokenizer.from_pretrained(models[0]).batch_decode([body["prompt"][0] for body in server.bodies[:3]])
    expected = [f"<user>question: {row['question']}\nanswer:<assistant>" for row in SUMS]
    assert sorted(text.replace(" ", "") for text in asked) == sorted(text.replace(" ", "") for text in expected)


@pytest.mark.parametrize(
    ("content", "task", "message"),
    [
        (b"<html>", "gsm8k", "the answer is not JSON"),
        (b"[]", "qnli", "the server's answer cannot be read"),
        (" yes", "qnli", "the server's answer cannot be read"),
    ],
    ids=["no JSON", "no object", "no logprobs"],
)
def test_an_answer_that_cannot_be_read_is_the_endpoints_fault(
    content: str | bytes,
    task: str,
    message: str,
    models: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = written(tmp_path / "rows.jsonl", {"qnli": PAIRS, "gsm8k": SUMS}[task])
    with openai_server(lambda body: content) as server:
        words = [str(models[0]), "--task", task, "--data", data, "--endpoint", server.url, "--endpoint-model", "one"]
        assert run(cli, ["eval", *words, "--batch-size", "2"]) == 2
    assert message in capsys.readouterr().err


def test_labels_behind_an_endpoint_are_judged_by_their_own_tokens(models: tuple[Path, Path], tmp_path: Path) -> None:
    """Each token's logprob is minus its id; the first has none, and that of the generated one says the opposite."""
    data = written(tmp_path / "rows.jsonl", PAIRS)
    tokenizer = AutoTokenizer.from_pretrained(models[0])

    def reply(body: dict[str, Any]) -> bytes:
        told = [None, *(-float(token) for token in body["prompt"][0][1:]), 2.0 * sum(body["prompt"][0])]
        top = [None, *({"": one} for one in told[1:])]
        return json.dumps({"choices": [{"logprobs": {"token_logprobs": told, "top_logprobs": top}}]}).encode()

    with openai_server(reply) as server:
        words = [str(models[0]), "--task", "qnli", "--data", data, "--endpoint", server.url, "--endpoint-model", "one"]
        (found,) = results(words, tmp_path / "out.json")
    yes, no = (sum(tokenizer(f" {word}", add_special_tokens=False).input_ids) for word in ("yes", "no"))
    assert {example["answer"] for example in found["examples"]} == {"entailment" if yes < no else "not_entailment"}
    assert {body["max_tokens"] for body in server.bodies} == {1}


def test_a_key_that_is_refused_is_shown_nowhere(models: tuple[Path, Path], tmp_path: Path) -> None:
    """In a process of its own: asyncio says at its end what nobody has waited for."""
    data, out = written(tmp_path / "sums.jsonl", SUMS), tmp_path / "out.json"
    with openai_server(lambda body: 401 if body["model"] == "two" else " yes") as server:
        words = ["eval", str(models[0]), "--task", "gsm8k", "--data", data, "--endpoint", server.url, "-o", str(out)]
        words += ["--key-variable", "MY_KEY", "--endpoint-model", "one", "--endpoint-model", "two"]
        done = subprocess.run(
            [sys.executable, "-m", "loraover.cli", *words, "--batch-size", "8", "--new-tokens", "2"],
            env=os.environ | {"MY_KEY": "sk-sesame"},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 1, done.stderr
    assert server.headers[-1]["Authorization"] == "Bearer sk-sesame"
    assert "sesame" not in done.stdout + done.stderr + out.read_text()


QNLI = "Question: Does this response answer the question?\nAnswer:"
PROMPTS: dict[str, tuple[dict[str, Any], str, list[str], list[str]]] = {
    "gsm8k": (
        {"question": "what is {{x}}? ", "answer": "#### 4"},
        "Question: what is {{x}}? \nAnswer:",
        [],
        ["exact_match"],
    ),
    "qnli": (
        {"question": "who?", "sentence": "ada.", "label": 0},
        f"who?\nada.\n{QNLI}",
        ["yes", "no"],
        ["acc"],
    ),
    "mnli": (
        {"premise": "it rains", "hypothesis": " it is wet ", "label": 0},
        "it rains\nQuestion: it is wet. True, False or Neither?\nAnswer:",
        ["True", "Neither", "False"],
        ["acc"],
    ),
    "sst2": (
        {"sentence": "good", "label": 1},
        "good\nQuestion: Is this sentence positive or negative?\nAnswer:",
        ["negative", "positive"],
        ["acc"],
    ),
    "cola": (
        {"sentence": "who is", "label": 0},
        "who is\nQuestion: Does this sentence make sense?\nAnswer:",
        ["no", "yes"],
        ["mcc"],
    ),
    "mrpc": (
        {"sentence1": "a", "sentence2": "b", "label": 0},
        "Sentence 1: a\nSentence 2: b\nQuestion: Do both sentences mean the same thing?\nAnswer:",
        ["no", "yes"],
        ["acc", "f1"],
    ),
}


@pytest.mark.parametrize("task", PROMPTS)
def test_the_harness_puts_our_rows_into_its_own_prompts(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without examples before them, and without its data sets."""
    import datasets

    monkeypatch.delattr(datasets, "load_dataset")
    row, prompt, choices, metrics = PROMPTS[task]
    ours = TASKS[task]
    assert isinstance(ours, HarnessTask)
    theirs = ours.harness_task(Questions([row], "here"))
    (question,) = theirs.eval_docs
    assert question == row
    assert theirs.fewshot_context(question, num_fewshot=theirs.config.num_fewshot) == prompt
    assert (theirs.doc_to_choice(question) if choices else []) == choices
    assert [metric["metric"] for metric in theirs.config.metric_list] == metrics
    assert (theirs.config.process_results is number_matches) == (not choices)


def test_a_choice_is_the_likelier_answer(models: tuple[Path, Path], tmp_path: Path) -> None:
    """Held to log-likelihoods that plain PyTorch computes."""
    import torch

    base, _ = models
    data = written(tmp_path / "pairs.jsonl", PAIRS)
    (found,) = results([str(base), "--task", "qnli", "--data", data, "--no-apply-chat-template"], tmp_path / "out.json")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)

    def likelihood(text: str, answer: str) -> float:
        ids = tokenizer(text + answer, return_tensors="pt").input_ids
        start = len(tokenizer(text).input_ids)
        with torch.no_grad():
            scores = model(ids).logits[0].log_softmax(-1)
        return float(sum(scores[i - 1, ids[0, i]] for i in range(start, ids.shape[1])))

    for row, example in zip(PAIRS, found["examples"], strict=True):
        text = f"{row['sentence1']}\n{row['sentence2']}\n{QNLI}"
        is_yes = likelihood(text, " yes") > likelihood(text, " no")
        assert example["answer"] == ("entailment" if is_yes else "not_entailment")
        assert example["score"] == float(example["answer"] == row["label"])
    assert found["measures"]["acc"] == sum(example["score"] for example in found["examples"]) / 3


@pytest.mark.parametrize("task", ["qnli", "gsm8k"])
def test_a_model_with_nan_has_no_figure(
    models: tuple[Path, Path], task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, _ = models
    model = AutoModelForCausalLM.from_pretrained(base)
    model.lm_head.weight.data.fill_(float("nan"))
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "base")
    data = written(tmp_path / "rows.jsonl", {"qnli": PAIRS, "gsm8k": SUMS}[task])
    few = ["--new-tokens", "2"] if task == "gsm8k" else []
    assert run(cli, ["eval", str(tmp_path / "base"), "--task", task, "--data", data, *few]) == 2
    message = {"qnli": "question 1: the log-likelihoods of its answers are [nan, nan]", "gsm8k": "hold NaN"}[task]
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "rows", "answer", "room"), [("gsm8k", SUMS, "", 256 - 12), ("qnli", PAIRS, " yes", 256 + 1)]
)
def test_a_question_beyond_the_models_context_is_named(
    task: str,
    rows: list[dict[str, Any]],
    answer: str,
    room: int,
    models: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Up to the token; the last one of a choice is scored, not read."""
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    rest = {"gsm8k": "Question: a\nAnswer:", "qnli": f"a\n{PAIRS[1]['sentence2']}\n{QNLI}"}[task] + answer
    fits = room - len(tokenizer(rest).input_ids) + 1
    for length, code in ((fits, 0), (fits + 1, 2)):
        data = written(tmp_path / "rows.jsonl", [rows[0], rows[1] | {next(iter(rows[1])): "a" * length}])
        words = [
            "eval",
            str(models[0]),
            "--task",
            task,
            "--data",
            data,
            "--no-apply-chat-template",
            *(["--new-tokens", "12"] if task == "gsm8k" else []),
        ]
        assert run(cli, words) == code
    assert "question 2: it needs 257 tokens with its answer, but the model's context has 256" in capsys.readouterr().err


def test_a_long_question_reaches_an_endpoint_whole(models: tuple[Path, Path], tmp_path: Path) -> None:
    """The harness would cut it to what it takes for the context."""
    data = written(tmp_path / "sums.jsonl", [SUMS[0] | {"question": "a" * 3000}])
    with openai_server(lambda body: " #### 0") as server:
        words = [str(models[0]), "--task", "gsm8k", "--data", data, "--endpoint", server.url, "--endpoint-model", "one"]
        results(words, tmp_path / "out.json")
    assert len(server.bodies[0]["prompt"][0]) > 3000


@pytest.mark.parametrize("task", ["cola", "mrpc"])
def test_every_glue_task_runs_on_the_hubs_columns(models: tuple[Path, Path], task: str, tmp_path: Path) -> None:
    row = PROMPTS[task][0]
    data = written(tmp_path / "rows.jsonl", [row, row | {"label": 1}])
    (found,) = results([str(models[0]), "--task", task, "--data", data], tmp_path / "out.json")
    assert len(found["examples"]) == 2
    assert found["measures"].keys() == {"cola": {"mcc"}, "mrpc": {"acc", "f1"}}.get(task, {"acc"})


def test_an_encoder_decoder_is_asked_too(tmp_path: Path) -> None:
    base = save_t5(tmp_path / "t5")
    data = written(tmp_path / "pairs.jsonl", PAIRS)
    (found,) = results([str(base), "--task", "qnli", "--data", data], tmp_path / "out.json")
    assert len(found["examples"]) == 3


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("gsm8k", {"question": "x"}, r"row 2: has fields \['question'\]; expected 'answer'"),
        ("gsm8k", {"question": "x", "answer": "none"}, "row 2: field 'answer' .* holds no number"),
        ("gsm8k", {"question": " ", "answer": "4"}, "row 2: field 'question' is empty"),
        ("qnli", {"sentence1": "x", "label": "entailment"}, "row 2: .* expected 'sentence' or 'sentence2'"),
        ("qnli", {"sentence1": "x", "sentence2": "y", "label": -1}, "row 2: .*test splits have no labels"),
    ],
)
def test_rows_that_do_not_fit_are_named(task: str, row: Any, message: str, tmp_path: Path) -> None:
    data = written(tmp_path / "rows.jsonl", [SUMS[0] if task == "gsm8k" else PAIRS[0], row])
    with pytest.raises(DataError, match=message):
        TASKS[task].read(EvaluationRequest("m", task, data=data))
    assert len(TASKS[task].read(EvaluationRequest("m", task, data=data, limit=1)).rows) == 1


def test_no_file_and_no_rows_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        TASKS["gsm8k"].read(EvaluationRequest("m", "gsm8k", data=str(tmp_path / "none.jsonl")))
    with pytest.raises(DataError, match="holds no questions"):
        TASKS["gsm8k"].read(EvaluationRequest("m", "gsm8k", data=written(tmp_path / "none.jsonl", [])))
