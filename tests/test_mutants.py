"""The table of mutants: every entry can be planted and has tests; whether they kill it is asked by hand."""

from __future__ import annotations

import re

import pytest

from mutants import MUTANTS, ROOT, file_of, judge, place_of, product_files

TESTS = re.compile(r"^ *(?:def (?=test)|class (?=Test))(\w+)", re.MULTILINE)


def test_every_mutant_has_its_own_name() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) > 50


def test_every_source_occurs_exactly_once() -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in product_files(ROOT)}
    assert len(texts) > 100
    for mutant in MUTANTS:
        assert mutant.new != mutant.old
        compile(texts[place_of(mutant, texts)].replace(mutant.old, mutant.new), mutant.name, "exec")


def test_every_mutant_has_tests() -> None:
    for mutant in MUTANTS:
        tests = TESTS.findall(file_of(mutant.tests, ROOT).read_text(encoding="utf-8"))
        words = set(re.findall(r"\w+", mutant.tests.only)) - {"and", "or", "not"}
        lost = [word for word in words if not any(word in name for name in tests)]
        assert lost == [], mutant.name


@pytest.mark.parametrize(
    ("code", "output", "outcome"),
    [
        (0, "1 passed, 5 deselected in 2.10s", "survived"),
        (0, "3 skipped in 2.10s", "broken"),
        (1, "FAILED tests/train/test_a.py::test_b[c] - assert 1 == 2", "killed"),
        (1, "ERROR tests/train/test_a.py::test_b - ConfigError: made by a fixture", "killed"),
        (1, "E   ImportError: cannot import name 'holm'", "broken"),
        (1, "____ ERROR collecting tests/train/test_a.py ____", "broken"),
        (5, "7 deselected in 0.10s", "broken"),
        (4, "ERROR: file or directory not found", "broken"),
    ],
)
def test_a_run_that_shows_nothing_is_broken(code: int, output: str, outcome: str) -> None:
    assert judge(code, output)[0] == outcome
