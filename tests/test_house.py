"""The figures of docs/measure_house.py on a small made-up package, and its rule on the packages themselves."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[1] / "docs"

LOWER = '''"""A module below."""

import os

FOUND = "made.upper.far"
TABLE = {"near": "made.lower.near:find"}


def _once() -> str:
    """That which is used once."""
    # a comment
    return os.sep


def used() -> str:
    """Return what the helper returns."""
    name = _once()
    command = ["python", "-m", "made.upper.far"]

    return name + command[0]
'''


@pytest.fixture
def house(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(DOCS))
    sys.modules.pop("measure_house", None)
    return importlib.import_module("measure_house")


@pytest.fixture
def modules(house: Any, tmp_path: Path) -> list[Any]:
    for name, text in {
        "__init__.py": "",
        "lower/__init__.py": "",
        "lower/near.py": LOWER,
        "upper/__init__.py": "",
        "upper/far.py": "from made.lower.near import used\n",
    }.items():
        (tmp_path / "made" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "made" / name).write_text(text)
    found: list[Any] = house.read_modules(tmp_path, {"made": "made"})
    return found


def test_lines_and_functions_are_counted(house: Any, modules: list[Any]) -> None:
    (near,) = [module for module in modules if module.name == "made.lower.near"]
    assert house.line_kinds(near) == {
        "docstrings": 3, "blank": 7, "imports": 1, "code": 8, "comments": 1,
    }  # fmt: skip
    assert [house.body_lines(one) for one in house.functions(near)] == [1, 4]
    assert house.helpers_used_once(near) == ["_once"]
    assert [text.split()[0] for text in house.riddles(near)] == ["That"]


def test_words_that_commands_write_are_not_counted(house: Any, tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("two words <!-- begin one -->\n| 1 |\n<!-- end one --> three <!-- begin two -->")
    (tmp_path / "compatibility.md").write_text("written whole")
    assert [page.split() for page in house.own_words(tmp_path)] == [
        ["two", "words", "three", "<!--", "begin", "two", "-->"]
    ]


def test_tests_that_reach_inside_are_counted(house: Any, tmp_path: Path) -> None:
    (tmp_path / "test_made.py").write_text(
        "def test_private():\n    made._hidden()\n"
        "def test_patch(monkeypatch):\n    monkeypatch.setattr(made, 'name', 1)\n"
        "def test_public():\n    self._own, made._asdict(), made.__doc__, monkeypatch.setenv('A', '1')\n"
        "def helper():\n    made._hidden()\n"
    )
    assert house.reaching_tests(tmp_path) == ["test_private", "test_patch"]


def test_importers_are_found_by_statements_and_tables(house: Any, modules: list[Any]) -> None:
    found = house.importers(modules)
    assert found["made.lower.near"] == {"made.upper.far"}
    assert found["made.upper.far"] == {"made.lower.near"}


def test_a_text_that_names_a_module_above_is_found(house: Any, modules: list[Any]) -> None:
    layers = {"made": [["upper"], ["lower"]]}
    assert house.upward(modules, layers) == [("made.lower.near", "made.upper.far")]
    assert house.upward(modules, {"made": [["lower"], ["upper"]]}) == []


def test_no_text_of_ours_names_a_module_that_an_import_could_not_and_no_docstring_is_a_riddle(house: Any) -> None:
    ours = house.read_modules()
    assert house.upward(ours, house.read_layers()) == []
    assert {one.name: house.riddles(one) for one in ours if house.riddles(one)} == {}


@pytest.fixture
def walks(house: Any) -> Any:
    sys.modules.pop("walk_house", None)
    return importlib.import_module("walk_house")


def test_a_walk_counts_files_climbs_and_returns(walks: Any) -> None:
    layers = {"": [["made"]], "made": [["upper"], ["lower"]]}
    steps = [("made.upper.a", "made.lower.b"), ("made.lower.b", "made.upper.c"), ("made.upper.c", "made.lower.b")]
    assert walks.count(steps, layers) == (3, 1, 1)


def test_steps_between_modules_of_ours_are_heard_through_others(walks: Any, modules: list[Any], tmp_path: Path) -> None:
    steps = walks.Steps(tmp_path, {"made": "made"})
    sys.path.insert(0, str(tmp_path))
    from made.upper.far import used  # type: ignore[import-not-found]

    text = "def go(used):\n    return list(map(lambda _: used(), [1, 2]))\n"
    (tmp_path / "made/upper/again.py").write_text(text)
    (tmp_path / "made/upper/early.py").write_text(
        "from made.lower.near import used\n\n\nclass Declared:\n    field = used()\n"
    )
    code = compile((tmp_path / "made/upper/again.py").read_text(), str(tmp_path / "made/upper/again.py"), "exec")
    names: dict[str, Any] = {}
    exec(code, names)  # noqa: S102
    sys.setprofile(steps.heard)
    try:
        importlib.import_module("made.upper.early")  # whose calls are no steps
        names["go"](used)
    finally:
        sys.setprofile(None)
        sys.path.remove(str(tmp_path))
        for name in [each for each in sys.modules if each.partition(".")[0] == "made"]:
            del sys.modules[name]
    assert list(steps.found) == [("made.upper.again", "made.lower.near")]
