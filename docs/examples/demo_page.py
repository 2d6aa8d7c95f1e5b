"""Show on one page what `make demo` did: the training, the fold, and the check of both served adapters.

Usage: python docs/examples/demo_page.py RUN    (RUN: folder of the demo; the page is RUN/demo.html)
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
from loraover_serve.judge.names import SCALED
from loraover_serve.verify import show as verify_show
from loraover_serve.verify.report import VerifyReport

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
    run: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], fold: FoldCertificate, check: VerifyReport
) -> Page:
    """Make the page.

    Args:
        run: Contents of the training's run.json.
        metrics: Lines of its metrics.jsonl.
        fold: Certificate of the fold.
        check: Report of the check of the right adapter and of the copy with the fault, in this order.
    """
    right, wrong = check.engines
    is_told = fold.passed and (right.verdict, wrong.verdict, wrong.fault) == ("as trained", "differs", SCALED)
    before, after, folded = run["before"], run["after"], fold_report.verdict_of(fold)
    known, learned = (100 * each["exact_match"] for each in (before, after))
    lines = [
        f"training: {known:.0f} % right answers before, {learned:.0f} % after.",
        f"fold: {folded.word}.",
        *(f"{served.engine}: {served.plainly}" for served in check.engines),
    ]
    word = "nothing was lost, and the planted fault was named" if is_told else "not what this demo should show"
    texts = (
        f"The loss of {after['examples']} held-out questions went from {short(before['loss'])} to "
        f"{short(after['loss'])}. {run['trained_parameters']:,} numbers were trained, of which a plain LoRA of rank "
        f"{run['served_rank']} has {run['lora_parameters']:,}. The others are cores, which enrich A and B in training "
        "alone.",
        "The fold multiplies the cores into A and B. The folded adapter is a plain LoRA: it costs what one costs. "
        f"{folded.sentence}",
        "A copy was served whose scaling had been lost, as engines lose it without a message. Both adapters were "
        "checked by HTTP, against the reference that was recorded before. The check needs no PyTorch. Requests for "
        "both models at once were left out.",
    )
    headings = ("1. Training", "2. Fold into a plain LoRA", "3. Served on vLLM, and checked")
    drawn = (
        [_losses(run, metrics)],
        fold_report.to_page(fold, "make demo").figures,
        verify_show.to_page(check).figures,
    )
    return make_page(
        TEMPLATE,
        title=f"Demo: {word}",
        heading="Does the server answer as the adapter was trained?",
        verdict=Verdict("good" if is_told else "bad", word, "\n".join(lines)),
        facts={"base model": run["model"], "engine": f"vllm {right.version or ''}".strip()},
        origin=Origin("make demo", check.date, check.hardware, fold.versions | check.versions),
        figures=[figure for figures in drawn for figure in figures],
        steps=list(zip(headings, drawn, texts, strict=True)),
    )


def _losses(run: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> Figure:
    steps = [(float(line["step"]), float(line["loss"])) for line in metrics if "loss" in line]
    x = Axis("step", 0, 1.03 * run["steps"])  # the last mark has room
    y = Axis.around("loss, nats", [0.0, *(loss for _, loss in steps)])
    return curves_figure("training", "Loss in training", [Curve("LoRA-Over", "subject", steps)], x, y)


if __name__ == "__main__":
    demo = Path(sys.argv[1])
    lines = (demo / "lora-over" / "metrics.jsonl").read_text().splitlines()
    page = page_of(
        json.loads((demo / "lora-over" / "run.json").read_text()),
        [json.loads(line) for line in lines],
        FoldCertificate.model_validate_json((demo / "folded" / "fold_certificate.json").read_text()),
        VerifyReport.model_validate_json((demo / "verified" / "verify.json").read_text()),
    )
    page.write(demo / "demo.html")
