"""Print how the code of the packages is cut into modules and functions, and how much of it is code.

    python docs/measure_house.py

Lines are counted from the syntax tree: every line of a product module is blank, a comment, part of a docstring or of an
import, or code.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "loraover": "loraover",
    "loraover_export": "export/loraover_export",
    "loraover_serve": "serve/loraover_serve",
    "loraover_lab": "lab/loraover_lab",
}
WRITTEN_PAGES = ("compatibility.md", "faults.md", "servers-in-motion.md")
"""Pages of the docs that commands write; their words are not counted."""
WRITTEN_PART = re.compile(r"<!-- begin (\w+) -->.*?<!-- end \1 -->", re.DOTALL)
"""Part of a page that a command writes or prints; its words are not counted."""
PATCHES = ("monkeypatch.setattr", "mock.patch", "patch.object")
"""Functions that replace a name of a module or a class in a test."""
PUBLIC = ("_asdict", "_replace", "_fields", "_getframe", "_exit")
"""Names with an underscore that Python documents."""
RIDDLES = ("What ", "One ", "Those ", "That ")
"""First words that name no noun; no docstring may begin with them."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Module(NamedTuple):
    """A module of ours: its dotted name, text and syntax tree."""

    name: str
    text: str
    tree: ast.Module


def read_modules(root: Path = ROOT, packages: Mapping[str, str] = PACKAGES) -> list[Module]:
    """Read every module of the packages."""
    found = []
    for package, folder in packages.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = [package, *path.relative_to(root / folder).with_suffix("").parts]
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            text = path.read_text(encoding="utf-8")
            found.append(Module(name, text, ast.parse(text)))
    return found


def line_kinds(module: Module) -> Counter[str]:
    """Count the lines of a module that are code, docstrings, imports, comments or blank."""
    kinds = dict.fromkeys(range(1, len(module.text.splitlines()) + 1), "code")
    for number, line in enumerate(module.text.splitlines(), 1):
        if not line.strip():
            kinds[number] = "blank"
        elif line.lstrip().startswith("#"):
            kinds[number] = "comments"
    for node in ast.walk(module.tree):
        kind = (
            "docstrings" if is_docstring(node) else "imports" if isinstance(node, ast.Import | ast.ImportFrom) else ""
        )
        if kind:
            assert isinstance(node, ast.stmt)
            kinds |= dict.fromkeys(range(node.lineno, (node.end_lineno or node.lineno) + 1), kind)
    return Counter(kinds.values())


def is_docstring(node: ast.AST) -> bool:
    """Whether a statement is a text alone: a docstring of a module, class, function or name."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def functions(module: Module) -> Iterator[Function]:
    """Functions and methods of a module, those inside others too."""
    return (node for node in ast.walk(module.tree) if isinstance(node, Function))


def body_lines(function: Function) -> int:
    """Lines of a function below its signature and docstring."""
    body = function.body[1:] if is_docstring(function.body[0]) else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def helpers_used_once(module: Module) -> list[str]:
    """Private functions of a module whose name occurs once in it beside the definition."""
    words = Counter(re.findall(r"\b_\w+", module.text))
    names = Counter(function.name for function in functions(module))
    return [
        n for n, number in names.items() if n.startswith("_") and not n.endswith("__") and number == 1 and words[n] == 2
    ]


def importers(modules: list[Module]) -> dict[str, set[str]]:
    """Modules of ours that import each module, by statements or by the names in lazy tables."""
    names = {module.name for module in modules}
    found: dict[str, set[str]] = {name: set() for name in names}
    for module in modules:
        for imported in {*imported_names(module), *named_in_strings(module, names)}:
            while imported and imported not in names:
                imported = imported.rpartition(".")[0]
            if imported and imported != module.name:
                found[imported].add(module.name)
    return found


def imported_names(module: Module) -> Iterator[str]:
    """Dotted names that a module's import statements name."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def named_in_strings(module: Module, names: set[str]) -> Iterator[str]:
    """Modules of ours that a text in the code names, alone or as in "module:name".

    Docstrings are left out, and modules that another process runs, as in [sys.executable, "-m", "loraover.cli"].
    """
    spoken = {id(node.value) for node in ast.walk(module.tree) if is_docstring(node) and isinstance(node, ast.Expr)}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.List):
            words = [word.value if isinstance(word, ast.Constant) else None for word in node.elts]
            spoken |= {id(after) for word, after in zip(words, node.elts[1:], strict=False) if word == "-m"}
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in spoken:
            name = node.value.partition(":")[0]
            if name in names and ("." in name or ":" in node.value):
                yield name


def upward(modules: list[Module], layers: Mapping[str, list[list[str]]]) -> list[tuple[str, str]]:
    """Pairs of a module and one that a text in it names, where the rooms' layers forbid the import.

    Args:
        modules: All modules.
        layers: By package, its rooms from the highest row to the lowest; under "" the packages themselves.
    """
    names = {module.name for module in modules}
    found = []
    for module in modules:
        for named in sorted(set(named_in_strings(module, names))):
            of, to = module.name.split("."), named.split(".")
            place = "" if of[0] != to[0] else of[0]
            here, there = (of[0], to[0]) if not place else ((*of, "")[1], (*to, "")[1])
            if here != there and row(layers[place], there) <= row(layers[place], here):
                found.append((module.name, named))
    return found


def row(layers: list[list[str]], room: str) -> int:
    """Row of a room, 0 at the top; a module that is no room lies above all."""
    return next((number for number, rooms in enumerate(layers) if room in rooms), -1)


def read_layers(root: Path = ROOT) -> dict[str, list[list[str]]]:
    """Layers of the contracts in pyproject.toml: of the packages under "", of each package's rooms under its name."""
    contracts = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    return {
        "" if contract["id"] == "stages" else contract["containers"][0]: [
            [room.strip() for room in each.split("|")] for each in contract["layers"]
        ]
        for contract in contracts
        if contract["id"] == "stages" or (contract.get("exhaustive") and "." not in contract["containers"][0])
    }


def riddles(module: Module) -> list[str]:
    """Docstrings that begin with a word of `RIDDLES`."""
    documented = ast.Module | ast.ClassDef | Function
    found = (ast.get_docstring(node) for node in ast.walk(module.tree) if isinstance(node, documented))
    return [text for text in found if text and text.startswith(RIDDLES)]


def reaches_inside(test: Function) -> bool:
    """Whether a test touches a private name of something else, or patches a name."""
    for node in ast.walk(test):
        if isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr) and node.attr not in PUBLIC:
            if not isinstance(node.value, ast.Name) or node.value.id not in ("self", "cls", "os", "sys"):
                return True
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(PATCHES):
            return True
    return False


def reaching_tests(tests: Path) -> list[str]:
    """Names of the tests that `reaches_inside` is true of."""
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in tests.rglob("test_*.py"))
    found = (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    return [test.name for test in found if test.name.startswith("test_") and reaches_inside(test)]


def own_words(docs: Path) -> Iterator[str]:
    """Text of each page of the docs, without what commands write."""
    for path in docs.rglob("*.md"):
        if path.name not in WRITTEN_PAGES:
            yield WRITTEN_PART.sub("", path.read_text(encoding="utf-8"))


def measure(root: Path = ROOT) -> dict[str, str]:
    """Figures of the table, by what they count."""
    modules = read_modules(root)
    kinds = sum((line_kinds(module) for module in modules), Counter())
    bodies = [body_lines(function) for module in modules for function in functions(module)]
    lines = [len(path.read_text(encoding="utf-8").splitlines()) for path in (root / "tests").rglob("*.py")]
    words = [len(page.split()) for page in own_words(root / "docs")]
    return {
        "product lines": f"{kinds.total():,}",
        **{f"of these {kind}": f"{kinds[kind]:,}" for kind in ("code", "docstrings", "blank", "imports", "comments")},
        "modules": f"{len(modules)}",
        "functions, mean body (median)": f"{mean(bodies):.1f} ({median(bodies):.0f})",
        "private helpers used once in their own file": f"{sum(len(helpers_used_once(m)) for m in modules)}",
        "modules with one importer": f"{sum(len(each) == 1 for each in importers(modules).values())}",
        "modules named in texts where an import is forbidden": f"{len(upward(modules, read_layers(root)))}",
        "docstrings that begin with What, One, Those, That": f"{sum(len(riddles(m)) for m in modules)}",
        "test lines": f"{sum(lines):,}",
        "tests that touch private names or patch": f"{len(reaching_tests(root / 'tests'))}",
        "words of the docs, without what commands write": f"{sum(words):,}",
    }


if __name__ == "__main__":
    for name, figure in measure().items():
        print(f"{name:<55} {figure:>12}")
