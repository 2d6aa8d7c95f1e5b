"""The arguments of a parity run, checked before anything starts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from loraover.adapters.uniform.request_fields import compute_dtype, device
from loraover.common.request import AnyIntegers, AnyNames, AnyPath, AnyPaths, option
from loraover.models.device import choose_compute
from loraover_serve.engines import ENGINES, EngineRequest
from loraover_serve.vllm.request import SET_BY_SERVE

PROMPT_TOKENS = 32
"""Length of a prompt if none is given, in tokens."""

MIN_BLOCKS = 5
"""Smallest number of blocks that a comparison takes."""

ROUNDS = 2
"""Turns that each of several adapters gets in a run."""

_CACHE_OFF = "the prefix cache is always off, or a later arm would reuse an earlier one's work"


@dataclass(frozen=True)
class ParityRequest(EngineRequest):
    """Measure whether a folded adapter is as fast as a plain LoRA, and gives the answers it should.

    An equivalence test compares their times with a margin; a second copy of the plain LoRA shows the machine's noise.
    Answers are compared with PyTorch's.

    Words after -- are passed to `vllm serve`, except options that this command sets itself, such as the prefix cache.

    Exit code 0: equivalent; 1: different; 3: inconclusive; 2: unusable request, or an engine that failed.
    """

    verb = "loraover serve parity"
    extra = "serve"
    examples = (
        "loraover serve parity --adapter folded --checkpoint runs/a/adapter -o parity",
        "loraover serve parity --adapter shop --also-adapter news --engine vllm --max-concurrency 4 --num-prompts 200",
        "loraover serve parity --adapter for-vllm --engine vllm --max-concurrency 1,4 --num-prompts 200 -o parity",
    )
    json_help = "Print the report as JSON, without the samples."
    refused = (
        dict.fromkeys(SET_BY_SERVE, "parity sets it, alike for every arm")
        | {"--model": SET_BY_SERVE["--model"]}
        | dict.fromkeys(("--enable-prefix-caching", "--no-enable-prefix-caching"), _CACHE_OFF)
    )

    adapter: AnyPath = option("Folded adapter: folder, hub name or address.", is_source=True)
    baseline: AnyPath | None = option(
        "Plain LoRA with the same ranks and targets, to compare with: folder, hub name or address.",
        is_source=True,
        default=None,
        default_text="random weights of the adapter's shapes",
    )
    checkpoint: AnyPath | None = option(
        "The LoRA-Over checkpoint that was folded: folder, hub name or address. Answers are then compared "
        "with its unfolded model, which also becomes an arm of the engine torch.",
        default=None,
        is_source=True,
    )
    also_adapters: AnyPaths = option(
        "Further adapter of the same ranks and targets, to measure requests that switch among adapters or, "
        "on vLLM, share a batch.",
        default=(),
        flag="--also-adapter",
        is_source=True,
    )
    engines: AnyNames = option(
        "Engine to measure on; several are measured one after the other.",
        default=("onnx",),
        flag="--engine",
        choices=[name for name, engine in ENGINES.items() if engine.is_timed],
        are_different=True,
    )
    num_prompts: int = option("Number of requests that each arm answers, at every concurrency.", default=100, least=1)
    max_concurrency: AnyIntegers = option(
        "Number of simultaneous requests to vLLM; each of several numbers is measured.",
        default=(1,),
        least=1,
        has_commas=True,
        are_different=True,
    )
    margin: float = option(
        "Largest difference of times that still counts as equal (0.05 is 5 %).", default=0.05, above=0, most=1
    )
    output: AnyPath | None = option(
        "New folder for parity.json, parity.html and vLLM's logs.", default=None, short="-o"
    )
    workload: str = option(
        "Prompts of one length (fixed), of log-normal lengths (mixed), or of a file (file).",
        default="fixed",
        choices=("fixed", "mixed", "file"),
    )
    prompts: AnyPath | None = option("UTF-8 text file with one prompt in each line.", default=None)
    prompt_tokens: int = option(
        "Length of a prompt, in tokens; the median of a mixed workload.", default=PROMPT_TOKENS, least=1
    )
    new_tokens: int = option("Length of an answer, in tokens; the median of a mixed workload.", default=32, least=2)
    memory: int = option(
        "Number of vLLM servers to start for each arm to measure peak memory; 3 or more give an interval.",
        default=1,
        least=0,
    )
    cross_check: bool = option("Run `vllm bench serve` against the same server too.", default=False)
    device: str = device(
        "Device that PyTorch runs on: the engine torch, and the models that answers are compared with."
    )
    compute_dtype: str = compute_dtype("Data type in which PyTorch computes.")
    seed: int = option(
        "Seed of random weights, of lengths and of the order of arms.", default=0, least=0, most=2**63 - 1
    )
    allow_unequal: bool = option("Compare adapters of different ranks or targets.", default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        choose_compute(self.device, self.compute_dtype)

    def faults(self) -> Iterator[str]:
        if (self.workload == "file") != (self.prompts is not None):
            yield f"{self.named('workload', 'file')} and {self.named('prompts')} go together; give both or neither."
        if self.workload == "file" and self.prompt_tokens != PROMPT_TOKENS:
            yield f"{self.named('prompt_tokens')} is for prompts of the built-in text; leave it out."
        yield from super().faults()
        for concurrency in self.max_concurrency:
            if self.blocks(concurrency) < MIN_BLOCKS:
                enough = self.named("num_prompts", 2 * MIN_BLOCKS * self.waves * concurrency)
                yield (
                    f"{self.num_prompts} prompts make {self.blocks(concurrency)} blocks of "
                    f"2 x {self.waves * concurrency} at concurrency {concurrency}, and the tests take {MIN_BLOCKS} at "
                    f"least; give {enough} or more."
                )

    @property
    def asked(self) -> tuple[str, ...]:
        """The engines."""
        return tuple(self.engines)

    def blocks(self, concurrency: int) -> int:
        """Number of blocks that the prompts make at a concurrency."""
        return self.num_prompts // (2 * self.waves * concurrency)

    @property
    def waves(self) -> int:
        """Number of waves of simultaneous requests that an arm answers in a row."""
        return ROUNDS * (1 + len(self.also_adapters)) if self.also_adapters else 1

    def concurrencies(self, engine: str) -> tuple[int, ...]:
        """The concurrencies to measure an engine at; only a server answers several requests at once."""
        return self.max_concurrency if ENGINES[engine].is_batching else (1,)
