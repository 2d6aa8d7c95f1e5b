"""Run cases for a time, print how they covered kinds, bases and options, and keep those that fail.

cd tests && FUZZ_SECONDS=3600 ../.venv/bin/python -m fuzz [--first SEED] [--no-keep]
"""

from __future__ import annotations

import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import torch
from transformers.utils import logging

from fuzz.cases import BASES, CONVERTED, Case, draw
from fuzz.run import Result, keep, run, signature, simplest


def run_for(seconds: float, first: int, bases: Path, without: str = "") -> Iterator[tuple[Case, Result]]:
    """Yield cases of successive seeds and their results, for a time; `without` is a verb to leave out."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    end = time.monotonic() + seconds
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in count(first):
            if time.monotonic() > end:
                return
            case = draw(seed)
            if case.verb != without:
                yield case, run(case, bases)


@click.command()
@click.option("--seconds", envvar="FUZZ_SECONDS", default=3600.0, show_default=True, help="Seconds to run.")
@click.option("--first", default=None, type=int, help="Seed of the first case; the clock gives it otherwise.")
@click.option("--keep/--no-keep", "is_kept", default=True, help="Add the cases that fail to the regressions.")
def main(seconds: float, first: int | None, is_kept: bool) -> None:
    """Exit with 1 if a case failed."""
    torch.set_num_threads(1)
    first = int(time.time()) if first is None else first
    covered: Counter[tuple[str, str]] = Counter()
    outcomes: Counter[str] = Counter()
    causes: Counter[tuple[str, ...]] = Counter()
    with TemporaryDirectory() as bases:
        for case, result in run_for(seconds, first, Path(bases)):
            outcomes[result.outcome] += 1
            if result.outcome in ("agrees", "fault"):
                covered.update([("kind", case.kind), ("base", case.base), ("verb", case.verb)])
                covered["pair", f"{case.kind} on {case.base}"] += 1
                covered.update(("option", key) for key in [*case.options, *case.edits])
            if result.outcome == "fault":
                fewer = simplest(case, result.cause, Path(bases))
                causes[signature(fewer, result)] += 1
                if causes[signature(fewer, result)] == 1:
                    click.echo(f"seed {case.seed}: {result.found}\n  {fewer}")
                    if is_kept:
                        keep(fewer)
    for part in ("kind", "base", "verb", "option"):
        names = [f"{name} {n}" for (of, name), n in sorted(covered.items()) if of == part]
        click.echo(f"{part}s compared: {', '.join(names)}")
    pairs = [name for of, name in covered if of == "pair"]
    click.echo(f"{len(pairs)} of {len(CONVERTED) * len(BASES)} pairs of a convertible kind and a base compared")
    click.echo(f"{outcomes.total()} cases from seed {first}: {dict(outcomes)}; {len(causes)} causes of faults")
    sys.exit(1 if causes else 0)


if __name__ == "__main__":
    main()
