"""Outcome for each of many adapters, and its table for a terminal and as an HTML page, which sorts and filters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Literal, get_args

from pydantic import Field
from rich.console import Console

from loraover.common.provenance import environment, today
from loraover.common.strict_json import StrictModel
from loraover.reporting import html_page
from loraover.reporting.palette import terminal_color, tone_of
from loraover.reporting.reporter import print_line
from loraover.reporting.table import Column, Table

Verdict = Literal["right", "prepared", "right as exported", "right on some", "refused", "failed"]
"""Verdicts on an adapter, the best first."""
Form = Literal["as it is", "as exported", "in no form"]
WORDS = {"right as exported": "export", "right on some": "some"}
"""Short forms of long verdicts, for tables on a terminal."""
KEY = (
    "right: as it is; export: right only as exported; refused or wrong: in both forms, wrong without a message; "
    "some: right on some engines"
)
TEMPLATE, SCRIPT = "fleet.html.j2", "fleet.js"
HEADS = {"right as exported": "all of them, some only as exported", "right on some": "not on every engine"}
"""Heads of the page by the worst verdict, where every adapter can be served."""
PACKAGES = ("loraover", "torch", "transformers")
SERVED: tuple[Verdict, ...] = ("right", "prepared", "right as exported", "right on some")


class FleetRow(StrictModel):
    """Adapter of a fleet."""

    source: str = Field(description="The adapter, as it was named, without secrets")
    address: str = Field(description="Text that names the same files again, such as a hub name with its commit")
    verdict: Verdict = Field(
        description="Right: every engine is right on the adapter as it is; right as exported: some are so only on what "
        "the export writes; right on some: some are right on no form; refused: the adapter is the reason; failed: it "
        "could not be examined, and may be another time"
    )
    kind: str | None = Field(None, description="PEFT's name of the method")
    rank: int | None = Field(None, description="Largest rank of a module, of what was prepared if anything was")
    error: float | None = Field(None, description="Bound of the relative error of what was prepared")
    done: str = Field("", description="What was done, or what fixes the adapter, in words")
    reason: str = Field("", description="Why the verdict is not better, a line for each reason")
    engines: Mapping[str, str] = Field(
        default_factory=dict, description="Verdict of a check for each engine, on the adapter as it is"
    )
    exported: Mapping[str, str] = Field(default_factory=dict, description="Verdicts on what the export for each writes")
    path: str | None = Field(None, description="What the engine loads, in the cache")
    cached: bool = Field(False, description="Whether the cache held it already")
    seconds: float = Field(0.0, description="Time that this adapter took")

    def served(self, engine: str) -> Form:
        """Return in which form an engine that was asked for is right on the adapter."""
        if self.engines[engine] == "right":
            return "as it is"
        return "as exported" if self.exported.get(engine) == "right" else "in no form"

    @property
    def told(self) -> str:
        """Work that was done, in words."""
        return "; ".join(text for text in (self.done, "from the cache" if self.cached else "") if text)


class FleetReport(StrictModel):
    """Result for all adapters that were checked or prepared."""

    schema_version: Literal[1] = 1
    rows: Sequence[FleetRow] = Field(description="The adapters, in the order in which they were named")
    seconds: float = Field(description="Total time, in seconds")

    @property
    def passed(self) -> bool:
        """Whether every adapter can be served, as it is or as exported."""
        return all(row.verdict in SERVED for row in self.rows)

    @property
    def verdict(self) -> Verdict:
        """The worst verdict of an adapter."""
        return max((row.verdict for row in self.rows), key=get_args(Verdict).index)

    @property
    def exit_code(self) -> int:
        """Exit code of the command: 0 if every adapter can be served, else 1."""
        return 0 if self.passed else 1

    @property
    def engines(self) -> list[str]:
        """Engines that were checked."""
        return list(dict.fromkeys(engine for row in self.rows for engine in row.engines))

    def counts(self) -> str:
        """Return the number of adapters with each verdict, in words."""
        return ", ".join(f"{number} {verdict}" for verdict, number in Counter(row.verdict for row in self.rows).items())


def show_row(row: FleetRow, progress: str, console: Console) -> None:
    """Print in one line that an adapter is done, and how far the work is."""
    print_line(console, f"{progress}: {row.verdict}: {row.source}", terminal_color(row.verdict))


def show_report(report: FleetReport, console: Console) -> None:
    """Print a table with a line for each adapter, the reasons below it, and how many adapters have each verdict."""
    engines = report.engines

    def found(row: FleetRow, engine: str) -> str:
        """Return what an engine does with an adapter, or that it is right on its exported form only."""
        if engine in row.engines and row.served(engine) == "as exported":
            return "right as exported"
        return row.engines.get(engine, "")

    def column(engine: str) -> Column[FleetRow]:
        return Column(
            engine,
            lambda row: WORDS.get(found(row, engine), found(row, engine).partition(" ")[0]),
            "verdict",
            verdict=lambda row: found(row, engine),
        )

    last: Column[FleetRow] = Column("error", lambda row: "" if row.error is None else f"{row.error:.2g}")
    columns: list[Column[FleetRow]] = [
        Column("verdict", lambda row: WORDS.get(row.verdict, row.verdict), "verdict", verdict=lambda row: row.verdict),
        Column("adapter", lambda row: row.source, "name"),
        *(map(column, engines) if engines else [last]),
    ]
    console.print(Table(columns, report.rows))
    if engines:
        print_line(console, KEY)
    for row in report.rows:
        facts = [row.kind, None if row.rank is None else f"rank {row.rank}", row.told]
        told = ", ".join(fact for fact in facts if fact)
        lines = [line for line in row.reason.split("\n") if line]
        print_line(console, "\n  ".join((f"{row.source}: {told or row.verdict}", *lines)))
    text = f"{report.counts()}, of {len(report.rows)} adapters in {report.seconds:.1f} s"
    print_line(console, text, terminal_color(report.verdict))


def to_page(report: FleetReport, command: str) -> html_page.Page:
    """Make the page, with the command line that makes it again; every text is escaped."""
    room = files(__package__)
    number, versions = len(report.rows), environment()
    lines = [f"Of {number} adapter{'s' * (number != 1)}: {report.counts()}."]
    for engine in report.engines:
        forms = Counter(row.served(engine) for row in report.rows if engine in row.engines)
        found = ", ".join(
            f"{forms[form]} {form.replace('it is', 'they are')}" for form in get_args(Form) if forms[form]
        )
        silent = sum(row.engines.get(engine) == "wrong silently" for row in report.rows)
        lines.append(f"{engine}: right on {found}.{f' {silent} would be silently wrong as they are.' * bool(silent)}")
    return html_page.make_page(
        room.joinpath(TEMPLATE).read_text(encoding="utf-8"),
        title="Fleet of adapters",
        heading="Can these adapters be served?",
        verdict=html_page.Verdict(
            tone_of(report.verdict) if report.passed else "bad",
            HEADS.get(report.verdict, "all of them") if report.passed else "not all of them",
            "\n".join(lines),
        ),
        facts={"time": f"{report.seconds:.0f} s"},
        origin=html_page.Origin(command, today(), "", {name: versions[name] for name in PACKAGES if name in versions}),
        script=room.joinpath(SCRIPT).read_text(encoding="utf-8"),
        rows=[(row, [(engine, *_both_forms(row, engine)) for engine in report.engines]) for row in report.rows],
        engines=report.engines,
        verdicts=sorted({row.verdict for row in report.rows}),
    )


def _both_forms(row: FleetRow, engine: str) -> tuple[str, str]:
    """Return the verdicts on an adapter as it is and as exported, and the tone of the first."""
    found, exported = row.engines.get(engine, ""), row.exported.get(engine, "")
    tone = tone_of(found) if found else ""
    return f"{found} → {exported}" if exported not in ("", found) and found != "right" else found, tone
