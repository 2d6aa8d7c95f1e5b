"""The arguments of a parity run, checked before anything starts."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from loraover.common.errors import ConfigError
from loraover.models.device import choose_compute
from loraover_serve.engines import ENGINES
from loraover_serve.parity.judge.equivalence import MIN_BLOCKS
from loraover_serve.parity.measure.several import ROUNDS
from loraover_serve.parity.measure.workload import WorkloadKind
from loraover_serve.vllm.serve import SET_BY_SERVE, option_faults

PROMPT_TOKENS = 32
"""Length of a prompt if none is given, in tokens."""

_CACHE_OFF = "the prefix cache is always off, or a later arm would reuse an earlier one's work"
SET_BY_PARITY = (
    dict.fromkeys(SET_BY_SERVE, "parity sets it, alike for every arm")
    | {"--model": SET_BY_SERVE["--model"]}
    | {"--enable-prefix-caching": _CACHE_OFF, "--no-enable-prefix-caching": _CACHE_OFF}
)
"""Options of `vllm serve` that a parity run sets or relies on, and why they cannot be given."""


@dataclass(frozen=True)
class ParityRequest:
    """The arguments of `measure_parity`, which documents them.

    Raises:
        ConfigError: arguments that cannot be used; the message names all of them.
    """

    adapter: Path
    baseline: Path | None
    checkpoint: Path | None
    also_adapters: tuple[Path, ...]
    engines: tuple[str, ...]
    num_prompts: int
    max_concurrency: tuple[int, ...]
    margin: float
    output: Path | None
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
    device: str = "auto"
    compute_dtype: str = "fp32"
    options: tuple[str, ...] = ()
    graph: Path | None = None

    def __post_init__(self) -> None:
        faults = [*self._range_faults(), *self._engine_faults(), *option_faults(self.options, SET_BY_PARITY)]
        if faults:
            raise ConfigError(" ".join(faults))
        choose_compute(self.device, self.compute_dtype)

    def _range_faults(self) -> Iterator[str]:
        for option, number, least in (
            ("prompt-tokens", self.prompt_tokens, 1),
            ("memory", self.memory, 0),
            ("timeout", self.timeout_s, 1),
            ("start-timeout", self.start_timeout_s, 1),
        ):
            if not number >= least:
                yield f"--{option} is {number}, expected {least} at least."
        if not 0 < self.margin <= 1:
            yield f"--margin is {self.margin}, expected more than 0 and at most 1."
        if self.new_tokens < 2:
            yield f"--new-tokens is {self.new_tokens}; the time per output token takes two tokens at least."
        if self.workload not in get_args(WorkloadKind):
            yield f"--workload is {self.workload!r}, expected one of {', '.join(get_args(WorkloadKind))}."
        if (self.workload == "file") != (self.prompts is not None):
            yield "--workload file and --prompts go together; give both or neither."
        if self.workload == "file" and self.prompt_tokens != PROMPT_TOKENS:
            yield "--prompt-tokens is for prompts of the built-in text; leave it out with --workload file."

    def _engine_faults(self) -> Iterator[str]:
        unknown = [engine for engine in self.engines if engine not in ENGINES]
        if unknown or not self.engines:
            yield f"--engine is {', '.join(unknown) or 'missing'}, expected some of {', '.join(ENGINES)}."
        for option, given in (("--engine", self.engines), ("--max-concurrency", self.max_concurrency)):
            if len(set(given)) < len(given):
                yield f"{option} names one twice: {', '.join(map(str, given))}; name each once."
        if self.graph is not None and "onnx" not in self.engines:
            yield "--graph is for ONNX Runtime; add --engine onnx."
        if self.cross_check and "vllm" not in self.engines:
            yield "--cross-check is for vLLM, which is not measured; add --engine vllm."
        if self.options and "vllm" not in self.engines:
            yield "the words after -- are for vLLM, which is not measured; add --engine vllm."
        if self.max_concurrency != (1,) and "vllm" not in self.engines:
            yield "--max-concurrency is for vLLM; onnx and torch answer one request at a time."
        if not self.max_concurrency or min(self.max_concurrency) < 1:
            yield f"--max-concurrency is {self.max_concurrency}, expected positive numbers."
            return
        for concurrency in self.max_concurrency:
            if self.blocks(concurrency) < MIN_BLOCKS:
                yield (
                    f"{self.num_prompts} prompts make {self.blocks(concurrency)} blocks of "
                    f"2 x {self.waves * concurrency} at concurrency {concurrency}, and the tests take {MIN_BLOCKS} at "
                    f"least; give --num-prompts {2 * MIN_BLOCKS * self.waves * concurrency} or more."
                )

    def blocks(self, concurrency: int) -> int:
        """Number of blocks that the prompts make at a concurrency."""
        return self.num_prompts // (2 * self.waves * concurrency)

    @property
    def waves(self) -> int:
        """Number of waves of simultaneous requests that an arm answers in a row."""
        return ROUNDS * (1 + len(self.also_adapters)) if self.also_adapters else 1

    def concurrencies(self, engine: str) -> tuple[int, ...]:
        """The concurrencies to measure an engine at; only a server answers several requests at once."""
        return self.max_concurrency if engine == "vllm" else (1,)

    def command(self) -> str:
        """The command line, for the report."""
        words = ["loraover", "serve", "parity", "--adapter", str(self.adapter)]
        words += [] if self.baseline is None else ["--baseline", str(self.baseline)]
        words += [] if self.checkpoint is None else ["--checkpoint", str(self.checkpoint)]
        words += [word for folder in self.also_adapters for word in ("--also-adapter", str(folder))]
        words += [word for engine in self.engines for word in ("--engine", engine)]
        words += ["--num-prompts", str(self.num_prompts)]
        words += ["--max-concurrency", ",".join(map(str, self.max_concurrency))]
        words += ["--margin", str(self.margin), "--workload", self.workload, "--seed", str(self.seed)]
        words += ["--prompt-tokens", str(self.prompt_tokens), "--new-tokens", str(self.new_tokens)]
        words += [] if self.prompts is None else ["--prompts", str(self.prompts)]
        words += [] if self.model is None else ["--model", self.model]
        words += [] if self.graph is None else ["--graph", str(self.graph)]
        if "vllm" in self.engines:
            words += ["--memory", str(self.memory), "--vllm", self.vllm, "--start-timeout", str(self.start_timeout_s)]
        words += ["--timeout", str(self.timeout_s), "--device", self.device, "--compute-dtype", self.compute_dtype]
        words += ["--cross-check"] if self.cross_check else []
        words += ["--allow-unequal"] if self.allow_unequal else []
        words += [] if self.output is None else ["--output", str(self.output)]
        words += ["--", *self.options] if self.options else []
        return shlex.join(words)
