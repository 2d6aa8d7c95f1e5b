"""One parity run from command line to verdict."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from loraover.command import quiet_libraries
from loraover.errors import LoraOverError, ParityError
from loraover.models import load_tokenizer
from loraover.output import check_free, publish_directory
from loraover.run_result import environment
from loraover_export.certificate import hardware
from loraover_serve.parity.analysis import CONTROL, FOLDED, VANILLA, latencies, overall, results, throughputs
from loraover_serve.parity.arms import Arms, prepare_arms
from loraover_serve.parity.equivalence import MIN_BLOCKS
from loraover_serve.parity.html import HTML_FILE, render
from loraover_serve.parity.measure import Run, measure
from loraover_serve.parity.outputs import Outputs, compare_outputs
from loraover_serve.parity.report import REPORT_FILE, ParityReport, RunRecord, SampleRecord
from loraover_serve.parity.show import show_report
from loraover_serve.parity.start import reference_contexts, started
from loraover_serve.parity.workload import Kind, Request, make_requests

ALPHA = 0.05
COMPARED_PROMPTS = 8


@dataclass(frozen=True)
class ParityRequest:
    """What the command was asked for.

    Args:
        requests: answered by every arm at every concurrency, both times counted.
        margin: of a ratio, that counts as equal.
        out: folder for `parity.json` and `parity.html`; None writes none.
    """

    folded: Path
    vanilla: Path | None
    checkpoint: Path | None
    engines: tuple[str, ...]
    requests: int
    concurrency: tuple[int, ...]
    margin: float
    out: Path | None
    model: str | None
    vllm: str
    workload: Kind
    prompts: Path | None
    prompt_tokens: int
    new_tokens: int
    seed: int
    allow_unequal: bool

    def blocks(self, concurrency: int) -> int:
        """Blocks that the requests make at a concurrency."""
        return self.requests // (2 * concurrency)

    def command(self) -> str:
        words = ["loraover-serve", "parity", "--folded", str(self.folded)]
        words += [] if self.vanilla is None else ["--vanilla", str(self.vanilla)]
        words += [] if self.checkpoint is None else ["--checkpoint", str(self.checkpoint)]
        words += [word for engine in self.engines for word in ("--engine", engine)]
        words += ["--requests", str(self.requests), "--concurrency", ",".join(map(str, self.concurrency))]
        words += ["--margin", str(self.margin), "--workload", self.workload, "--seed", str(self.seed)]
        words += ["--prompt-tokens", str(self.prompt_tokens), "--new-tokens", str(self.new_tokens)]
        return shlex.join(words)


def run_parity(request: ParityRequest, as_json: bool) -> int:
    """Measure, judge, write and show.

    Returns:
        0 equivalent, 1 different, 3 inconclusive, 2 where an engine failed in the middle and the report is partial.
    Raises:
        LoraOverError: anything that keeps the run from starting.
    """
    quiet_libraries()
    console = Console(stderr=as_json)
    _check(request)
    with tempfile.TemporaryDirectory(prefix="loraover-parity-") as scratch:
        arms = prepare_arms(
            request.folded,
            request.vanilla,
            request.checkpoint,
            Path(scratch),
            model=request.model,
            allow_unequal=request.allow_unequal,
            seed=request.seed,
        )
        requests = _requests(request, arms)
        runs = _measure(request, arms, requests, Path(scratch), console)
        whole = [run for run in runs if run.blocks >= MIN_BLOCKS]
        console.print("comparing outputs with PyTorch")
        outputs = [_outputs(run, arms, requests) for run in {run.engine: run for run in whole}.values()]
    report = _report(request, arms, runs, outputs)
    if request.out is not None:
        with publish_directory(request.out, outside=request.folded) as draft:
            (draft / REPORT_FILE).write_text(report.model_dump_json() + "\n")
            (draft / HTML_FILE).write_text(render(report), encoding="utf-8")
    show_report(report, console)
    if request.out is not None:
        console.print(f"wrote {escape(str(request.out))}", soft_wrap=True)
    if as_json:
        print(report.model_dump_json(exclude={"runs"}, indent=1))
    return report.exit_code


def _check(request: ParityRequest) -> None:
    if request.out is not None:
        check_free(request.out.absolute(), outside=request.folded)
    for concurrency in request.concurrency:
        if request.blocks(concurrency) < MIN_BLOCKS:
            raise ParityError(
                f"{request.requests} requests make {request.blocks(concurrency)} blocks of 2 x {concurrency} at "
                f"concurrency {concurrency}; the tests take {MIN_BLOCKS} at least: --requests "
                f"{2 * MIN_BLOCKS * concurrency} or more."
            )
    if request.new_tokens < 2:
        raise ParityError("--new-tokens is 1; a time per output token takes two tokens at least.")


def _requests(request: ParityRequest, arms: Arms) -> list[Request]:
    return make_requests(
        request.workload,
        load_tokenizer(arms.base),
        request.requests,
        prompt_tokens=request.prompt_tokens,
        new_tokens=request.new_tokens,
        seed=request.seed,
        file=request.prompts,
    )


def _measure(
    request: ParityRequest, arms: Arms, requests: Sequence[Request], scratch: Path, console: Console
) -> list[Run]:
    """Every engine at every concurrency; what was measured before a failure is kept."""
    runs: list[Run] = []

    def say(line: str) -> None:
        console.print(escape(line), soft_wrap=True)

    for name in request.engines:
        try:
            with started(name, arms, requests, scratch, request.vllm, say) as engines:
                for engine in engines:
                    for concurrency in request.concurrency if name == "vllm" else request.concurrency[:1]:
                        blocks = request.blocks(concurrency)
                        say(f"{engine.name}, concurrency {concurrency}: {blocks} blocks of {len(engine.arms)} arms")
                        run = measure(engine, requests, concurrency=concurrency, blocks=blocks, seed=request.seed)
                        runs.append(run)
                        if run.failure is not None:
                            return runs
        except LoraOverError as error:
            if not runs:
                raise
            runs.append(Run(name, request.concurrency[0], 0, (), str(error)))
            return runs
    return runs


def _outputs(run: Run, arms: Arms, requests: Sequence[Request]) -> Outputs:
    reference, name, base = reference_contexts(arms)
    return compare_outputs(run, requests, reference, name, base, COMPARED_PROMPTS)


def _report(request: ParityRequest, arms: Arms, runs: Sequence[Run], outputs: list[Outputs]) -> ParityReport:
    whole = [run for run in runs if run.blocks >= MIN_BLOCKS]
    found = results(whole, request.margin, ALPHA) if whole else []
    failures = [run.failure for run in runs if run.failure is not None]
    verdict, reason = ("failed", failures[0]) if failures else overall(found)
    unapplied = [o.engine for o in outputs if not (o.folded_applied and o.vanilla_applied)]
    if verdict != "failed" and unapplied:
        verdict, reason = "failed", f"{unapplied[0]} answers as the base model; an adapter is not applied there"
    return ParityReport(
        verdict=verdict,
        reason=reason,
        margin=request.margin,
        alpha=ALPHA,
        results=found,
        latencies=latencies(whole),
        throughputs=throughputs(whole),
        outputs=outputs,
        runs=[_record(run) for run in runs],
        base_model=arms.base.name,
        adapters={
            FOLDED: str(request.folded),
            VANILLA: "random weights" if request.vanilla is None else str(request.vanilla),
            CONTROL: "a copy of the vanilla adapter",
        },
        workload={
            "kind": request.workload,
            "requests": request.requests,
            "prompt_tokens": request.prompt_tokens,
            "new_tokens": request.new_tokens,
        },
        seed=request.seed,
        command=request.command(),
        versions=environment("scipy"),
        hardware=hardware(),
    )


def _record(run: Run) -> RunRecord:
    samples = [
        SampleRecord(
            arm=s.arm, block=s.block, request=s.request, start_s=s.start_s, token_s=s.token_s, token_ids=s.token_ids
        )
        for s in run.samples
    ]
    return RunRecord(
        engine=run.engine, concurrency=run.concurrency, blocks=run.blocks, failure=run.failure, samples=samples
    )
