"""The checker of the standard library beside verify: every planted fault, both ways, gets one verdict and one name."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serve.test_verify_endpoint import Mixing

from loraover_serve.engines import engine_class
from loraover_serve.engines.answers import ADAPTER, BASE, Row
from loraover_serve.engines.base import Engine
from loraover_serve.judge.names import CHANGED, LEAKS, OTHER_BASE
from loraover_serve.judge.rules import judge
from loraover_serve.record.adapter_check.asker import Asker, served_names
from loraover_serve.record.adapter_check.command import check
from loraover_serve.record.adapter_check.evidence import Answers, Greedy, RecordedEvidence
from loraover_serve.record.adapter_check.reference import UNIT, CheckError, Reference, read_reference
from loraover_serve.record.adapter_check.server import Server
from loraover_serve.record.checker_file import write_checker
from loraover_serve.record.recorder import KEPT, TOP
from loraover_serve.verify.evidence import Answers as VerifyAnswers

from support.openai_server import openai_server
from support.planted_faults import FAULTS as PLANTED
from support.planted_faults import Ask, Fault, reply, right_models, save_sharp_base
from support.recorded import record
from support.verified import FAULTS, Served, make_case, plant, save_adapter, save_base
from support.verified import Case as VerifyCase

NAMES = ("base", "shop")
SECONDS = 120.0


@pytest.fixture(scope="module")
def reference(recorded: Path) -> Reference:
    return read_reference(str(recorded))


def answers_of(engine: Engine, asked: VerifyCase, reference: Reference) -> Answers:
    """What a server would answer that gives the likeliest tokens of an engine."""
    questions = asked.judge.reference.questions
    places = {(q, questions[q].answered[step]): place for place, (q, step) in enumerate(reference.places)}
    arms = [
        {
            places[row.question, row.position]: likeliest(row)
            for row in engine.logprobs(arm, questions)
            if (row.question, row.position) in places
        }
        for arm in (BASE, ADAPTER)
    ]
    greedy = engine.generated(questions, max(len(question.continuation) for question in questions))
    return Answers(arms[0], arms[1], [Greedy(q, answer.tokens, answer.length, {}) for q, answer in enumerate(greedy)])


def likeliest(row: Row) -> dict[int, float]:
    return {int(i): float(row.logprobs[i]) for i in np.argsort(-row.logprobs)[:TOP]}


@pytest.mark.parametrize("name", [*FAULTS, "right", "another base model"])
def test_an_engine_has_verifys_verdict(name: str, asked: VerifyCase, reference: Reference, tmp_path: Path) -> None:
    """`test_verify.py` expects the same of verify."""
    changed: dict[str, Path] = {}
    expected: tuple[str, str | None] = ("differs", OTHER_BASE)
    if name in FAULTS:
        changed["adapter"] = plant(FAULTS[name], asked.adapter, tmp_path / "wrong")
        expected = ("differs", FAULTS[name].fault)
    elif name == "right":
        expected = ("as trained", None)
    else:
        changed["base"] = save_base(tmp_path / "other", seed=7)
    with engine_class("torch").start(asked.setting(tmp_path, **changed)) as engine:
        found = judge(RecordedEvidence(reference, answers_of(engine, asked, reference)))
    assert (found["verdict"], found["fault"]) == expected, found["reason"]
    assert name not in FAULTS or FAULTS[name].words in found["reason"]


def row_of(place: tuple[int, int], row: dict[int, float], kept: set[int]) -> Row:
    """A row as verify has it, of these tokens."""
    ids = [i for i in row if i in kept]
    return Row(*place, np.array([row[i] for i in ids], np.float32), np.array(ids))


def test_both_sides_measure_the_same_changes(asked: VerifyCase, reference: Reference, tmp_path: Path) -> None:
    """Recorded logprobs are rounded: each number is off by what a direction that is off by UNIT makes of it."""
    wrong = plant(FAULTS["rsLoRA ignored"], asked.adapter, tmp_path / "wrong")
    with engine_class("torch").start(asked.setting(tmp_path, adapter=wrong)) as engine:
        recorded = answers_of(engine, asked, reference)
    places = [(q, asked.judge.reference.questions[q].answered[step]) for q, step in reference.places]
    arms = (recorded.base, recorded.adapter)
    rows = [[row_of(places[p], row, {*row}) for p, row in arm.items()] for arm in arms]
    sides = (RecordedEvidence(reference, recorded), asked.judge.evidence(VerifyAnswers(rows[0], rows[1], ())))
    known = [[row_of(places[p], row, {*reference.base.rows[p]}) for p, row in arm.items()] for arm in arms]
    alike = (sides[0], asked.judge.evidence(VerifyAnswers(known[0], known[1], ())))
    for one, other in zip(*(side.changes(side.adapter, side.base) for side in alike), strict=True):
        assert (one.prompt, one.tokens) == (other.prompt, other.tokens)
        off = UNIT * one.tokens**0.5
        assert abs(one.along - other.along) <= 1.5 * off * one.total**0.5
        assert one.total == pytest.approx(other.total, rel=1e-6)
        for part in ("size", "rest"):
            assert abs(getattr(one, part) ** 0.5 - getattr(other, part) ** 0.5) <= 1.5 * off
    for one_off, other_off in zip(*(side.off(ADAPTER, side.adapter) for side in sides), strict=True):
        assert one_off.square**0.5 <= other_off.square**0.5 + 1.5 * UNIT, "an unrecorded token counts at its least"
        assert one_off.square >= 0.8 * KEPT / TOP * other_off.square


def checked(reply: Any, reference: Reference, models: Any = NAMES, **more: Any) -> dict[str, Any]:
    """The checker's result on a server that answers like this."""
    with openai_server(reply, models) as server:
        asked = Server(server.url, {}, time.monotonic() + SECONDS)
        names = served_names(asked, reference, "shop", None)
        return check(Asker(reference, asked, names), **more)


@pytest.fixture(scope="module")
def sharp(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Reference]:
    """A base model whose attention depends on positions, an adapter, and its reference."""
    folder = tmp_path_factory.mktemp("sharp")
    base = save_sharp_base(folder / "base")
    adapter = save_adapter(folder / "adapter", base)
    return base, adapter, read_reference(str(record(base, adapter, folder)))


@pytest.fixture(scope="module")
def serve(sharp: tuple[Path, Path, Reference], tmp_path_factory: pytest.TempPathFactory) -> Callable[[Fault], Ask]:
    base, adapter, _ = sharp
    return right_models(make_case(base, adapter), tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("name", PLANTED)
def test_each_fault_of_a_server_has_verifys_verdict(
    name: str, sharp: tuple[Path, Path, Reference], serve: Callable[[Fault], Ask]
) -> None:
    """`test_verify_faults.py` expects the same of verify."""
    fault = PLANTED[name]
    found = checked(reply(fault.wrong(serve(fault))), sharp[2], fault.listed)
    assert (found["verdict"], found["fault"]) == (fault.verdict, fault.name), found["reason"]


@pytest.mark.parametrize(("victim", "fault"), [("base", LEAKS), ("shop", CHANGED)])
def test_answers_that_change_in_a_mixed_batch_are_named(
    victim: str, fault: str, asked: VerifyCase, reference: Reference
) -> None:
    server = Mixing(Served(asked.base, {"base": None, "shop": asked.adapter}), victim)
    found = checked(server, reference)
    assert (found["verdict"], found["fault"]) == ("differs", fault), found["reason"]
    assert found["reason"].endswith("answered right: send them so, and judge them alone with --without-mixed")
    alone = checked(server, reference, without_mixed=True)
    assert (alone["verdict"], alone["mixed_failure"]) == ("as trained", "--without-mixed was given"), alone["reason"]


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
        running = Server(server.url, {}, time.monotonic() + SECONDS)
        names = {"base": "base", "adapter": "0" if protocol == "llama-server" else "shop"}
        found = check(Asker(reference, running, names, None if protocol == "texts" else protocol))
    expected = ("as trained", None) if is_right else ("differs", FAULTS["rsLoRA ignored"].fault)
    assert (found["verdict"], found["fault"]) == expected, found["reason"]


def test_a_server_without_logprobs_is_said_to_have_none(reference: Reference) -> None:
    with pytest.raises(CheckError, match="gives no logprobs: nothing can be compared"):
        checked(lambda body: "a text", reference)


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
def test_verify_by_a_reference_asks_before_anything_heavy_is_imported(recorded: Path, asked: VerifyCase) -> None:
    served = Served(asked.base, {"base": None, "shop": asked.adapter})
    with openai_server(served, NAMES) as server:
        script = WATCHED.format(reference=str(recorded), url=server.url)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    modules = next(line for line in done.stderr.splitlines() if line.startswith("imported ")).split()[1:]
    assert not {"torch", "transformers", "numpy", "scipy"} & {*modules}
    assert "torch" not in next(line for line in done.stderr.splitlines() if line.startswith("at the end"))


WATCHED = """
import atexit, sys, urllib.request
opened = urllib.request.OpenerDirector.open
def first(*args, **more):
    urllib.request.OpenerDirector.open = opened
    print("imported", *sys.modules, file=sys.stderr)
    return opened(*args, **more)
urllib.request.OpenerDirector.open = first
heavy = ("torch", "transformers", "scipy")
from loraover_serve.cli import cli
from loraover.common.command_line import run
code = run(cli, ["verify", "--reference", {reference!r}, "--endpoint", {url!r}, "--served-name", "shop", "--quick"])
print("at the end", *(name for name in heavy if name in sys.modules), file=sys.stderr)
sys.exit(code)
"""
