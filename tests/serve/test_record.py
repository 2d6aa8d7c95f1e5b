"""References: what is recorded of a tiny model, what a checker makes of it, and files that are none."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from loraover.common.command_line import run
from loraover.common.errors import CheckpointError
from loraover.models import memory
from loraover.models.load import ModelSource, load_tokenizer, resolve_model
from loraover_serve import verify_adapter
from loraover_serve.cli import cli
from loraover_serve.engines.answers import Expected
from loraover_serve.engines.torch import model_logits
from loraover_serve.judge.estimates import Interval
from loraover_serve.judge.limits import ADAPTER, BASE
from loraover_serve.judge.models import Model
from loraover_serve.judge.reference import STEPS_PER_E, UNIT, read_reference
from loraover_serve.judge.search import LEFT
from loraover_serve.verify import by_pytorch, recorder
from loraover_serve.verify.pack import KEPT, texts_of
from loraover_serve.verify.power import Rounding, choose_number
from loraover_serve.verify.variants import FaultyAdapter

from support.recorded import ANSWER, LINES, QUESTIONS, record
from support.verified import Case


@pytest.fixture(scope="module")
def content(recorded: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(gzip.decompress(recorded.read_bytes()))
    return found


def largest_gap(model: Model, expected: Expected, places: Sequence[tuple[int, int]], asked: Case) -> float:
    """Largest difference of recorded logprobs from PyTorch's."""
    answered = [(q, asked.models.questions[q].answered[step]) for q, step in places]
    pairs = zip(model.rows, answered, strict=False)
    return max(abs(value - float(expected.at(*place)[i])) for row, place in pairs for i, value in row.items())


def test_recorded_logprobs_are_pytorchs(recorded: Path, asked: Case) -> None:
    found, right = read_reference(recorded), asked.models
    assert len(found.questions) == QUESTIONS
    assert [(q.prompt, q.answer) for q in found.questions] == [(q.prompt, q.answer) for q in right.questions]
    assert min(map(len, found.base.rows)) >= KEPT
    rounding, relative = UNIT / 2 + 1e-5, math.expm1(0.5 / STEPS_PER_E)
    assert relative < LEFT, "the record of a fault explains the fault"
    assert largest_gap(found.base, right.expected[BASE], found.places, asked) <= rounding
    assert largest_gap(found.adapter, right.expected[ADAPTER], found.places, asked) <= rounding
    for model in found.variants[ADAPTER]:
        if model.factor is not None:
            deltas = {module: delta.times(model.factor) for module, delta in right.subject.deltas.items()}
            gap = largest_gap(model, right.variants.adapted(FaultyAdapter("", "", deltas)), found.places, asked)
            assert gap <= relative * largest_gap(model, right.expected[ADAPTER], found.places, asked) + rounding


TEMPLATE = "{% for m in messages %}<{{ m.role }}: {{ m.content }}>{% endfor %}"


def test_questions_are_asked_in_the_adapters_own_chat_template(base: Path, adapter: Path, tmp_path: Path) -> None:
    """The base model has none; `loraover eval` asks so, too."""
    own = shutil.copytree(adapter, tmp_path / "own")
    (own / "chat_template.jinja").write_text(TEMPLATE)
    found = json.loads(gzip.decompress(record(base, own, tmp_path).read_bytes()))
    tokenizer = load_tokenizer(resolve_model(str(base)))
    for question in found["questions"]:
        text = f"<user: {question['message']}>"
        assert question["prompt"] == tokenizer(text, add_special_tokens=False).input_ids
    assert found["digests"]["chat_template"] == hashlib.sha256(TEMPLATE.encode()).hexdigest()


def test_a_fault_is_computed_at_the_answers_alone(
    recorded: Path, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int | None] = []

    def counted(*args: Any, last: int | None) -> Any:
        asked.append(last)
        return model_logits(*args, last=last)

    monkeypatch.setattr("loraover_serve.verify.variants.model_logits", counted)
    again = record(base, adapter, tmp_path)
    assert set(asked) == {ANSWER}
    assert read_reference(again).variants == read_reference(recorded).variants


def test_no_token_that_is_left_out_is_likelier_than_the_floor(recorded: Path, asked: Case) -> None:
    found, right = read_reference(recorded), asked.models
    for place, (q, step) in enumerate(found.places):
        row = right.expected[BASE].at(q, right.questions[q].answered[step])
        others = np.delete(row, list(found.base.rows[place]))
        assert found.base.floors[place] == pytest.approx(np.sort(row)[-KEPT], abs=UNIT)
        assert not others.size or others.max() <= found.base.floors[place] + UNIT


def test_an_unrecorded_token_is_at_least_as_far_as_the_floor() -> None:
    model = Model([{1: -1.0, 2: -4.0}], [-5.0])
    assert model.off(0, {2: -3.5, 7: -3.0, 8: -6.0}) == [0.5, 2.0, 0.0]


def test_texts_that_several_tokens_have_are_not_recorded() -> None:
    """Halves of characters in a byte-level vocabulary, and a decoder that strips the space before a word, as Llama's.

    Of either two tokens, only one is among the recorded ones.
    """
    halves = Tokenizer(models.BPE({piece: i for i, piece in enumerate(["ã", "Ģ", "a"])}, []))
    halves.decoder = decoders.ByteLevel()
    assert halves.decode([0]) == halves.decode([1]) == "\ufffd"
    words = Tokenizer(models.BPE({piece: i for i, piece in enumerate(["▁the", "the", "of"])}, []))
    words.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    assert words.decode([0]) == words.decode([1]) == "the"
    for tokenizer, text in ((halves, "a"), (words, "of")):
        assert texts_of(PreTrainedTokenizerFast(tokenizer_object=tokenizer), [0, 2]) == {"2": text}


def test_as_few_questions_are_recorded_as_decide() -> None:
    def chosen(half: float, number: int) -> tuple[int, bool]:
        found = choose_number(number, 1.0, Rounding(0.1, Interval.around(1.0, half)), chosen=False)
        return found["questions"], found["decides"]

    assert chosen(0.01, 64) == (24, True)
    assert chosen(0.11, 64) == (32, True)
    assert chosen(0.5, 64) == (64, False)
    assert chosen(float("inf"), 1) == (1, False)


def change(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def changed(content: dict[str, Any]) -> None:
        *places, last = key.split(".")
        part: Any = content
        for place in places:
            part = part[int(place) if place.isdecimal() else place]
        part[int(last) if last.isdecimal() else last] = value

    return changed


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("schema_version", 3, "schema_version is 3, expected 1 or 2"),
        ("questions", [], "do not fit together"),
        ("questions.0.answer", [1] * (ANSWER + 1), "do not fit together"),
        ("questions.0.prompt", [10**9], "a token is not one of"),
        ("questions.0.prompt.0", True, "a token is not one of"),
        ("positions.0.ids", [1], "ValueError: zip"),
        ("positions.0.base.0", -5, "a probability is above 1"),
        ("positions.0.adapter.0", float("nan"), "a probability is above 1"),
        ("positions.0.floors", {}, "KeyError: 'base'"),
        ("formats.int4.distance", 0, "a number format has no distance"),
        ("variants.0.levels", "#", "does not fit the positions"),
        ("texts", {"one": "a"}, "ValueError"),
        ("adapter", None, "the adapter and its base model need names"),
        ("ends", ["end"], "ValueError"),
        ("made", [], "AttributeError"),
        ("formats.int8", {"distance": 1.0}, "KeyError: 'strength'"),
        ("variants.0.factor", "half", "ValueError"),
    ],
)
def test_a_file_that_is_no_reference_is_refused(
    key: str, value: Any, message: str, content: dict[str, Any], tmp_path: Path
) -> None:
    broken = json.loads(json.dumps(content))
    change(key, value)(broken)
    path = tmp_path / "broken.json.gz"
    path.write_bytes(gzip.compress(json.dumps(broken).encode()))
    with pytest.raises(CheckpointError, match=rf"broken.json.gz: not a reference.*{message}.*record it again"):
        read_reference(path)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"\x1f\x8b",
        b"[" * 100_000,
        gzip.compress(b"{}", mtime=0)[:-5],
        gzip.compress(b" " * 64_000_001, mtime=0),
        b'{"schema_version": 1, "vocabulary": 1e999}',
    ],
)
def test_bytes_that_are_no_reference_are_refused(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(raw)
    with pytest.raises(CheckpointError, match="not a reference that can be used"):
        read_reference(tmp_path / "file")
    with pytest.raises(CheckpointError, match="absent: not a reference"):
        read_reference(tmp_path / "absent")


@pytest.mark.parametrize("option", ["output", "checker"])
def test_a_file_that_exists_is_kept(
    option: str, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, output = tmp_path / "theirs", tmp_path / "reference.json.gz"
    theirs.write_text("theirs")
    assert run(cli, ["record", str(adapter), "-o", str(output), f"--{option}", str(theirs)]) == 2
    assert f"exists; choose another --{option}, or give --force" in capsys.readouterr().err
    assert run(cli, ["record", str(adapter), "-o", str(output), "--checker", str(output)]) == 2
    assert "--output and --checker name one file" in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["theirs"]


def test_a_reference_that_another_command_wrote_meanwhile_is_kept(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "reference.json.gz"

    def record_late(*_: object) -> dict[str, Any]:
        output.write_text("theirs")
        return {}

    monkeypatch.setattr(recorder, "record", record_late)
    assert run(cli, ["record", str(adapter), "-o", str(output)]) == 2
    assert "exists already and is a file" in capsys.readouterr().err
    assert output.read_text() == "theirs"


def test_memory_is_told_before_a_model_is_loaded(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {
        "record": ["record", str(adapter), "--model", str(base), "-o", str(tmp_path / "r.json.gz"), "--device", "cpu"],
        "verify": ["verify", str(adapter), "--model", str(base), "--engine", "torch"],
    }
    loaded: list[bool] = []

    def stopped(adapter: Any, base: ModelSource, *_: Any, **__: Any) -> Any:
        loaded.append(base.is_streamed)
        raise StoppedError

    for module in (recorder, by_pytorch):
        monkeypatch.setattr(module, "make_models", stopped)
    for words_of in words.values():
        with pytest.raises(StoppedError):
            run(cli, words_of)
        told = " ".join("".join(capsys.readouterr()).split())
        assert re.search(r"PyTorch needs about \S+ GiB of memory in fp32; cpu has \S+ GiB free", told), told
    monkeypatch.setattr(memory, "free_memory", lambda device: 2**30)
    for words_of in words.values():
        with pytest.raises(StoppedError):
            run(cli, words_of)
        told = " ".join("".join(capsys.readouterr()).split())
        assert "do not fit into 0 GiB: they stay in their files" in told
        with pytest.raises(StoppedError):
            run(cli, [*words_of, "--max-memory-gib", "1"])
    assert loaded == [False, False, True, False, True, False]


class StoppedError(Exception):
    """Nothing is loaded."""


def test_a_model_that_is_read_from_its_files_is_recorded_and_verified_alike(
    base: Path, adapter: Path, content: dict[str, Any], tmp_path: Path
) -> None:
    again = record(base, adapter, tmp_path, max_memory_gib=1e-9)
    found = json.loads(gzip.decompress(again.read_bytes()))
    assert found | {"made": None} == content | {"made": None}
    assert "--max-memory-gib" in found["made"]["command"]
    options: dict[str, Any] = {"model": str(base), "engines": ["torch"], "new_tokens": 2}
    one, other = (verify_adapter(adapter, **options, max_memory_gib=limit).engines[0] for limit in (None, 1e-9))
    assert other.model_copy(update={"seconds": one.seconds}) == one


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_verify_in_a_coarser_type_allows_for_its_noise(dtype: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    """The engine is PyTorch in float32."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"{line}{index}" for line in LINES for index in range(4)))
    options: dict[str, Any] = {"model": str(base), "engines": ["torch"], "prompts": prompts, "new_tokens": 4}
    report = verify_adapter(adapter, compute_dtype=dtype, **options)
    assert f"--compute-dtype {dtype}" in report.command
    (found,) = report.engines
    assert found.verdict == "as trained", found.reason
    assert found.base is not None
    assert found.base.rms > 1e-4
