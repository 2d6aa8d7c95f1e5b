"""The checker of the standard library asks servers: it judges each planted fault as verify does, and starts fast."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from serve.test_verify_endpoint import Mixing

from loraover.client.at_once import COMPANION_TOKENS
from loraover.client.endpoint import Endpoint
from loraover.common.errors import EngineError
from loraover_serve import verify_adapter
from loraover_serve.judge.asker import Asker
from loraover_serve.judge.command import CheckOptions, check, main
from loraover_serve.judge.names import CHANGED, CHANGED_BY_OTHER, LEAKS
from loraover_serve.judge.reference import Reference, read_reference
from loraover_serve.verify.checker import write_checker

from support.openai_server import openai_server
from support.planted_faults import FAULTS as PLANTED
from support.planted_faults import Ask, Fault, reply, right_models, save_sharp_base
from support.recorded import record
from support.reference_server import RIGHT, FromReference
from support.verified import FAULTS, Served, make_case, plant, save_adapter
from support.verified import Case as VerifyCase

NAMES = ("base", "shop")


def checked(reply: Any, reference: Reference, models: Any = NAMES, **more: Any) -> dict[str, Any]:
    """The checker's result on a server that answers like this."""
    with openai_server(reply, models) as server:
        return check(Asker.of(reference, Endpoint(server.url), "shop"), CheckOptions(**more))


@pytest.fixture(scope="module")
def sharp(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Reference]:
    """A base model whose attention depends on positions, an adapter, and its reference."""
    folder = tmp_path_factory.mktemp("sharp")
    base = save_sharp_base(folder / "base")
    adapter = save_adapter(folder / "adapter", base)
    return base, adapter, read_reference(record(base, adapter, folder))


@pytest.fixture(scope="module")
def serve(sharp: tuple[Path, Path, Reference], tmp_path_factory: pytest.TempPathFactory) -> Callable[[Fault], Ask]:
    base, adapter, _ = sharp
    return right_models(make_case(base, adapter), tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("name", PLANTED)
def test_each_fault_of_a_server_has_verifys_verdict(
    name: str, sharp: tuple[Path, Path, Reference], serve: Callable[[Fault], Ask]
) -> None:
    """`test_verify_faults.py` expects the same of verify. One answer to each question shows all faults but one."""
    fault = PLANTED[name]
    repeats = 3 if name == "intermittent" else 1
    found = checked(reply(fault.wrong(serve(fault))), sharp[2], fault.listed, repeats=repeats)
    assert (found["verdict"], found["fault"]) == (fault.verdict, fault.name), found["reason"]


@pytest.mark.parametrize(
    ("victim", "company", "fault"),
    [("base", "shop", LEAKS), ("shop", "base", CHANGED), ("shop", "other", CHANGED_BY_OTHER)],
)
def test_answers_that_change_in_a_mixed_batch_are_named(
    victim: str, company: str, fault: str, asked: VerifyCase, reference: Reference, tmp_path: Path
) -> None:
    other = plant(FAULTS["scaling dropped"], asked.adapter, tmp_path / "other")
    served = Served(asked.base, {"base": None, "shop": asked.adapter, "other": other})
    listed = {"base": None, "shop": "base", "other": "base"}
    found = checked(Mixing(served, victim, company), reference, listed)
    assert (found["verdict"], found["fault"]) == ("differs", fault), found["reason"]
    assert found["reason"].endswith("send requests for one model at a time, and judge only these with --without-mixed")
    alone = checked(Mixing(served, victim, company), reference, listed, without_mixed=True)
    asked_for = "the option --without-mixed leaves them out"
    assert (alone["verdict"], alone["mixed_failure"]) == ("as trained", asked_for), alone["reason"]


def translated(protocol: str, served: Served) -> Callable[[dict[str, Any]], int | bytes]:
    """A server that speaks a protocol of its own, played by one that speaks OpenAI's."""

    def answer(body: dict[str, Any]) -> int | bytes:
        if "model" in body and protocol != "texts":
            return 404
        if protocol == "sglang":
            asked = (body["input_ids"], body["sampling_params"]["max_new_tokens"], body.get("lora_path"))
        elif protocol == "tgi":
            parameters = body["parameters"]
            asked = (body["inputs"], parameters["max_new_tokens"], parameters.get("adapter_id"))
        elif protocol == "llama-server":
            asked = (body["prompt"], body["n_predict"], "shop" if body["lora"][0]["scale"] else None)
        elif isinstance(body.get("prompt"), str):
            asked = (body["prompt"], body["max_tokens"], body["model"] if body["model"] == "shop" else None)
        else:
            return 400
        prompt, tokens, adapter = asked
        top = 20 if protocol != "tgi" else 5
        found = served.answer({"model": adapter or "base", "prompt": prompt, "max_tokens": tokens, "logprobs": top})
        if protocol == "texts":
            return json.dumps(found).encode()
        places = [
            [(int(name.removeprefix("token_id:")), value) for name, value in place.items()]
            for place in found["choices"][0]["logprobs"]["top_logprobs"]
        ]
        return json.dumps(FORMS[protocol](places)).encode()

    return answer


Places = list[list[tuple[int, float]]]
FORMS: dict[str, Callable[[Places], dict[str, Any]]] = {
    "sglang": lambda places: {
        "meta_info": {
            "output_token_logprobs": [[place[0][1], place[0][0], None] for place in places],
            "output_top_logprobs": [[[value, i, None] for i, value in place] for place in places],
        }
    },
    "tgi": lambda places: {
        "details": {
            "tokens": [{"id": place[0][0], "logprob": place[0][1]} for place in places],
            "top_tokens": [[{"id": i, "logprob": value} for i, value in place] for place in places],
        }
    },
    "llama-server": lambda places: {
        "completion_probabilities": [
            {"id": place[0][0], "top_logprobs": [{"id": i, "logprob": value} for i, value in place]} for place in places
        ]
    },
}


@pytest.mark.parametrize("protocol", ["sglang", "tgi", "llama-server", "texts"])
@pytest.mark.parametrize("is_right", [True, False])
def test_a_server_is_judged_in_its_own_protocol(
    protocol: str, is_right: bool, asked: VerifyCase, reference: Reference, tmp_path: Path
) -> None:
    adapter = asked.adapter if is_right else plant(FAULTS["rsLoRA ignored"], asked.adapter, tmp_path / "wrong")
    form = "texts" if protocol == "texts" else "ids"
    with openai_server(translated(protocol, Served(asked.base, {"base": None, "shop": adapter}, form))) as server:
        named, spoken = "0" if protocol == "llama-server" else "shop", None if protocol == "texts" else protocol
        found = check(Asker.of(reference, Endpoint(server.url), named, "base", spoken), CheckOptions(repeats=1))
    expected = ("as trained", None) if is_right else ("differs", FAULTS["rsLoRA ignored"].fault)
    assert (found["verdict"], found["fault"]) == expected, found["reason"]


@pytest.mark.parametrize("fault", [None, "not loaded", "rsLoRA ignored"])
def test_a_server_that_lists_one_logprob_is_asked_for_one(
    fault: str | None, asked: VerifyCase, reference: Reference, tmp_path: Path
) -> None:
    """As vLLM with --max-logprobs 1. Where the models' likeliest tokens differ, the recorded base model is compared."""
    adapter = asked.adapter if fault is None else plant(FAULTS[fault], asked.adapter, tmp_path / "wrong")
    served = Served(asked.base, {"base": None, "shop": adapter})
    with openai_server(lambda body: 400 if body["logprobs"] > 1 else served(body), NAMES) as server:
        found = check(Asker.of(reference, Endpoint(server.url), "shop"), CheckOptions(repeats=1))
        spoken = {(type(body["prompt"]), body["logprobs"]) for body in server.bodies[5:]}
    assert spoken == {(list, 1)}, "not the texts and the True of another dialect"
    expected = ("as trained", None) if fault is None else ("differs", FAULTS[fault].fault)
    assert (found["verdict"], found["fault"]) == expected, found["reason"]


def test_two_prompts_of_eight_are_no_evidence(asked: VerifyCase, recorded: Path) -> None:
    """The server takes texts, and the tokens of most questions have none."""
    few, served = read_reference(recorded), Served(asked.base, {"base": None, "shop": asked.adapter}, "texts")
    few.questions[2:] = [replace(question, texts=[None] * len(question.texts)) for question in few.questions[2:]]
    found = checked(translated("texts", served), few)
    assert found["verdict"] == "inconclusive"
    assert found["reason"].startswith("the answers to 2 of 8 prompts could be compared")


def slowly(reference: Reference, answer_s: float, companion_s: float) -> Callable[[dict[str, Any]], int | bytes]:
    """A right server that takes so long for an answer, and for one of those that others are mixed with."""
    served = FromReference(reference, lambda name: RIGHT)

    def reply(body: dict[str, Any]) -> int | bytes:
        time.sleep(companion_s if body["max_tokens"] == COMPANION_TOKENS else answer_s)
        return served(body)

    return reply


def test_a_time_out_is_that_of_one_answer_or_of_the_check(
    recorded: Path, reference: Reference, capsys: pytest.CaptureFixture[str]
) -> None:
    with openai_server(slowly(reference, 0.04, 0.04), NAMES) as server:
        asked: dict[str, Any] = {"references": [recorded], "endpoint": server.url, "served_name": "shop"}
        report = verify_adapter(**asked, timeout_s=1)
        assert report.verdict == "as trained", report.engines[0].reason
        assert report.engines[0].seconds > 1
        with pytest.raises(EngineError, match="the time limit for all requests was reached after"):
            verify_adapter(**asked, check_timeout_s=1)
        words = [str(recorded), server.url, "--served-name", "shop"]
        assert (main([*words, "--timeout", "1"]), main([*words, "--check-timeout", "1"])) == (0, 2)


def test_mixed_batches_that_time_leaves_out_are_no_pass(
    recorded: Path, reference: Reference, capsys: pytest.CaptureFixture[str]
) -> None:
    with openai_server(slowly(reference, 0.0, 2.0), NAMES) as server:
        words = [str(recorded), server.url, "--served-name", "shop", "--check-timeout", "2", "--json"]
        assert main(words) == 3
        found = json.loads(capsys.readouterr().out)
        assert "the time limit for all requests was reached" in found["mixed_failure"]
        assert main([*words, "--without-mixed"]) == 0


def test_a_server_without_logprobs_decides_nothing(
    recorded: Path, base: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Ollama answers before version 0.12.11; alike by the checker, by a reference and with PyTorch."""
    with openai_server(lambda body: "a text") as server:
        named: dict[str, Any] = {"served_name": "shop", "base_name": "base", "endpoint": server.url}
        assert main([str(recorded), server.url, "--served-name", "shop", "--base-name", "base"]) == 3
        assert "which the comparison needs" in capsys.readouterr().out
        for report in (verify_adapter(references=[recorded], **named), verify_adapter(adapter, model=base, **named)):
            assert report.verdict == "inconclusive"
            assert "which the comparison needs" in report.engines[0].reason


@pytest.mark.process
def test_the_checker_is_one_file_that_needs_the_standard_library_alone(
    recorded: Path, asked: VerifyCase, tmp_path: Path
) -> None:
    """`-I -S`: neither this environment's packages nor ours can be imported."""
    file = tmp_path / "adapter_check.pyz"
    write_checker(file)
    served = Served(asked.base, {"base": None, "shop": asked.adapter, "wrong": None})
    with openai_server(served, ("base", "shop", "wrong")) as server:
        for name, more, code in (("shop", [], 0), ("wrong", ["--quick"], 1), ("absent", [], 2)):
            command = [sys.executable, "-I", "-S", str(file), str(recorded), server.url, "--json", *more]
            done = subprocess.run(
                [*command, "--served-name", name, "--base-name", "base"], capture_output=True, text=True, env={}
            )
            assert (done.returncode, done.stderr) == (code, ""), done.stdout
            assert json.loads(done.stdout)["verdict"] == {0: "as trained", 1: "differs", 2: "failed"}[code]


@pytest.mark.process
@pytest.mark.parametrize("way", ["command", "file"])
def test_the_first_request_is_sent_before_anything_heavy_is_imported(
    way: str, recorded: Path, reference: Reference, tmp_path: Path
) -> None:
    """Processor time, which a busy machine changes little; the best of some starts, since files may have to be read."""
    file = tmp_path / "adapter_check.pyz"
    write_checker(file)
    with openai_server(FromReference(reference, lambda name: RIGHT), NAMES) as server:
        words, run, isolated = {
            "command": (["verify", "--reference", str(recorded), "--endpoint", server.url], RUN_COMMAND, []),
            "file": ([str(recorded), server.url], RUN_FILE.format(file=str(file)), ["-I", "-S"]),
        }[way]
        found: list[dict[str, Any]] = []
        while len(found) < STARTS and (not found or found[-1]["seconds"] > FIRST_REQUEST_S):
            command = [sys.executable, *isolated, "-c", WATCHED + run, *words, "--served-name", "shop", "--quick"]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            found.append(json.loads(done.stderr.splitlines()[-1]))
    assert not HEAVY & {*found[-1]["first"]}
    assert not {"torch", "transformers", "scipy"} & {*found[-1]["end"]}
    assert found[-1]["seconds"] <= FIRST_REQUEST_S, [each["seconds"] for each in found]


FIRST_REQUEST_S, STARTS = 0.4, 5
HEAVY = {"torch", "transformers", "numpy", "scipy", "pydantic", "rich", "jinja2", "httpx2", "safetensors", "html"}
WATCHED = """
import http.client, json, os, sys
request = http.client.HTTPConnection.request
found = {}
def first(*args, **more):
    http.client.HTTPConnection.request = request
    times = os.times()
    found.update(seconds=times.user + times.system, first=[*sys.modules])
    return request(*args, **more)
http.client.HTTPConnection.request = first
def end(code):
    print(json.dumps(found | {"end": [*sys.modules]}), file=sys.stderr)
    sys.exit(code)
"""
RUN_COMMAND = """
from loraover_serve.cli import cli
from loraover.common.command_line import run
end(run(cli))
"""
RUN_FILE = """
sys.path.insert(0, {file!r})
from loraover_serve.judge.command import main
end(main())
"""


@pytest.mark.parametrize("words", [("--check-timeout", "nan"), ("--churn", "nan"), ("--churn=-3",), ("--churn", "x")])
def test_seconds_that_are_none_are_refused(words: tuple[str, ...], recorded: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(recorded), "http://localhost:9", *words])
    assert ended.value.code == 2


def test_an_output_in_ascii_shows_names_in_other_letters(
    recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checker(tmp_path / "check.pyz")
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    with openai_server(lambda body: 404, ("модель", "другая")) as server:
        words = [sys.executable, "check.pyz", str(recorded), server.url, "--served-name", "адаптер"]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "\\u0430" in done.stdout
