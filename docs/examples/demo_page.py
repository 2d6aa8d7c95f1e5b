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
from loraover_export.fold import html as fold_html
from loraover_export.fold.certificate import FoldCertificate
from loraover_serve.verify import html as verify_html
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
    is_told = fold.passed and (right.verdict, wrong.verdict) == ("as trained", "differs") and wrong.fault is not None
    before, after = run["before"], run["after"]
    trained = (
        f"Training took the loss of {after['examples']} held-out questions from {short(before['loss'])} to "
        f"{short(after['loss'])}. Right answers went from {before['exact_match']:.0%} to {after['exact_match']:.0%}."
    )
    sentences = [trained, fold_html.verdict_of(fold).sentence, verify_html.verdict_of(check).sentence]
    word = "nothing was lost, and the planted fault was named" if is_told else "not what this demo should show"
    texts = (
        f"{run['trained_parameters']:,} numbers were trained, of which a plain LoRA of rank {run['served_rank']} has "
        f"{run['lora_parameters']:,}. The others are cores, which enrich A and B in training alone.",
        "The fold multiplies the cores into A and B. The folded adapter is a plain LoRA: it costs what one costs.",
        "A copy was served whose scaling had been lost, as engines lose it without a message. Both adapters were "
        "checked by HTTP, against the reference that was recorded before. The check needs no PyTorch.",
    )
    headings = ("1. Training", "2. Fold into a plain LoRA", "3. Served on vLLM, and checked")
    folded, checked = fold_html.to_page(fold, "make demo").figures, verify_html.to_page(check).figures
    drawn = ([_losses(run, metrics)], folded, checked)
    return make_page(
        TEMPLATE,
        title=f"Demo: {word}",
        heading="Does the server answer as the adapter was trained?",
        verdict=Verdict("good" if is_told else "bad", word, "\n".join(sentences)),
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
