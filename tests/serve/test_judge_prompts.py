"""What is wrong with some prompts is found, and what is odd at single positions is not."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest

from loraover_serve.judge.limits import ADAPTER, FEW_AS_BASE
from loraover_serve.judge.names import CHANGED, INTERMITTENT, LEAKS
from loraover_serve.judge.reference import Reference

from support.drawn_reference import NOISE, POSITIONS, PROMPTS, DrawnServer, Fault, drawn_reference

FIFTH = PROMPTS // 5
FAULTS: dict[str, Fault] = {
    "absent": lambda draw, base, right: base,
    "halved": lambda draw, base, right: (base + right) / 2,
    "doubled": lambda draw, base, right: 2 * right - base,
    "negated": lambda draw, base, right: 2 * base - right,
    "garbage": lambda draw, base, right: right + draw.gauss(0, 3),
}


@pytest.fixture(scope="module")
def reference() -> Reference:
    return drawn_reference(random.Random(1))


@pytest.mark.parametrize("share", [FIFTH, 2 * FIFTH])
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_on_some_prompts_is_found(name: str, share: int, reference: Reference) -> None:
    draw = random.Random(2)
    wrong = set(draw.sample(range(PROMPTS), share))
    found = DrawnServer(reference, draw, wrong, FAULTS[name]).judged()
    assert found["verdict"] == "differs", found["reason"]
    if name == "absent":
        assert found["fault"] == INTERMITTENT
    elif share == FIFTH:
        assert found["reason"].startswith(f"the answers to {FIFTH} of {PROMPTS} prompts are wrong, and the others are")


@pytest.mark.parametrize("odd", [0, 1, FEW_AS_BASE])
def test_odd_positions_are_no_fault(odd: int, reference: Reference) -> None:
    """Positions whose tokens went to another expert, each in another prompt."""
    found = DrawnServer(reference, random.Random(3)).judged(places=[POSITIONS * prompt + 1 for prompt in range(odd)])
    assert found["verdict"] == "as trained", found["reason"]


def test_chance_alone_makes_no_fault(reference: Reference) -> None:
    """Wrong answers to fewer prompts may be odd ones."""
    found = DrawnServer(reference, random.Random(4), range(FEW_AS_BASE - 1), FAULTS["negated"]).judged()
    assert found["verdict"] == "as trained", found["reason"]


@pytest.mark.parametrize("odd", [0, 1, FEW_AS_BASE])
def test_odd_positions_in_a_mixed_batch_are_no_fault(odd: int, reference: Reference) -> None:
    places = [POSITIONS * prompt + 1 for prompt in range(odd)]
    server = DrawnServer(reference, random.Random(5))
    found = server.judged(adapter=lambda rows: server.odd(rows, places))
    assert found["verdict"] == "as trained", found["reason"]


LEAKS_INTO: dict[str, Sequence[int]] = {
    "all answers": range(POSITIONS * PROMPTS),
    "three prompts": range(FEW_AS_BASE * POSITIONS),
    "single answers": [POSITIONS * prompt for prompt in range(PROMPTS) if prompt % 4],
}


@pytest.mark.parametrize("places", LEAKS_INTO.values(), ids=LEAKS_INTO)
def test_a_leak_in_a_mixed_batch_is_found(places: Sequence[int], reference: Reference) -> None:
    """Some answers for the base model are the adapter's; the others are exactly those that it gives alone."""
    server = DrawnServer(reference, random.Random(6))
    found = server.judged(base=lambda rows: rows | {place: reference.adapter.rows[place] for place in places})
    assert (found["verdict"], found["fault"]) == ("differs", LEAKS), found["reason"]


def test_a_small_change_in_a_mixed_batch_is_found(reference: Reference) -> None:
    """The adapter's answers move by four times the noise of two computations, in every prompt."""
    server = DrawnServer(reference, random.Random(7))
    found = server.judged(adapter=lambda rows: server.odd(rows, range(len(rows)), 4 * math.sqrt(2) * NOISE))
    assert (found["verdict"], found["fault"]) == ("differs", CHANGED), found["reason"]


def test_a_reference_without_scaled_adapters_takes_a_line_between_none_and_all(reference: Reference) -> None:
    variants, reference.variants = reference.variants, {**reference.variants, ADAPTER: []}
    scaled = reference.scaled(0.25)
    reference.variants = variants
    row, base, adapter = scaled.rows[0], reference.base.rows[0], reference.adapter.rows[0]
    assert row == pytest.approx({i: 0.75 * base[i] + 0.25 * adapter[i] for i in base})
