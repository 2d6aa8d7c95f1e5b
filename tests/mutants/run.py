"""Run the tests of a mutant in a copy of the tree, and judge what they show."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import click

from mutants.mutant import Mutant, Outcome, Selection, Verdict

PACKAGES = ("loraover", "export", "serve", "lab")
COPIED = (*PACKAGES, "tests", "docs", "pyproject.toml")
LIMIT_S = 600.0
UNLOADABLE = re.compile(r"^E +(ImportError|ModuleNotFoundError|NameError|SyntaxError)\b|ERROR collecting", re.MULTILINE)
FAILED = re.compile(r"^(?:FAILED|ERROR) \S+?::(.+?)(?: - .*)?$", re.MULTILINE)


def product_files(root: Path) -> list[Path]:
    """Every module of the packages."""
    return [path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))]


def place_of(mutant: Mutant, texts: Mapping[Path, str]) -> Path:
    """The one file that holds the mutant's source."""
    found = [path for path, text in texts.items() for _ in range(text.count(mutant.old))]
    if len(found) != 1:
        raise ValueError(f"its source occurs {len(found)} times, expected once")
    return found[0]


def file_of(tests: Selection, root: Path) -> Path:
    """The file that holds the tests."""
    found = list((root / "tests").rglob(tests.file))
    if len(found) != 1:
        raise ValueError(f"{len(found)} files are named {tests.file}, expected one")
    return found[0]


@contextmanager
def copied(root: Path) -> Iterator[Path]:
    """A copy of the product and its tests, for the time of a block."""
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*")
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy = Path(folder)
        for name in COPIED:
            if (root / name).is_dir():
                shutil.copytree(root / name, copy / name, ignore=ignored)
            else:
                shutil.copy(root / name, copy)
        yield copy


def run_tests(copy: Path, tests: Selection) -> tuple[int, str]:
    """pytest's exit code in a copy, and its output."""
    ours = os.pathsep.join(str(copy / name) for name in (".", *PACKAGES[1:]))
    environment = {name: value for name, value in os.environ.items() if name != "LORAOVER_COMPATIBILITY"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [ours, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-o", "addopts="]
    command += ["--hypothesis-seed=0", str(file_of(tests, copy))] + (["-k", tests.only] if tests.only else [])
    try:
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        raise ValueError(f"its tests have not ended after {LIMIT_S:g} s") from None
    return done.returncode, done.stdout + done.stderr


def judge(code: int, output: str) -> tuple[Outcome, str]:
    """Outcome and note of a run of pytest."""
    if code not in (0, 1):
        return "broken", "no test was selected" if code == 5 else f"pytest ended with exit code {code}"
    if unloadable := UNLOADABLE.search(output):
        return "broken", f"a module does not load: {unloadable[1] or 'see pytest'}"
    if code == 1:
        failed = FAILED.search(output)
        return "killed", failed[1] if failed else "pytest names no test"
    return ("survived", "") if re.search(r"\d passed", output) else ("broken", "every selected test was skipped")


def attempt(root: Path, tests: Selection, mutant: Mutant | None = None) -> Verdict:
    """Run tests in a copy of the tree, with a mutant planted or as it is: then, to survive is to pass."""
    started = time.perf_counter()
    outcome: Outcome
    try:
        with copied(root) as copy:
            if mutant is not None:
                texts = {path: path.read_text(encoding="utf-8") for path in product_files(copy)}
                place = place_of(mutant, texts)
                place.write_text(texts[place].replace(mutant.old, mutant.new), encoding="utf-8")
            outcome, note = judge(*run_tests(copy, tests))
    except ValueError as error:
        outcome, note = "broken", str(error)
    name = f"{tests.file} -k {tests.only!r}" if mutant is None else mutant.name
    return Verdict(name, outcome, time.perf_counter() - started, note)


def failing_without_mutant(root: Path, selections: Iterable[Selection], jobs: int) -> dict[Selection, str]:
    """Tests that do not pass on the tree as it is, with the reason; a mutant that they kill shows nothing."""
    found = {}
    chosen = list(dict.fromkeys(selections))
    with ThreadPoolExecutor(jobs) as pool:
        for tests, verdict in zip(chosen, pool.map(partial(attempt, root), chosen), strict=True):
            passed = verdict.outcome == "survived"
            click.echo(f"{'passed' if passed else 'FAILED':9}{verdict.seconds:6.1f} s  {verdict.name}")
            if not passed:
                found[tests] = verdict.note
    return found


def try_mutants(root: Path, mutants: Sequence[Mutant], jobs: int, failing: Mapping[Selection, str]) -> list[Verdict]:
    """Try each mutant and show what became of it."""

    def verdict_on(mutant: Mutant) -> Verdict:
        if mutant.tests in failing:
            return Verdict(mutant.name, "broken", 0.0, f"its tests fail without it: {failing[mutant.tests]}")
        return attempt(root, mutant.tests, mutant)

    verdicts = []
    with ThreadPoolExecutor(jobs) as pool:
        for verdict in pool.map(verdict_on, mutants):
            click.echo(f"{verdict.outcome:9}{verdict.seconds:6.1f} s  {verdict.name:45}  {verdict.note}")
            verdicts.append(verdict)
    return verdicts
