"""One parity run from command line to verdict."""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from loraover.command import quiet_libraries
from loraover.errors import LoraOverError, ParityError
from loraover.models import load_tokenizer
from loraover.output import check_free, publish_directory
from loraover.run_result import environment, hardware
from loraover_serve.parity.analysis import (
    CONTROL,
    FOLDED,
    VANILLA,
    Result,
    latencies,
    overall,
    results,
    throughputs,
)
from loraover_serve.parity.arms import Arms, prepare_arms
from loraover_serve.parity.cross_check import CrossCheck, cross_check
from loraover_serve.parity.engines.base import Engine
from loraover_serve.parity.equivalence import MIN_BLOCKS
from loraover_serve.parity.html import HTML_FILE, render
from loraover_serve.parity.measure import Run, measure
from loraover_serve.parity.memory import PeakMemory, measure_memory
from loraover_serve.parity.outputs import BASE, Outputs, compare_outputs
from loraover_serve.parity.report import REPORT_FILE, ParityReport, Verdict
from loraover_serve.parity.show import show_report
from loraover_serve.parity.start import LOG_FILE, references, started, started_vllm
from loraover_serve.parity.workload import Kind, Request, make_requests

ALPHA = 0.05
COMPARED_PROMPTS = 8
MEMORY_WAVES = 4


@dataclass(frozen=True)
class ParityRequest:
    """What the command was asked for.

    Args:
        requests: answered by every arm at every concurrency, both times counted.
        margin: of a ratio, that counts as equal.
        memory: servers to start for each arm and concurrency to measure peak memory, on vLLM.
        timeout_s: longest silence of a server in the middle of an answer.
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
    memory: int
    cross_check: bool
    timeout_s: float

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
        words += [] if self.prompts is None else ["--prompts", str(self.prompts)]
        words += [] if self.model is None else ["--model", self.model]
        words += ["--memory", str(self.memory)] if "vllm" in self.engines else []
        words += ["--cross-check"] if self.cross_check else []
        words += ["--allow-unequal"] if self.allow_unequal else []
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
        measured = _measure(request, arms, requests, Path(scratch), console)
        if measured.whole:
            console.print("comparing outputs with PyTorch")
        outputs = [_outputs(run, arms, requests) for run in {run.engine: run for run in measured.whole}.values()]
        report = _report(request, arms, measured, outputs)
        if request.out is not None:
            with publish_directory(request.out, outside=request.folded) as draft:
                (draft / REPORT_FILE).write_text(report.model_dump_json() + "\n")
                (draft / HTML_FILE).write_text(render(report), encoding="utf-8")
                log = Path(scratch) / LOG_FILE
                if measured.failure is not None and log.is_file():
                    shutil.copyfile(log, draft / LOG_FILE)
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


@dataclass
class _Measured:
    """What there is so far, and why there is no more."""

    runs: list[Run] = field(default_factory=list)
    memory: list[PeakMemory] = field(default_factory=list)
    cross_checks: list[CrossCheck] = field(default_factory=list)
    failure: str | None = None

    @property
    def whole(self) -> list[Run]:
        """Runs with enough blocks for the tests."""
        return [run for run in self.runs if run.blocks >= MIN_BLOCKS]

    @contextmanager
    def keep(self) -> Iterator[None]:
        """Keep what was measured before a failure or Ctrl-C; the first failure of a run with nothing yet is raised."""
        try:
            yield
        except LoraOverError as error:
            if not self.runs:
                raise
            self.failure = str(error)
        except KeyboardInterrupt:
            if not self.runs:
                raise
            self.failure = "interrupted"


def _measure(
    request: ParityRequest, arms: Arms, requests: Sequence[Request], scratch: Path, console: Console
) -> _Measured:
    """Every engine at every concurrency, then memory and vLLM's own benchmark where they are asked for."""
    measured = _Measured()

    def say(line: str) -> None:
        console.print(escape(line), soft_wrap=True)

    with measured.keep():
        for name in request.engines:
            with started(
                name, arms, requests, scratch, vllm=request.vllm, timeout_s=request.timeout_s, say=say
            ) as engines:
                for engine in engines:
                    for concurrency in request.concurrency if name == "vllm" else request.concurrency[:1]:
                        blocks = request.blocks(concurrency)
                        say(f"{engine.name}, concurrency {concurrency}: {blocks} blocks of {len(engine.arms)} arms")
                        run = measure(engine, requests, concurrency=concurrency, blocks=blocks, seed=request.seed)
                        measured.runs.append(run)
                        if run.failure is not None:
                            measured.failure = run.failure
                            return measured
                        if name == "vllm" and request.cross_check:
                            say("vllm bench serve, on each arm")
                            measured.cross_checks += _cross_checks(request, run, engine, arms, requests, scratch)
            if name == "vllm" and request.memory:
                _measure_memory(request, arms, requests, scratch, measured, say)
    return measured


def _cross_checks(
    request: ParityRequest, run: Run, engine: Engine, arms: Arms, requests: Sequence[Request], scratch: Path
) -> list[CrossCheck]:
    from loraover_serve.parity.engines.vllm import VllmEngine

    assert isinstance(engine, VllmEngine)
    tokenizer = load_tokenizer(arms.base)
    return [
        check
        for arm, model in engine.models.items()
        for check in cross_check(
            run, arm, model, requests, tokenizer, vllm=request.vllm, url=engine.server.url, folder=scratch
        )
    ]


def _measure_memory(
    request: ParityRequest,
    arms: Arms,
    requests: Sequence[Request],
    scratch: Path,
    measured: _Measured,
    say: Callable[[str], None],
) -> None:
    """A few waves of requests for each arm in a server of its own."""
    for arm in (BASE, *arms.adapters):
        alone = {arm: arms.adapters[arm]} if arm != BASE else {}
        for concurrency in request.concurrency:
            say(f"peak memory of {arm}, concurrency {concurrency}: {request.memory} server(s) of its own")
            measured.memory.append(
                measure_memory(
                    partial(
                        started_vllm, alone, arms, requests, scratch, vllm=request.vllm, timeout_s=request.timeout_s
                    ),
                    arm,
                    requests[: MEMORY_WAVES * concurrency],
                    concurrency=concurrency,
                    servers=request.memory,
                )
            )


def _outputs(run: Run, arms: Arms, requests: Sequence[Request]) -> Outputs:
    folded, name, vanilla = references(arms)
    return compare_outputs(run, requests, folded, name, vanilla, COMPARED_PROMPTS)


def _verdict(measured: _Measured, found: list[Result], outputs: list[Outputs]) -> tuple[Verdict, str]:
    if measured.failure is not None:
        return "failed", measured.failure
    unapplied = [o.engine for o in outputs if not (o.folded_applied and o.vanilla_applied)]
    if unapplied:
        return "failed", f"{unapplied[0]} answers as the base model; an adapter is not applied there"
    apart = [o.engine for o in outputs if not o.agree]
    if apart:
        return "different", f"{apart[0]}'s answers are further from PyTorch than the vanilla adapter's are"
    return overall(found)


def _report(request: ParityRequest, arms: Arms, measured: _Measured, outputs: list[Outputs]) -> ParityReport:
    found = results(measured.whole, request.margin, ALPHA) if measured.whole else []
    verdict, reason = _verdict(measured, found, outputs)
    return ParityReport(
        verdict=verdict,
        reason=reason,
        margin=request.margin,
        alpha=ALPHA,
        results=found,
        latencies=latencies(measured.whole),
        throughputs=throughputs(measured.whole),
        memory=measured.memory,
        outputs=outputs,
        cross_checks=measured.cross_checks,
        runs=measured.runs,
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
