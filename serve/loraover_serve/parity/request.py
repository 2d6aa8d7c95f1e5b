"""What a parity run is asked for, checked before anything starts."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from loraover.common.atomic_output import check_writable
from loraover.common.errors import ParityError
from loraover_serve.parity.judge.equivalence import MIN_BLOCKS
from loraover_serve.parity.measure.workload import WorkloadKind
from loraover_serve.vllm.up import SET_BY_UP, check_options

_CACHE_OFF = "the prefix cache is always off, or a later arm would reuse an earlier one's work"
SET_BY_PARITY = (
    dict.fromkeys(SET_BY_UP, "parity sets it, alike for every arm")
    | {"--model": SET_BY_UP["--model"]}
    | {"--enable-prefix-caching": _CACHE_OFF, "--no-enable-prefix-caching": _CACHE_OFF}
)
"""Words for `vllm serve` that `parity` sets or relies on, and why they cannot be given."""


@dataclass(frozen=True)
class ParityRequest:
    """What the command was asked for.

    Args:
        requests: answered by every arm at every concurrency, both times counted.
        margin: of a ratio, that counts as equal.
        memory: servers to start for each arm and concurrency to measure peak memory, on vLLM.
        timeout_s: longest silence of a server in the middle of an answer.
        start_timeout_s: seconds until a server must have answered.
        out: folder for `parity.json` and `parity.html`; None writes none.
        options: further words for `vllm serve`, for every arm.
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
    workload: WorkloadKind
    prompts: Path | None
    prompt_tokens: int
    new_tokens: int
    seed: int
    allow_unequal: bool
    memory: int
    cross_check: bool
    timeout_s: float
    start_timeout_s: float
    options: tuple[str, ...] = ()

    def blocks(self, concurrency: int) -> int:
        """Blocks that the requests make at a concurrency."""
        return self.requests // (2 * concurrency)

    def concurrencies(self, engine: str) -> tuple[int, ...]:
        """At which an engine is measured: only a server answers several requests at once."""
        return self.concurrency if engine == "vllm" else (1,)

    def check(self) -> None:
        """Refuse what cannot be measured, before anything starts.

        Raises:
            ConfigError: an option for vLLM that parity sets itself.
            ParityError: too few requests or tokens, several at once or vLLM's options without a server, or something
                named twice.
            OutputError: an output that is there already, or cannot be written.
        """
        if self.out is not None:
            check_writable(self.out, outside=self.folded)
        for option, given in (("--engine", self.engines), ("--concurrency", self.concurrency)):
            if len(set(given)) < len(given):
                raise ParityError(f"{option} names one twice: {', '.join(map(str, given))}; name each once.")
        check_options(self.options, SET_BY_PARITY)
        if self.options and "vllm" not in self.engines:
            raise ParityError("what stands after -- is for vLLM, which is not measured; add --engine vllm.")
        if self.concurrency != (1,) and "vllm" not in self.engines:
            raise ParityError("--concurrency is vLLM's; onnx and torch answer one request at a time.")
        for concurrency in self.concurrency:
            if self.blocks(concurrency) < MIN_BLOCKS:
                raise ParityError(
                    f"{self.requests} requests make {self.blocks(concurrency)} blocks of 2 x {concurrency} at "
                    f"concurrency {concurrency}; the tests take {MIN_BLOCKS} at least: --requests "
                    f"{2 * MIN_BLOCKS * concurrency} or more."
                )
        if self.new_tokens < 2:
            raise ParityError("--new-tokens is 1; a time per output token takes two tokens at least.")

    def command(self) -> str:
        """The command line, for the report."""
        words = ["loraover-serve", "parity", "--folded", str(self.folded)]
        words += [] if self.vanilla is None else ["--vanilla", str(self.vanilla)]
        words += [] if self.checkpoint is None else ["--checkpoint", str(self.checkpoint)]
        words += [word for engine in self.engines for word in ("--engine", engine)]
        words += ["--requests", str(self.requests), "--concurrency", ",".join(map(str, self.concurrency))]
        words += ["--margin", str(self.margin), "--workload", self.workload, "--seed", str(self.seed)]
        words += ["--prompt-tokens", str(self.prompt_tokens), "--new-tokens", str(self.new_tokens)]
        words += [] if self.prompts is None else ["--prompts", str(self.prompts)]
        words += [] if self.model is None else ["--model", self.model]
        if "vllm" in self.engines:
            words += ["--memory", str(self.memory), "--vllm", self.vllm, "--start-timeout", str(self.start_timeout_s)]
        words += ["--timeout", str(self.timeout_s)]
        words += ["--cross-check"] if self.cross_check else []
        words += ["--allow-unequal"] if self.allow_unequal else []
        words += [] if self.out is None else ["--out", str(self.out)]
        words += ["--", *self.options] if self.options else []
        return shlex.join(words)
