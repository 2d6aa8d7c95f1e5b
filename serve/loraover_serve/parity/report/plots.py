"""Plots of a parity report, as SVG in the text colour of the page."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loraover.reporting.html_page import INK, svg_axes
from loraover_serve.parity.judge.analysis import DESCRIBED, Result, Throughput
from loraover_serve.parity.samples import BASE, CONTROL, FOLDED, MIXED, SWITCHING, VANILLA, Measurement

COLORS = {VANILLA: "#3b7dd8", CONTROL: "#8a63d2", FOLDED: "#d9822b", BASE: "#2e9e6b"}
COLORS |= {"unfolded": "#c2406b", SWITCHING: "#7a6a53", MIXED: "#1f9bb0"}
"""Colours of the arms, distinct on light and dark pages, and for people who do not see red and green."""
POINTS = 200  # points of a curve, more than a screen shows
MARKS = {"equivalent": "o", "different": "X", "inconclusive": "s"}


def ratio_plot(results: Sequence[Result], margin: float) -> str:
    """Plot of every ratio with its interval, and of the margin as a band.

    Args:
        results: the ratios.
        margin: largest difference of times that still counts as equal (0.05 is 5 %).
    """
    with svg_axes(8, 1.2 + 0.32 * len(results)) as (axes, drawn):
        axes.axvspan(1 / (1 + margin), 1 + margin, color=COLORS[BASE], alpha=0.18, lw=0)
        axes.axvline(1, color=INK, lw=0.8)
        for y, r in enumerate(reversed(results)):
            low, high = r.interval
            color = COLORS.get(r.arm, INK)
            axes.plot([low, high], [y, y], color=color, lw=2, solid_capstyle="butt")
            axes.plot([r.ratio], [y], MARKS[r.verdict], color=color, ms=9)
        names = [f"{r.engine}, {r.concurrency} at once, {r.arm}: {r.measure}" for r in reversed(results)]
        axes.set_yticks(range(len(results)), names)
        axes.set_xlabel(f"time, arm / vanilla LoRA (shaded: within {100 * margin:g} %)")
    return drawn[0]


def ecdf_plot(run: Measurement, name: str) -> str:
    """Plot of each arm's cumulative distribution of one time.

    Args:
        run: the samples.
        name: name of the time, a key of DESCRIBED.
    """
    by_arm: dict[str, list[float]] = {arm: [] for arm in COLORS if any(s.arm == arm for s in run.samples)}
    for sample in run.samples:
        by_arm.setdefault(sample.arm, []).extend(DESCRIBED[name](sample))
    with svg_axes(8, 3.4) as (axes, drawn):
        for arm, values in by_arm.items():
            shares = np.linspace(0, 1, min(len(values), POINTS) + 1)
            x = np.quantile(values, shares, method="inverted_cdf")
            axes.step(x, 100 * shares, where="post", color=COLORS.get(arm, INK), label=arm)
        axes.set_xlabel(f"{name}, seconds")
        axes.set_ylabel("share of answers, %")
        axes.legend(frameon=False, fontsize=9)
    return drawn[0]


def throughput_plot(throughputs: Sequence[Throughput]) -> str:
    """Plot of tokens per second against concurrency, with one line for each arm.

    Args:
        throughputs: throughputs of one engine.
    """
    with svg_axes(8, 3.4) as (axes, drawn):
        for arm in dict.fromkeys(t.arm for t in throughputs):
            mine = sorted((t for t in throughputs if t.arm == arm), key=lambda t: t.concurrency)
            x, y = [t.concurrency for t in mine], [t.tokens_per_second for t in mine]
            low, high = zip(*(t.interval for t in mine), strict=True)
            spread = np.maximum([np.subtract(y, low), np.subtract(high, y)], 0)
            axes.errorbar(x, y, yerr=spread, marker="o", color=COLORS.get(arm, INK), label=arm, capsize=3)
        axes.set_xlabel("requests at once")
        axes.set_xticks(sorted({t.concurrency for t in throughputs}))
        axes.set_ylabel("tokens per second")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=9)
    return drawn[0]
