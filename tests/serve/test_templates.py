"""The chat template of a server beside the recorded one: the same, another one, a date; servers that tell little."""

from __future__ import annotations

import copy
import gzip
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from loraover.client.endpoint import Endpoint
from loraover.common.errors import CheckpointError
from loraover_serve import verify_adapter
from loraover_serve.judge.asker import Asker
from loraover_serve.judge.command import CheckOptions, check, main
from loraover_serve.judge.names import TEMPLATE
from loraover_serve.judge.reference import Reference, read_reference
from loraover_serve.judge.templates import Conversation, most_requests
from loraover_serve.verify.chats import pack_chats
from loraover_serve.verify.recorder import RecordReport
from loraover_serve.verify.request import RecordRequest
from loraover_serve.verify.show import show_recording
from loraover_serve.watch.canary import ask
from loraover_serve.watch.config import read_config

from support.openai_server import openai_server
from support.recorded import record
from support.reference_server import AS_BASE, RIGHT, Chatting, FromReference
from support.tiny_hub import tiny_tokenizer
from support.verified import Served

NAMES = ("base", "shop")
TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}|{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
OWN = "{% for t in tools or [] %}{{ t.function.name }}|{% endfor %}" + TURNS
SYSTEM = "{% if messages[0].role != 'system' %}<system>be rude|{% endif %}" + OWN
NOW = "{{ strftime_now('%d %B %Y') }}"
DATED = f"<system>today is {NOW}|{OWN}"
REWRITTEN = OWN.replace("t.function.name", "t | tojson")
OF_TWO = "{% if messages | length > 2 %}{{ raise_exception('one turn alone') }}{% endif %}" + OWN


def with_template(template: str) -> Any:
    """The tiny tokenizer with a chat template."""
    found = tiny_tokenizer()
    found.chat_template = template
    return found


@pytest.fixture(scope="module")
def told(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Contents of the reference of an adapter that has the template OWN."""
    folder = tmp_path_factory.mktemp("told")
    own = shutil.copytree(adapter, folder / "shop")
    (own / "chat_template.jinja").write_text(OWN)
    content: dict[str, Any] = json.loads(gzip.decompress(record(base, own, folder).read_bytes()))
    return content


def of(told: dict[str, Any], template: str) -> Reference:
    """The reference with conversations in a template."""
    return Reference(told | pack_chats(with_template(template), told["vocabulary"]))


def checked(reference: Reference, reply: Callable[[dict[str, Any]], int | bytes], **more: Any) -> dict[str, Any]:
    with openai_server(reply, NAMES) as server:
        return check(Asker.of(reference, Endpoint(server.url), "shop"), CheckOptions(repeats=1, **more))


def right(reference: Reference, state: str = RIGHT) -> FromReference:
    return FromReference(reference, lambda name: state)


def test_a_reference_keeps_conversations_in_the_adapters_own_template(told: dict[str, Any], recorded: Path) -> None:
    found, tokenizer = told["chats"]["conversations"], with_template(OWN)
    roles = [[message["role"] for message in each["messages"]] for each in found]
    assert roles[:2] == [["user"], ["system", "user"]]
    assert max(map(len, roles)) == 4
    assert [each["tools"] is not None for each in found] == [False] * (len(found) - 1) + [True]
    for each in found:
        text = tokenizer.apply_chat_template(
            each["messages"], tools=each["tools"], tokenize=False, add_generation_prompt=True
        )
        assert each["tokens"] == tokenizer(text).input_ids
        assert each["date"] is None
        assert "".join(told["chats"]["pieces"][str(i)] for i in each["tokens"]) == text.lower().replace("_", "<unk>")
    assert told["schema_version"] == 1
    assert "chats" not in json.loads(gzip.decompress(recorded.read_bytes())), "the base model has no template"


def test_a_template_need_not_take_every_conversation(told: dict[str, Any]) -> None:
    kept = pack_chats(with_template(OF_TWO), told["vocabulary"])["chats"]["conversations"]
    assert [len(each["messages"]) for each in kept] == [1, 2, 1]
    without_tools = pack_chats(with_template(TURNS), told["vocabulary"])["chats"]["conversations"]
    assert not any(each["tools"] for each in without_tools)
    assert pack_chats(with_template("{{ raise_exception('no') }}"), told["vocabulary"]) == {}
    assert pack_chats(with_template(OWN), vocabulary=3) == {}
    assert pack_chats(with_template("{% set f = '%d' %}{{ strftime_now(f) }}" + OWN), told["vocabulary"]) == {}


@pytest.mark.parametrize("tells", Chatting.TELLS)
def test_the_right_template_changes_no_verdict(tells: str, told: dict[str, Any]) -> None:
    reference = of(told, OWN)
    with openai_server(Chatting(right(reference), with_template(OWN), tells), NAMES) as server:
        found = check(Asker.of(reference, Endpoint(server.url), "shop"), CheckOptions(repeats=1))
        sent = [body for body in server.bodies if "prompt" not in body]
    assert (found["verdict"], found["fault"]) == ("as trained", None), found["reason"]
    assert len(sent) <= most_requests(reference.conversations)
    chats = [body for body in sent if "messages" in body and "max_tokens" in body]
    assert len(chats) <= len(reference.conversations.found) + 1
    assert {body["max_tokens"] for body in chats} == {1}
    if tells in ("ids", "tokenize", "apply"):
        assert "5 chats have the tokens of the recorded template" in found["template"]
        assert not [each for each in found["not_checked"] if "chat" in each]
    elif "number" in tells:
        assert "5 chats have as many tokens as in the recorded template" in found["template"]
        assert "the tokens of chats: the server returns only their number" in found["not_checked"]
    else:
        assert "the chat template was not compared: " in found["template"]
        assert [each for each in found["not_checked"] if each.startswith("the chat template: ")]


@pytest.mark.parametrize("tells", Chatting.TELLS)
def test_a_system_prompt_of_the_servers_own_is_another_template(tells: str, told: dict[str, Any]) -> None:
    reference = of(told, OWN)
    found = checked(reference, Chatting(right(reference), with_template(SYSTEM), tells))
    if tells in ("nothing", "no route"):
        assert (found["verdict"], found["fault"]) == ("as trained", None)
        return
    assert (found["verdict"], found["fault"]) == ("differs", TEMPLATE), found["reason"]
    alone = "answers to prompts that no template touches are as trained (judge them alone with --without-template)"
    assert alone in found["reason"]
    assert "this is so in 3 of 5 chats" in found["reason"], "two have a system prompt"
    if "number" in tells:
        assert "the server reads 49 tokens of a chat (user), and the adapter's template gives 33" in found["reason"]
    else:
        words = 'differs at token 1 of a chat (user): the server reads "<system>'
        assert words in found["reason"]
        assert "the adapter's template gives \"<user>do" in found["reason"]


LATER = OWN.replace("<{{ m.role }}>", "{% if m.role != 'system' %}<{{ m.role }}>").replace(
    "|{% endfor %}{% if add", "|{% endif %}{% endfor %}{% if add"
)
MISTAKES = {
    "without the system prompt": (
        LATER,
        "the system prompt is left out: prompt differs at token 1 of a chat (system, user)",
    ),
    "without tools": (TURNS, "the tools are left out: prompt differs at token 0 of a chat (user with tools)"),
    "two beginnings of an answer": (
        OWN + "<a>",
        "the end of a prompt, such as the beginning of the answer, occurs twice: ",
    ),
    "two first tokens": ("<" + OWN, "the first token occurs twice: prompt differs at token 1 of a chat (user): "),
    "a date": (DATED, "prompt differs at token 1 of a chat (user): "),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("tells", ["ids", "tokenize", "apply", "number"])
def test_a_mistake_of_a_template_is_said(tells: str, mistake: str, told: dict[str, Any]) -> None:
    """Numbers that are others in all chats may be those of a gateway that counts otherwise."""
    reference, (template, words) = of(told, OWN), MISTAKES[mistake]
    server_of = Chatting(right(reference), with_template(template), tells)
    with openai_server(server_of, NAMES) as server:
        found = check(Asker.of(reference, Endpoint(server.url), "shop"), CheckOptions(repeats=1))
        texts = [body for body in server.bodies if "tokens" in body]
    assert len(texts) <= 1, "one text is asked for, whatever the number of chats that differ"
    if tells == "number" and not mistake.startswith("without"):
        assert (found["verdict"], found["fault"]) == ("inconclusive", None), found["reason"]
        assert found["reason"].startswith("the chat template may be another one, or a gateway adds to each number: ")
        return
    assert (found["verdict"], found["fault"]) == ("differs", TEMPLATE), found["reason"]
    assert tells == "number" or words in found["reason"]


@pytest.mark.parametrize("ratio", [0.8, 1.02, 1.3])
def test_a_gateway_that_counts_with_its_own_tokenizer_is_inconclusive(ratio: float, told: dict[str, Any]) -> None:
    reference = of(told, OWN)
    own = Chatting(right(reference), with_template(OWN), "number")

    def reply(body: dict[str, Any]) -> int | bytes:
        found = own(body)
        if "messages" not in body or isinstance(found, int):
            return found
        answer = json.loads(found)
        answer["usage"]["prompt_tokens"] = round(ratio * answer["usage"]["prompt_tokens"])
        return json.dumps(answer).encode()

    found = checked(reference, reply)
    assert (found["verdict"], found["fault"]) == ("inconclusive", None)
    assert "or a gateway counts with another tokenizer: the server reads" in found["reason"]
    assert "judge them alone with --without-template" in found["reason"]


def test_a_server_that_leaves_tools_out_where_none_may_be_called_is_right(told: dict[str, Any]) -> None:
    """As vLLM with --exclude-tools-when-tool-choice-none, which takes no others without --enable-auto-tool-choice."""
    reference = of(told, OWN)
    own = Chatting(right(reference), with_template(OWN), "ids")

    def reply(body: dict[str, Any]) -> int | bytes:
        if "tools" in body and body.get("tool_choice") != "none":
            return 400
        return own({key: value for key, value in body.items() if key != "tools"})

    found = checked(reference, reply)
    assert (found["verdict"], found["fault"]) == ("as trained", None), found["reason"]
    assert "tools are rendered differently or left out, as some engines do" in found["template"]


def test_another_template_is_told_beside_another_fault_or_alone(told: dict[str, Any]) -> None:
    reference = of(told, OWN)
    reply = Chatting(right(reference, AS_BASE), with_template(SYSTEM), "ids")
    found = checked(reference, reply)
    assert (found["verdict"], found["fault"]) == ("differs", "served as base")
    assert f", and besides, {TEMPLATE}: prompt differs at token 1" in found["reason"]
    alone = checked(reference, Chatting(right(reference), with_template(SYSTEM), "ids"), without_template=True)
    assert (alone["verdict"], alone["template"]) == ("as trained", None)
    assert "the chat template: the option --without-template leaves it out" in alone["not_checked"]
    doubtful = FromReference(reference, lambda name: RIGHT, noise=1.0)
    unclear = checked(reference, Chatting(doubtful, with_template(SYSTEM), "ids"), served_format="fp32")
    assert unclear["verdict"] == "differs"


@pytest.mark.parametrize("tells", ["ids", "tokenize", "number"])
def test_a_date_that_has_changed_is_no_fault(tells: str, told: dict[str, Any]) -> None:
    reference = of(told, DATED)
    assert all(each.date is not None for each in reference.conversations.found)
    for now in (NOW, "01 january 2027", "30 may 2030", "22 september 2028"):
        found = checked(reference, Chatting(right(reference), with_template(DATED.replace(NOW, now)), tells))
        assert (found["verdict"], found["fault"]) == ("as trained", None), found["reason"]
        assert found["template"].endswith(", but for the date that it prints")
    for other, place in ((OWN, 1), (DATED.replace("<a>", "<model>"), None), (DATED.replace("is", "was"), 14)):
        found = checked(reference, Chatting(right(reference), with_template(other), tells))
        if tells == "number":
            expected = "inconclusive" if other == OWN else "as trained"  # dates differ by as many characters
            assert found["verdict"] == expected, found["reason"]
            continue
        assert (found["verdict"], found["fault"]) == ("differs", TEMPLATE), found["reason"]
        assert place is None or tells == "number" or f"differs at token {place} " in found["reason"]


def test_a_recording_says_that_the_template_prints_a_date(tmp_path: Path) -> None:
    report = RecordReport(
        path=tmp_path, size_bytes=9000, questions=8, positions=32, variants=3, chats=5, has_date=True, seconds=12.4,
        effect=0.5, half=None, decides=False,
    )  # fmt: skip
    show_recording(report, RecordRequest(tmp_path), Console(file=(shown := io.StringIO()), width=200))
    assert "3 faults, 9 kB, in 12 s\n" in shown.getvalue()
    assert "5 chats in the adapter's template, which prints a date; servers may print another one" in shown.getvalue()


def test_the_day_that_llama_server_gives_a_template_is_a_date(told: dict[str, Any]) -> None:
    own = (
        "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}<system>{{ date_string }}|"
    )
    reference = of(told, own + OWN)
    assert all(each.date is not None for each in reference.conversations.found)
    today = "{% set date_string = '30 Nov 2026' %}<system>{{ date_string }}|" + OWN
    assert checked(reference, Chatting(right(reference), with_template(today), "apply"))["verdict"] == "as trained"


def test_numbers_are_believed_no_further_than_they_reach(told: dict[str, Any]) -> None:
    reference = of(told, OWN)
    own, other = (Chatting(right(reference), with_template(each), "number") for each in (OWN, SYSTEM))
    tokenized = Chatting(right(reference), with_template(OWN), "tokenize")

    def without_cached(body: dict[str, Any]) -> int | bytes:
        found = own(body)
        if "messages" not in body or isinstance(found, int) or "max_tokens" not in body:
            return found
        answer = json.loads(found)
        answer["usage"] = {
            "prompt_tokens": answer["usage"]["prompt_tokens"] - 2,
            "prompt_tokens_details": {"cached_tokens": 2},
        }
        return json.dumps(answer).encode()

    assert checked(reference, without_cached)["verdict"] == "as trained"
    contradicted = checked(
        reference, lambda body: other(body) if {"messages", "max_tokens"} <= body.keys() else tokenized(body)
    )
    assert (contradicted["verdict"], contradicted["fault"]) == ("as trained", None)
    assert "the server counts 49 tokens of a chat, but another route returns 33" in contradicted["template"]


def test_a_date_is_skipped_whatever_its_length() -> None:
    dated = Conversation([{"role": "user", "content": ""}], [1, 2, 3, 50, 51, 52, 4, 5, 6], date=(3, 6))
    assert dated.differs_at([1, 2, 3, 60, 4, 5, 6]) is None
    assert dated.differs_at([1, 2, 3, 60, 61, 62, 63, 64, 4, 5, 6]) is None
    assert dated.differs_at([1, 2, 3, 60, 61, 62, 4, 5, 7, 6]) == (8, 8)
    assert dated.differs_at([1, 9, 3, 60, 4, 5, 6]) == (1, 1)
    assert dated.differs_at([1, 2]) == (2, 2)
    assert dated.differs_at([1, 2, 3, 50, 51, 52, 4, 5]) == (8, 8)
    plain = dated._replace(date=None)
    assert plain.differs_at(plain.tokens) is None
    assert plain.differs_at([*plain.tokens, 7]) == (9, 9)
    assert plain.differs_at([1, 2, 3, 50, 51]) == (5, 5)
    assert (plain.is_as_long(9), plain.is_as_long(8), dated.is_as_long(12)) == (True, False, True)


def test_tools_that_an_engine_writes_anew_are_no_fault(told: dict[str, Any]) -> None:
    reference = of(told, OWN)
    found = checked(reference, Chatting(right(reference), with_template(REWRITTEN), "ids"))
    assert (found["verdict"], found["fault"]) == ("as trained", None), found["reason"]
    assert "4 chats have the tokens of the recorded template; tools are rendered differently" in found["template"]
    assert [each for each in found["not_checked"] if each.startswith("whether chats with tools are right: ")]


def refusing_tools(body: dict[str, Any], reply: Chatting) -> int | bytes:
    return 400 if body.get("tools") else reply(body)


def test_chats_that_are_refused_are_counted(told: dict[str, Any]) -> None:
    reference = of(told, OWN)
    reply = Chatting(right(reference), with_template(OWN), "ids")
    found = checked(reference, lambda body: refusing_tools(body, reply))
    assert found["verdict"] == "as trained"
    assert "4 chats have the tokens of the recorded template; 1 of the chats were not compared" in found["template"]
    assert [each for each in found["not_checked"] if each.startswith("1 of the chats: ")]


HOSTILE: tuple[bytes, ...] = (
    b"[]",
    b"null",
    b'"text"',
    b"<html>",
    b'{"prompt_token_ids": NaN, "usage": NaN}',
    b'{"prompt_token_ids": [1e999], "usage": {"prompt_tokens": NaN}}',
    b'{"prompt_token_ids": [true], "usage": {"prompt_tokens": true}}',
    b'{"prompt_token_ids": ["1"], "usage": {"prompt_tokens": "33"}, "tokens": {"0": 1}, "prompt": 5}',
    b'{"prompt_token_ids": [-1], "usage": {"prompt_tokens": -33}, "tokens": [[1]], "prompt": ["a"]}',
    b'{"prompt_token_ids": [' + b"9" * 4000 + b'], "usage": {"prompt_tokens": ' + b"9" * 4000 + b'}, "tokens": [1.5]}',
    b'{"prompt_token_ids": {}, "usage": [], "tokens": null, "prompt": null}',
    b"[" * 100_000,
)


@pytest.mark.parametrize("answer", HOSTILE, ids=range(len(HOSTILE)))
def test_answers_that_are_no_tokens_show_nothing(answer: bytes, told: dict[str, Any]) -> None:
    reference = of(told, OWN)
    ids = right(reference)
    found = checked(reference, lambda body: ids(body) if isinstance(body.get("prompt"), list) else answer)
    assert (found["verdict"], found["fault"]) == ("as trained", None)
    assert "the chat template was not compared: " in found["template"]


def test_a_text_of_the_servers_is_short_and_moves_no_cursor(told: dict[str, Any]) -> None:
    reference = of(told, OWN)
    ids = right(reference)
    text = "\x1b[2J;\u202e\ud800" + "x" * 100_000

    def reply(body: dict[str, Any]) -> int | bytes:
        if "messages" in body:
            return json.dumps({"prompt_token_ids": [2**60] * 50_000}).encode()
        return json.dumps({"prompt": text}).encode() if "tokens" in body else ids(body)

    found = checked(reference, reply)
    assert (found["verdict"], found["fault"]) == ("differs", TEMPLATE)
    assert found["template"].isprintable()
    assert len(found["template"]) < 500


def test_the_report_and_older_references(told: dict[str, Any], tmp_path: Path) -> None:
    """An older reference has no conversations, and a server is asked for none."""
    reference = of(told, OWN)
    for content, expected in ((told, "differs"), ({k: v for k, v in told.items() if k != "chats"}, "as trained")):
        path = tmp_path / "reference.json"
        path.write_text(json.dumps(content))
        with openai_server(Chatting(right(reference), with_template(SYSTEM), "ids"), NAMES) as server:
            report = verify_adapter(references=[path], endpoint=server.url, served_name="shop")
            chats = [body for body in server.bodies if "messages" in body]
        (engine,) = report.engines
        assert (engine.verdict, bool(chats), engine.template is not None) == (
            expected,
            expected == "differs",
            expected == "differs",
        )
    assert read_reference(path).conversations.found == ()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("messages", [{"role": "user"}]),
        ("messages", [{"role": "user", "content": None}]),
        ("messages", 5),
        ("messages", []),
        ("tokens", []),
        ("tokens", [1, True]),
        ("tokens", [10**9]),
        ("tokens", [1] * 5000),
        ("tools", "text"),
        ("date", 0),
        ("date", []),
        ("date", [1]),
        ("date", [5, 2]),
        ("date", [0, 10**6]),
        ("date", [0.5, 2]),
    ],
)
def test_conversations_that_cannot_be_are_refused(key: str, value: Any, told: dict[str, Any], tmp_path: Path) -> None:
    broken = copy.deepcopy(told)
    broken["chats"]["conversations"][0][key] = value
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(broken))
    with pytest.raises(CheckpointError, match="not a reference that can be used"):
        read_reference(path)


@pytest.mark.parametrize(("template", "expected"), [(OWN, ("as trained", None)), (SYSTEM, ("differs", TEMPLATE))])
def test_verify_with_pytorch_compares_the_template_of_an_endpoint(
    template: str, expected: tuple[str, str | None], base: Path, adapter: Path, tmp_path: Path
) -> None:
    own = shutil.copytree(adapter, tmp_path / "shop")
    (own / "chat_template.jinja").write_text(OWN)
    reply = Chatting(Served(base, {"base": None, "shop": own}), with_template(template), "ids")
    with openai_server(reply, NAMES) as server:
        asked: dict[str, Any] = {"model": base, "endpoint": server.url, "served_name": "shop", "base_name": "base"}
        (found,) = verify_adapter(own, **asked, new_tokens=2).engines
        (alone,) = verify_adapter(own, **asked, new_tokens=2, without_template=True).engines
    assert (found.verdict, found.fault) == expected, found.reason
    assert (alone.verdict, alone.template) == ("as trained", None)


def test_the_checker_says_what_another_template_is(
    told: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "reference.json"
    path.write_text(json.dumps(told))
    with openai_server(Chatting(right(of(told, OWN)), with_template(SYSTEM), "ids"), NAMES) as server:
        words = [str(path), server.url, "--served-name", "shop", "--repeats", "1"]
        assert main(words) == 1
        assert capsys.readouterr().out.startswith(f"differs: {TEMPLATE}: prompt differs at token 1 of a chat")
        assert main([*words, "--without-template"]) == 0
        assert main([*words, "--quick"]) == 0


def test_a_watch_sees_another_template_within_its_requests(told: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "reference.json").write_text(json.dumps(told))
    with openai_server(Chatting(right(of(told, OWN)), with_template(SYSTEM), "apply"), NAMES) as server:
        adapters = [
            {"reference": "reference.json", "name": "shop", "without_template": leave} for leave in (False, True)
        ]
        servers = [{"name": f"s{i}", "url": server.url, "adapters": [each]} for i, each in enumerate(adapters)]
        (tmp_path / "watch.yaml").write_text(json.dumps({"servers": servers}))
        compared, left_out = read_config(tmp_path / "watch.yaml").targets
        checks = [ask(target) for target in (compared, left_out)]
    assert [(check.verdict, check.fault) for check in checks] == [("differs", TEMPLATE), ("as trained", None)]
    assert checks[0].requests <= compared.most
    assert compared.most - left_out.most == most_requests(of(told, OWN).conversations)
