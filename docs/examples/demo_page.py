"""Show on one page what `make demo` did: the training, the fold, and the checks of both servers.

Usage: python docs/examples/demo_page.py RUN

RUN is the folder of the demo. The page is RUN/demo.html, and RUN/caught.svg is the README's picture.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loraover.reporting.figures import Curve, curves_figure
from loraover.reporting.html_page import Origin, Page, Verdict, make_page
from loraover.reporting.svg import Axis, Figure, short
from loraover_export.fold import report as fold_report
from loraover_export.fold.report import FoldCertificate
from loraover_serve.judge.names import STALE_OF_EARLIER
from loraover_serve.verify.report import VerifyReport
from loraover_serve.verify.show import to_page as verify_page

TEMPLATE = """{% extends "page.html.j2" %}
{% from "parts.html.j2" import figures %}
{% block decides %}
{% for heading, drawn, text in steps %}
<h2>{{ heading }}</h2>
{% call figures(drawn) %}<p>{{ text }}</p>{% endcall %}
{% endfor %}
{% endblock %}
"""


def page_of(
    run: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    fold: FoldCertificate,
    stock: VerifyReport,
    cured: VerifyReport,
) -> Page:
    """Make the page.

    Args:
        run: Contents of the training's run.json.
        metrics: Lines of its metrics.jsonl.
        fold: Certificate of the fold.
        stock: Report of the check of vLLM as it comes.
        cured: Report of the check of vLLM with the plug-in.
    """
    check = both(stock, cured)
    wrong, right = check.engines
    is_told = fold.passed and (right.verdict, wrong.verdict, wrong.fault) == ("as trained", "differs", STALE_OF_EARLIER)
    before, after, folded = run["before"], run["after"], fold_report.verdict_of(fold)
    known, learned = (100 * each["exact_match"] for each in (before, after))
    lines = [
        f"training: {known:.0f} % right answers before, {learned:.0f} % after.",
        f"fold: {folded.word}.",
        *(f"{served.engine}: {served.plainly}" for served in check.engines),
    ]
    word = "nothing was lost, and vLLM's fault was named and cured" if is_told else "not what this demo should show"
    texts = (
        f"The loss of {after['examples']} held-out questions went from {short(before['loss'])} to "
        f"{short(after['loss'])}. {run['trained_parameters']:,} numbers were trained, of which a plain LoRA of rank "
        f"{run['served_rank']} has {run['lora_parameters']:,}. The others are cores, which enrich A and B in training "
        "alone.",
        "The fold multiplies the cores into A and B. The folded adapter is a plain LoRA: it costs what one costs. "
        f"{folded.sentence}",
        "Each server answered questions with an earlier version of the adapter. The new version was written into the "
        "same folder, and loaded as vLLM's documentation describes. vLLM keeps keys and values of "
        "prompts by an adapter's name and path. So its new weights continued what the old ones had read, without a "
        "message. The plug-in gives each version another path. Both servers were asked by HTTP, and compared with the "
        "reference. The circle is how far answers on kept keys and values are from those without.",
    )
    headings = ("1. Training", "2. Fold into a plain LoRA", "3. Served on vLLM, replaced, and checked")
    drawn = (
        [_losses(run, metrics)],
        fold_report.to_page(fold, "make demo").figures,
        caught(check),
    )
    return make_page(
        TEMPLATE,
        title=f"Demo: {word}",
        heading="Does the server answer as the adapter was trained?",
        verdict=Verdict("good" if is_told else "bad", word, "\n".join(lines)),
        facts={"base model": run["model"], "engine": f"{right.program or 'vLLM'} {right.version or ''}".strip()},
        origin=Origin("make demo", check.date, check.hardware, fold.versions | check.versions),
        figures=[figure for figures in drawn for figure in figures],
        steps=list(zip(headings, drawn, texts, strict=True)),
    )


def both(stock: VerifyReport, cured: VerifyReport) -> VerifyReport:
    """Join the checks of the two servers into one report."""
    names = ("vLLM", "vLLM with the plug-in")
    engines = [
        report.engines[0].model_copy(update={"engine": name})
        for name, report in zip(names, (stock, cured), strict=True)
    ]
    return stock.model_copy(update={"engines": engines})


def caught(check: VerifyReport) -> list[Figure]:
    """Draw how far answers on kept keys and values are from those without; empty if none could be compared."""
    return [figure for figure in verify_page(check).figures if figure.name == "caches"]


def _losses(run: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> Figure:
    steps = [(float(line["step"]), float(line["loss"])) for line in metrics if "loss" in line]
    x = Axis("step", 0, 1.03 * run["steps"])  # the last mark has room
    y = Axis.around("loss, nats", [0.0, *(loss for _, loss in steps)])
    return curves_figure("training", "Loss in training", [Curve("LoRA-Over", "subject", steps)], x, y)


if __name__ == "__main__":
    demo = Path(sys.argv[1])
    lines = (demo / "lora-over" / "metrics.jsonl").read_text().splitlines()
    checks = [
        VerifyReport.model_validate_json((demo / "verified" / kind / "verify.json").read_text())
        for kind in ("stock", "plug-in")
    ]
    page = page_of(
        json.loads((demo / "lora-over" / "run.json").read_text()),
        [json.loads(line) for line in lines],
        FoldCertificate.model_validate_json((demo / "folded" / "fold_certificate.json").read_text()),
        *checks,
    )
    page.write(demo / "demo.html")
    for figure in caught(both(*checks)):
        (demo / "caught.svg").write_text(figure.file())
