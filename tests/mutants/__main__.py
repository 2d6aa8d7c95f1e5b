"""The command `python -m mutants`."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import click

from mutants import MUTANTS, ROOT
from mutants.run import copied, failing_without_mutant, try_mutants


@click.command()
@click.argument("names", nargs=-1)
@click.option("--list", "is_list", is_flag=True, help="Show the mutants and their tests, and run nothing.")
@click.option("--baseline", is_flag=True, help="First run each selection of tests once without a mutant.")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Number of mutants at a time.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="File for the verdicts.")
def main(names: tuple[str, ...], is_list: bool, baseline: bool, jobs: int, file: Path | None) -> None:
    """Plant the mutants of these NAMES, or all of them; exit with 0 if every one was killed."""
    if unknown := set(names) - {mutant.name for mutant in MUTANTS}:
        raise click.UsageError(f"no such mutant: {', '.join(sorted(unknown))}; see --list.")
    chosen = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    if is_list:
        for mutant in chosen:
            click.echo(f"{mutant.name:45}  {mutant.tests.file} {mutant.tests.only}")
        return
    with copied(ROOT) as root:
        failing = failing_without_mutant(root, (mutant.tests for mutant in chosen), jobs) if baseline else {}
        verdicts = try_mutants(root, chosen, jobs, failing)
    if file is not None:
        file.write_text(json.dumps([asdict(verdict) for verdict in verdicts], indent=1) + "\n", encoding="utf-8")
    counts = Counter(verdict.outcome for verdict in verdicts)
    seconds = sum(verdict.seconds for verdict in verdicts)
    click.echo(
        f"{counts['killed']} of {len(verdicts)} killed, {counts['survived']} survived, {counts['broken']} broken; "
        f"{seconds:.0f} s of tests"
    )
    sys.exit(0 if counts["killed"] == len(verdicts) else 1)


if __name__ == "__main__":
    main()
