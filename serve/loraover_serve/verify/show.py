"""Verifications and recordings for people, on a terminal; of a verification also the page, and the files beside it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from rich.console import Console

from loraover.common.atomic_output import publish_directory, publish_file, publish_text
from loraover.common.errors import OutputError, UnwrittenReportError
from loraover.common.provenance import today
from loraover.reporting.figures import Band, FigureRow, Key, Point, rows_figure
from loraover.reporting.html_page import Origin, Page, Verdict, in_sentences, make_page
from loraover.reporting.palette import terminal_color, tone_of
from loraover.reporting.reporter import print_line
from loraover.reporting.svg import Axis, Figure, Shape, short
from loraover.reporting.table import Column, Table, percent
from loraover_serve.judge.limits import EXIT_CODES
from loraover_serve.judge.remedies import to_do
from loraover_serve.judge.results import Churn, ChurnAnswers, LogprobDistance, Suspect, listed
from loraover_serve.verify.by_reference import endpoint_of
from loraover_serve.verify.report import KEPT_PREFIX, REPORT_FILE, EngineResult, VerifyReport, copy_logs
from loraover_serve.verify.request import Found, RecordRequest, VerifyRequest

if TYPE_CHECKING:
    from loraover_serve.verify.recorder import RecordReport

HTML_FILE = "verify.html"
TEMPLATE = "verify.html.j2"
SHOWN = 6  # suspects in a figure; the table has all
LOWEST = 1e-6  # nats, below which a distance is drawn at the left end


def show_report(report: VerifyReport, request: VerifyRequest, console: Console) -> None:
    """Print one table for all engines, each verdict in a line, below it its remedy and what was not checked."""
    console.print(distances_table(report.engines, report.reference))
    for result in report.engines:
        if result.churn is not None:
            console.print(churn_table(result.churn))
    for result in report.engines:
        print_line(console, f"{result.engine}: {result.plainly}", terminal_color(result.verdict))
        for line in (*to_do(result.fault), *listed(result.not_checked)):
            print_line(console, f"  {line}")
        if result.known_faults:
            known = "; ".join(result.known_faults)
            print_line(console, f"  note: known faults of {result.program} {result.version}: {known} (docs/faults.md)")
    if request.output is not None:
        print_line(console, f"wrote {request.output}")


def show_recording(report: RecordReport, request: RecordRequest, console: Console) -> None:
    """Print what was recorded, and what it can decide."""
    what = f"questions with {report.positions} positions" if report.vectors is None else f"texts, {report.vectors}"
    print_line(
        console,
        f"{report.questions} {what}, {report.variants} faults, "
        f"{report.size_bytes / 1000:.0f} kB, in {report.seconds:.0f} s",
    )
    if report.bases:
        print_line(console, f"on the served weights of {', '.join(report.bases)}")
    if report.stale:
        print_line(console, f"long questions with a {', a '.join(report.stale)}")
    if report.chats:
        date = ", which prints a date; servers may print another one" if report.has_date else ""
        print_line(console, f"{report.chats} chats in the adapter's template{date}")
    error = "unknown" if report.half is None else f"known within {report.half:.2g}"
    if report.decides:
        text, color = "enough to separate a right adapter from one that is 20 % off, even with twice the noise", "green"
    else:
        text, color = "too few questions for a verdict with twice the noise; give more with --prompts", "yellow"
    print_line(console, f"on a server in bfloat16, the strength of the adapter is {error}: {text}", color)
    print_line(console, f"wrote {report.path}")


def to_page(report: VerifyReport) -> Page:
    """Make the report's page."""
    results = _worst_first(report.engines)
    suspected = [result for result in results if result.suspects]
    distances = _distances([result for result in results if result.adapter is not None])
    suspects = [_suspects(result) for result in suspected]
    caches = _caches(results)
    return make_page(
        files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8"),
        title=f"Verification: {report.verdict}",
        heading="Does the engine answer as the adapter was trained?",
        verdict=verdict_of(report),
        facts={
            "engine": ", ".join(f"{result.engine} {result.version or ''}".strip() for result in report.engines),
            "adapter": report.adapter,
            "base model": report.base_model,
        },
        origin=Origin(report.command, report.date, report.hardware, report.versions),
        figures=[*distances, *caches, *suspects],
        report=report,
        results=results,
        distances=distances,
        caches=caches,
        suspects=suspects,
        table=distances_table(results, report.reference),
        units=_units(results),
        tables=[(result.engine, _suspects_table(result)) for result in suspected],
        churned=[(result.engine, churn_table(result.churn)) for result in results if result.churn is not None],
    )


def verdict_of(report: VerifyReport) -> Verdict:
    """Return the verdict on all engines in plain words, the worst first: a line for each, and one for its remedy."""
    lines = [
        line
        for result in _worst_first(report.engines)
        for line in (f"{result.engine}: {result.plainly}", *map(in_sentences, to_do(result.fault)))
    ]
    return Verdict(tone_of(report.verdict), report.verdict, "\n".join(lines))


def _worst_first(results: Iterable[EngineResult]) -> list[EngineResult]:
    order = list(EXIT_CODES)
    return sorted(results, key=lambda result: order.index(result.verdict))


def _axis(label: str, values: Sequence[float]) -> Axis:
    return Axis.around(label, [max(value, LOWEST) for value in values], is_log=True)


def _distances(results: Sequence[EngineResult]) -> list[Figure]:
    """Draw each engine's distances beside what noise explains and what the adapter changes; empty if none answered."""
    rows, drawn = [], [LOWEST]
    for result in results:
        off = None if result.adapter is None else result.adapter.rms
        noise, mixed = (None if each is None else each.rms for each in (result.base, result.mixed))
        shown: list[tuple[float | None, str, Shape]] = [
            (noise, "noise", "diamond"),
            (mixed, "other", "triangle"),
            (off, "subject", "circle"),
            (result.effect, "effect", "bar"),
        ]
        points = [Point(max(value, LOWEST), color, shape) for value, color, shape in shown if value is not None]
        allowed = result.allowed or 0.0
        note = f"{short(off)}, allowed {short(result.allowed)}"
        if result.greedy is not None and result.greedy.equal < 1:
            note += f", {100 * result.greedy.equal:.0f} % same text"
        label = ", ".join(filter(None, (f"{result.engine}: {result.verdict}", result.fault)))
        rows.append(FigureRow(label, note, points, bands=[Band(LOWEST / 10, allowed)]))
        drawn += [*(point.value for point in points), max(allowed, LOWEST)]
    if not rows:
        return []
    keys: list[Key] = [
        ("adapter", "subject", "circle"),
        ("noise: base model", "noise", "diamond"),
        ("mixed batches, from those of one model", "other", "triangle"),
        ("noise explains", "good", None),
        ("the adapter's effect", "effect", "bar"),
    ]
    axis = _axis("RMS distance of logprobs, nats", drawn)
    return [rows_figure("distances", "Distance of each engine from PyTorch", rows, axis, keys=keys)]


def _caches(results: Sequence[EngineResult]) -> list[Figure]:
    """Draw how far each engine's answers on kept keys and values are from those without; empty if none was asked."""
    rows, drawn = [], [LOWEST]
    for result in results:
        caches = result.caches
        if caches is None or caches.noise is None:
            continue
        shown: list[tuple[float | None, str, Shape]] = [
            (caches.noise.rms, "noise", "diamond"),
            (caches.farthest, "subject", "circle"),
            (result.effect, "effect", "bar"),
        ]
        points = [Point(max(value, LOWEST), color, shape) for value, color, shape in shown if value is not None]
        note = f"{short(caches.farthest)}, noise {short(caches.noise.rms)}"
        rows.append(FigureRow(f"{result.engine}: {caches.fault or caches.verdict}", note, points))
        drawn += [point.value for point in points]
    keys: list[Key] = [
        ("answers on kept keys and values", "subject", "circle"),
        ("noise: base model", "noise", "diamond"),
        ("the adapter's effect", "effect", "bar"),
    ]
    title = "Distance of answers on kept keys and values from those without"
    axis = _axis("RMS distance of logprobs, nats", drawn)
    return [rows_figure("caches", title, rows, axis, keys=keys)] if rows else []


def _suspects(result: EngineResult) -> Figure:
    """Draw how far an engine's answers are from PyTorch's with each of the nearest faults."""
    shown = result.suspects[:SHOWN]
    rows = [
        FigureRow(s.detail, short(s.rms), [Point(max(s.rms, LOWEST), "bad" if s.explains else "other")]) for s in shown
    ]
    allowed = result.allowed or 0.0
    axis = _axis("RMS distance of logprobs, nats", [*(s.rms for s in shown), allowed])
    keys: list[Key] = [
        ("fault that explains the answers", "bad", "circle"),
        ("other faults", "other", "circle"),
        ("noise explains", "good", None),
    ]
    title = f"Suspected faults: {result.engine}"
    return rows_figure(f"faults-{result.engine}", title, rows, axis, keys=keys, band=Band(LOWEST / 10, allowed))


def distances_table(results: Sequence[EngineResult], reference: str) -> Table[EngineResult]:
    """Return a table of all engines, with their distances from the reference."""

    def rms(found: LogprobDistance | None, of_vectors: float | None) -> str:
        return short(found.rms if found else of_vectors)

    def strength(r: EngineResult) -> str:
        return "-" if r.strength is None else f"{r.strength.value:.3f} [{r.strength.low:.3f}, {r.strength.high:.3f}]"

    return Table(
        [
            Column("verdict", lambda r: r.verdict, "verdict"),
            Column("engine", lambda r: r.engine, "name"),
            Column("strength", strength),
            Column("noise", lambda r: rms(r.base, r.vectors.noise if r.vectors else None)),
            Column("as", lambda r: r.number_format or "-", "word", is_wide=True),
            Column("adapter", lambda r: rms(r.adapter, r.vectors.off if r.vectors else None)),
            Column("allowed", lambda r: short(r.allowed), is_wide=True),
            Column("effect", lambda r: short(r.vectors.effect if r.vectors else r.effect)),
            Column("same\ntext", lambda r: "-" if r.greedy is None else percent(r.greedy.equal)),
            Column("largest gap", lambda r: short(r.greedy.gap if r.greedy else None), is_wide=True),
            Column("mixed batch", lambda r: short(r.mixed.rms if r.mixed else None), is_wide=True),
            Column("compared", lambda r: r.compared or "-", "word", is_wide=True),
            Column("seconds", lambda r: f"{r.seconds:.0f}", is_wide=True),
        ],
        results,
        f"RMS distance from {reference}, {_units(results)}",
    )


def _units(results: Iterable[EngineResult]) -> str:
    """Units of the distances in a table, in words."""
    has_vectors = any(result.vectors for result in results)
    return "of vectors or logits, relative to their RMS size" if has_vectors else "of logprobs, in nats"


def churn_table(churn: Churn) -> Table[ChurnAnswers]:
    """Return a table of the models that were asked while adapters came and went, with the owners of their answers."""
    return Table(
        [
            Column("model", lambda r: r.model, "name"),
            Column("answers", lambda r: str(r.answers)),
            Column("whose", lambda r: ", ".join(f"{n} {words}" for words, n in r.owners.items()), "name"),
            Column("wrong", lambda r: f"{percent(r.share.value)} [{percent(r.share.low)}, {percent(r.share.high)}]"),
            Column("would be seen", lambda r: percent(max(r.visible.values(), default=1.0))),
            Column("not loaded", lambda r: str(r.absent), is_wide=True),
            Column(
                "latency\nmedian, 99 %", lambda r: "-" if r.latency_s is None else ", ".join(map(short, r.latency_s))
            ),
        ],
        churn.models,
        f"Answers of each model in {churn.seconds:g} s of churn; latency in seconds",
    )


def _suspects_table(result: EngineResult) -> Table[Suspect]:
    return Table(
        [
            Column("explains", lambda s: "yes" if s.explains else "no", "word"),
            Column("fault", lambda s: s.fault, "name"),
            Column("what it computes", lambda s: s.detail, "name"),
            Column("distance", lambda s: short(s.rms)),
        ],
        result.suspects,
    )


def _shown_command(request: VerifyRequest) -> str:
    """The command that verifies again, without the secrets that the user's own commands may hold."""
    if request.reload is None and request.run is None:
        return request.command()
    hidden = endpoint_of(request).hidden
    own: dict[str, Any] = {
        name: None if (words := getattr(request, name)) is None else hidden(words) for name in ("reload", "run")
    }
    return replace(request, **own).command()


def publish(request: VerifyRequest, found: Found) -> VerifyReport:
    """Write the report and its files where they are asked for, and return the report.

    Args:
        found: Findings of the verification.

    Raises:
        LoraOverError: The first one, if every engine failed.
        UnwrittenReportError: A file that cannot be written; `error.report` has the report, and a temporary folder has
            report and logs.
    """
    results = [EngineResult.model_validate(result) for result in found.results]
    report = VerifyReport(
        verdict=next(verdict for verdict in EXIT_CODES if verdict in {result.verdict for result in results}),
        engines=results,
        served_format=request.declared_format,
        command=_shown_command(request),
        date=today(),
        **found.facts,
    )
    text, has_failed = report.model_dump_json(indent=1) + "\n", len(found.failures) == len(results)
    try:
        if request.output is not None and (found.logs or not has_failed):
            with publish_directory(request.output, outside=request.adapter) as draft:
                (draft / REPORT_FILE).write_text(text, encoding="utf-8")
                to_page(report).write(draft / HTML_FILE)
                for log in found.logs:
                    shutil.copyfile(log, draft / log.name)
        if has_failed:
            raise found.failures[0]
        if request.junit is not None:
            content = to_junit(report)
            publish_file(request.junit, lambda draft: draft.write_bytes(content))
    except OutputError as error:
        kept: Path | None = None
        with suppress(OSError):  # the disk of temporary folders may be full as well
            folder = Path(tempfile.mkdtemp(prefix=KEPT_PREFIX))
            publish_text(folder / REPORT_FILE, text)
            copy_logs(found.logs, folder)
            kept = folder
        message = str(error) if kept is None else f"{error} The report is kept in {kept}."
        raise UnwrittenReportError(message, report.model_copy(update={"kept": kept})) from error
    return report


def to_junit(report: VerifyReport) -> bytes:
    """The verdicts as JUnit's test cases: *differs* is a failure, *failed* an error, *inconclusive* skipped."""
    kinds: dict[str, str] = {"differs": "failure", "failed": "error", "inconclusive": "skipped"}
    names = {"differs": "failures", "failed": "errors", "inconclusive": "skipped"}
    counts = {name: str(sum(result.verdict == one for result in report.engines)) for one, name in names.items()}
    facts = {"name": VerifyRequest.verb, "tests": str(len(report.engines)), **counts}
    suite = ElementTree.Element("testsuite", facts)
    for result in report.engines:
        case = ElementTree.SubElement(
            suite, "testcase", {"classname": "verify", "name": result.engine, "time": f"{result.seconds:.3f}"}
        )
        if result.verdict in kinds:
            told = {"message": result.reason, "type": result.fault or ""}
            below = ElementTree.SubElement(case, kinds[result.verdict], told)
            below.text = "\n".join((*to_do(result.fault), *listed(result.not_checked))) or None
    found: bytes = ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True)
    return found
