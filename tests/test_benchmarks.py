"""The runner of `make bench`: what it writes into the page, and what it leaves."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.table import Table

from loraover.common.errors import ConfigError

from benchmarks import __main__ as runner
from benchmarks import clock, plugin
from benchmarks.__main__ import BENCHMARKS, BenchmarkError, Measured, run_benchmarks
from benchmarks.intervals import median_ratio
from benchmarks.page import PAGE, Origin, check_markers, find_origin, replaced
from benchmarks.shown import Plot, to_markdown

TEXT = """# Results

Words before.

<!-- begin first -->
old figures
<!-- end first -->

Words between.

<!-- begin second -->
<!-- end second -->
"""
ORIGIN = Origin("abc1234", True, date(2026, 11, 26), "a processor, 2 cores", {"torch": "2.13"})


def git(folder: Path, *words: str) -> None:
    identity = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org"]
    subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """A page in a git checkout."""
    file = tmp_path / "docs" / "results.md"
    file.parent.mkdir()
    file.write_text(TEXT)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "Begin")
    return file


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "find_origin", lambda page: ORIGIN)


def found(*parts: str | Plot, gpu: str | None = None) -> Callable[[str], Measured]:
    return lambda name: Measured([part.format(name=name) if isinstance(part, str) else part for part in parts], gpu)


@pytest.mark.usefixtures("fixed")
def test_tables_and_their_origin_stand_between_the_markers(page: Path) -> None:
    assert run_benchmarks(["first", "second"], page, found("table of {name}", "another")) == []
    line = "*Measured at commit abc1234, 2026-11-26: a processor, 2 cores; torch 2.13.*"
    first = f"<!-- begin first -->\n{line}\n\ntable of first\n\nanother\n<!-- end first -->"
    second = first.replace("first", "second")
    assert page.read_text() == f"# Results\n\nWords before.\n\n{first}\n\nWords between.\n\n{second}\n"


@pytest.mark.usefixtures("fixed")
def test_a_plot_is_a_file_beside_the_page(page: Path) -> None:
    run_benchmarks(["second"], page, found(Plot("curve", "A curve.", "<svg/>")))
    assert (page.parent / "results" / "curve.svg").read_text() == "<svg/>"
    assert "![A curve.](results/curve.svg)" in page.read_text()
    assert sorted(path.name for path in page.parent.iterdir()) == ["results", "results.md"]


@pytest.mark.usefixtures("fixed")
def test_a_benchmark_that_fails_leaves_its_old_table(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def measure(name: str) -> Measured:
        if name == "first":
            raise BenchmarkError("its process ended with exit code 1")
        return Measured(["new figures"], None)

    assert run_benchmarks(["first", "second"], page, measure) == ["first"]
    assert "first failed: its process ended with exit code 1" in capsys.readouterr().err
    assert "<!-- begin first -->\nold figures\n<!-- end first -->" in page.read_text()
    assert "new figures\n<!-- end second -->" in page.read_text()


def test_a_fresh_process_hands_over_its_tables_and_plots(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plot, table = Plot("curve", "A curve.", "<svg/>"), Table("ratio to a peer [95 %]", title="Shown at once")
    monkeypatch.setitem(sys.modules, "benchmarks.fake", SimpleNamespace(measure=lambda: iter((table, plot))))

    def child(command: list[str], cwd: Path) -> SimpleNamespace:
        assert command[1:-1] == ["-m", "benchmarks", "--only", "fake", "--into"]
        assert cwd == Path(__file__).parent
        runner.measure_here("fake", Path(command[-1]))
        return SimpleNamespace(returncode=exit_code)

    monkeypatch.setattr(runner, "subprocess", SimpleNamespace(run=child))
    exit_code = 0
    assert runner.measure_in_process("fake") == Measured([to_markdown(table), plot], None)
    assert "Shown at once" in capsys.readouterr().out
    exit_code = -9
    with pytest.raises(BenchmarkError, match="its process ended with exit code -9"):
        runner.measure_in_process("fake")


@pytest.mark.parametrize(
    ("broken", "counts"),
    [
        (TEXT.replace("<!-- end first -->", ""), "found 1 and 0"),
        (TEXT.replace("begin first", "begin"), "found 0 and 1"),
        (TEXT + TEXT, "found 2 and 2"),
        (
            TEXT.replace("begin first", "X").replace("end first", "begin first").replace("X", "end first"),
            "found 1 and 1",
        ),
    ],
)
def test_a_page_without_a_marker_is_refused_before_anything_is_measured(page: Path, broken: str, counts: str) -> None:
    page.write_text(broken)
    measured: list[str] = []
    with pytest.raises(ConfigError, match=counts) as refused:
        run_benchmarks(["second", "first"], page, lambda name: measured.append(name) or Measured([], None))  # type: ignore[func-returns-value]
    assert "Mend the page, or use --no-write" in str(refused.value)
    assert (measured, page.read_text()) == ([], broken)


def test_a_tree_is_dirty_by_others_than_the_page(page: Path) -> None:
    root = page.parents[1]
    page.write_text(TEXT + "more")
    (page.parent / "results").mkdir()
    (page.parent / "results" / "curve.svg").write_text("<svg/>")
    assert find_origin(root, page).is_clean
    (root / "code.py").touch()
    origin = find_origin(root, page)
    assert not origin.is_clean
    assert " with uncommitted changes, " in origin.line(None)


def test_the_page_has_a_place_for_every_benchmark() -> None:
    check_markers(BENCHMARKS)
    text = PAGE.read_text()
    assert replaced(text, BENCHMARKS[0], "") != text


def test_a_table_in_markdown_has_what_the_terminal_shows() -> None:
    table = Table(title="Times [95 %]", caption="A note.")
    table.add_column("")
    table.add_column("ratio", justify="right")
    table.add_row("[bold]a|b[/]", "1.00 [0.9, 1.1]")
    assert to_markdown(table).splitlines() == [
        "**Times [95 %]**",
        "",
        "|  | ratio |",
        "| --- | ---: |",
        "| a\\|b | 1.00 [0.9, 1.1] |",
        "",
        "A note.",
    ]


def test_a_device_is_waited_for_before_and_after_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    ticks = iter((1.0, 1.5, 4.0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append("wait"))
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    taken = clock.timed(lambda: events.append("work"), torch.device("cuda"))
    assert (events, taken) == (["wait", "work", "wait"], (0.5, 3.0))


def test_ratios_are_those_of_pairs() -> None:
    slow = [1.0, 10.0, 100.0, 1.0, 10.0, 100.0]
    assert median_ratio([1.02 * s for s in slow], slow).shown() == "1.02 [1.02, 1.02]"


def test_a_cold_adapter_is_told_apart_from_the_load_alone() -> None:
    assert all(order.index(plugin.PREPARING) < order.index(plugin.LOADING) for order in plugin.ORDERS)
    assert {frozenset(order) for order in plugin.ORDERS} == {frozenset(plugin.ORDERS[0])}
    alone, cold = plugin.Sample(0.02, 15.0), plugin.Sample(0.5, 16.0, answer_s=4.0, prepare_s=3.0)
    found = {name: [cold if name == plugin.COLD else alone] * plugin.ROUNDS for name in plugin.ORDERS[0]}
    rows = to_markdown(plugin.to_table(found, "setting")).splitlines()[4:6]
    assert rows == [
        "| nothing | 20 ms | 1.00 [1.00, 1.00] | 15.0 s |  |  |  |",
        "| first request, never prepared | 500 ms | 25.00 [25.00, 25.00] | 16.0 s | 4.0 s | 3.0 s | 1.0 s |",
    ]
