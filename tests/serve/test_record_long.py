"""Long questions of a reference: keys and values of one model, continued by another."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from loraover.common.errors import ConfigError
from loraover_serve.judge.models import Model
from loraover_serve.judge.names import STALE, STALE_OF_ADAPTER, STALE_OF_BASE, STALE_OF_EARLIER, STALE_OF_LATER
from loraover_serve.judge.reference import UNIT, Reference, read_reference
from loraover_serve.verify import long as long_recorder
from loraover_serve.verify.long import PREFIX, TAILS, long_passes

from support.lines import Lines
from support.long_questions import LongCase
from support.recorded import ANSWER, record
from support.verified import save_adapter


@torch.inference_mode()
def logprobs(model: Any, tokens: list[int]) -> Any:
    return model(torch.tensor([tokens]), use_cache=False).logits[0, -1].log_softmax(-1)


def test_plain_rows_are_those_without_a_cache(long_case: LongCase) -> None:
    caches = long_case.caches
    assert (len(caches.questions), len(caches.places)) == (TAILS, TAILS * ANSWER)
    plain = AutoModelForCausalLM.from_pretrained(long_case.base).eval()
    expected = {True: [logprobs(plain, caches.read(place)) for place in range(len(caches.places))]}
    adapted = PeftModel.from_pretrained(plain, long_case.adapter).eval()
    expected[False] = [logprobs(adapted, caches.read(place)) for place in range(len(caches.places))]
    for is_base, model in ((True, caches.base), (False, caches.adapter)):
        for row, right in zip(model.rows, expected[is_base], strict=True):
            assert max(abs(value - float(right[i])) for i, value in row.items()) <= UNIT


def test_all_questions_have_one_beginning_and_different_ends(long_case: LongCase) -> None:
    prompts = [question.prompt for question in long_case.caches.questions]
    assert len({prompt[:PREFIX] for prompt in prompts}) == 1
    assert len(set(prompts)) == TAILS


def test_stale_rows_lie_between_the_two_models_that_read_and_wrote(long_case: LongCase) -> None:
    """One fault for each pair; a model on its own keys and values would be right, and is none of them."""
    caches = long_case.caches
    found = {each.fault: (each, right) for arm, right in long_case.right.items() for each in caches.variants[arm]}
    assert set(found) == {STALE_OF_BASE, STALE_OF_ADAPTER, STALE_OF_EARLIER, STALE, STALE_OF_LATER}
    moved = {fault: moves(model, right) for fault, (model, right) in found.items()}
    assert min(moved.values()) > 20 * UNIT, moved
    assert moved[STALE_OF_EARLIER] < moved[STALE_OF_BASE], "the earlier version has half of the adapter"
    assert min(moved[STALE_OF_EARLIER], moved[STALE_OF_LATER]) < moved[STALE], "half is of the other version"


def moves(one: Model, other: Model) -> float:
    return max(abs(row[i] - right[i]) for row, right in zip(one.rows, other.rows, strict=True) for i in row)


def test_an_older_checker_reads_the_file_without_the_section(long_case: LongCase) -> None:
    content = json.loads(gzip.decompress(long_case.recorded.read_bytes()))
    assert content.pop("schema_version") == 1
    older = Reference({name: value for name, value in content.items() if name != "caches"} | {"schema_version": 1})
    assert older.caches is None
    assert older.adapter == read_reference(long_case.recorded).adapter


def test_a_context_that_is_too_short_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"long: the long questions have \d+ tokens .* takes 128"):
        record(base, adapter, tmp_path, long=True)


def test_long_questions_are_recorded_by_default_where_they_take_seconds(
    long_case: LongCase, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def recorded(model: Path, mine: Path, **more: Any) -> tuple[bool, str]:
        path = record(model, mine, tmp_path, force=True, report=(lines := Lines()), **more)
        return read_reference(path).caches is not None, "\n".join(lines.lines)

    has_long, told = recorded(long_case.base, long_case.adapter)
    assert has_long
    assert "on keys and values of one another" in told
    has_long, told = recorded(long_case.base, long_case.adapter, long=False)
    assert not has_long
    assert "long questions" not in told, "nobody wants to hear of them"
    has_long, told = recorded(base, adapter)
    assert not has_long
    assert "leaving out long questions: long: the long questions have " in told
    monkeypatch.setattr(long_recorder, "MOST_S", 0.0)
    has_long, told = recorded(long_case.base, long_case.adapter)
    assert not has_long
    assert "leaving out long questions, since they would take " in told


def test_the_work_of_long_questions_grows_with_their_tokens() -> None:
    def passes(short: int, versions: int = 1, shared: int = 536) -> float:
        asked = [[0] * (shared + 12)] * TAILS, (), shared
        return long_passes(asked, ANSWER, versions, [[0] * short])

    assert passes(12) == pytest.approx(2 * passes(24 + ANSWER))
    assert passes(12, versions=2) > passes(12)
    assert passes(12, shared=5360) == pytest.approx((2 * 5360 + 8 * 16 * (ANSWER + 3)) / 16)


def test_an_earlier_version_has_other_weights(long_case: LongCase, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"earlier: .* has the weights of .*, expected those of an earlier version"):
        record(long_case.base, long_case.adapter, tmp_path, long=True, earlier=long_case.adapter)
    old = save_adapter(tmp_path / "old", long_case.base)
    for long in (None, False):
        with pytest.raises(ConfigError, match="earlier needs long, which is"):
            record(long_case.base, long_case.adapter, tmp_path, earlier=old, long=long)
