"""Judgement of a file of rollouts, from its arguments to the report and its files."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean

from loraover.common.atomic_output import check_writable, publish_directory
from loraover.common.errors import DataError
from loraover.common.provenance import environment, processor, today
from loraover.sources.verb import verb
from loraover_serve.rollouts.dump import MAX_STEPS, read_dump
from loraover_serve.rollouts.loop import RolloutJudge
from loraover_serve.rollouts.report import JudgedStep, RolloutReport, decisive_step
from loraover_serve.rollouts.request import RolloutFileRequest
from loraover_serve.rollouts.show import to_page
from loraover_serve.rollouts.verdict import scale_faults

REPORT_FILE, HTML_FILE = "rollouts.json", "rollouts.html"
EVERY = 100
"""Steps after which a line of progress is reported."""


@verb(RolloutFileRequest)
def judge_rollout_file(request: RolloutFileRequest) -> RolloutReport:
    """Judge from a file, step by step, whether an engine sampled from the policy that was trained.

    The file has the arrays of `RolloutJudge.step` as rows of JSON Lines. It may be larger than memory.

    Returns:
        The verdict on the run, and on each step.

    Raises:
        ConfigError: Arguments that cannot be used.
        DataError: A file that cannot be read, or a line that is not as expected.
        OutputError: An output that exists or cannot be written.
    """
    if request.output is not None:
        check_writable(request.output)
    steps = list(_judged(request))
    decisive = decisive_step(steps)
    report = RolloutReport(
        verdict=decisive.verdict,
        fault=decisive.fault,
        steps=steps,
        file=request.shown("file"),
        window=request.window,
        command=request.command(),
        versions=environment(),
        hardware=processor(),
        date=today(),
    )
    if request.output is not None:
        with publish_directory(request.output) as draft:
            (draft / REPORT_FILE).write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")
            to_page(report).write(draft / HTML_FILE)
    return report


def _judged(request: RolloutFileRequest) -> Iterator[JudgedStep]:
    judge = RolloutJudge(request.window, noise=request.noise)
    factors = {} if request.scaling is None else scale_faults(request.scaling, request.ranks)
    for number, dumped in enumerate(read_dump(request.file), start=1):
        if number > MAX_STEPS:
            raise DataError(f"{request.file}: more than {MAX_STEPS} steps; judge parts of the file.")
        found = judge.step(**dumped.arguments | {"faults": factors | dumped.arguments["faults"]})
        off = [e - a for e, a in zip(dumped.arguments["e"], dumped.arguments["a"], strict=True)]
        yield JudgedStep(
            step=dumped.step,
            **{name: getattr(found, name) for name in ("verdict", "fault", "reason", "strength", "allowed", "effect")},
            **{name: getattr(found, name) for name in ("distance", "noise", "tokens", "prompts")},
            mean_difference=fmean(map(abs, off)),
            kl=fmean(off),
            suspects=list(found.suspects),
            not_excluded=list(found.not_excluded),
        )
        if number % EVERY == 0:
            request.report.line(f"step {dumped.step} is judged")
