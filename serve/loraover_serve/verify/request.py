"""The arguments of a verification and of a recording, checked before anything starts, and what a verification finds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import TIMEOUT_MAX
from typing import Any, NamedTuple

from loraover.adapters.uniform.request_fields import compute_dtype, device, given_adapter, max_memory
from loraover.checkpoint.files import REFERENCE_FILE
from loraover.common.errors import LoraOverError
from loraover.common.request import AnyName, AnyNames, AnyPath, AnyPaths, Request, argument, declarations, option
from loraover.models.device import choose_compute
from loraover_serve.engines import ENDPOINT, ENGINES, EngineRequest
from loraover_serve.judge.limits import MOST_BASES, NUMBER_FORMATS, REPEATS
from loraover_serve.vllm.request import SET_BY_SERVE

OF_SERVERS = ("headers", "ca_file", "protocol", "check_timeout_s", "caches", "reload", "churn_s")
"""Fields of a check of a running server without PyTorch."""

OF_GRAPHS = ("references", "graph", "published", "engines", "served_name", "served_format", "junit", "output")
"""Fields of a check of a graph by references."""


@dataclass(frozen=True)
class VerifyRequest(EngineRequest):
    """Verify that engines answer as an adapter was trained, and name the likely fault if one does not.

    ADAPTER is a LoRA-Over checkpoint or any plain PEFT LoRA of a causal language model, or of a model of vectors,
    classes or scores. An engine gets it in the form that it needs, and answers the same prompts as PyTorch. Its
    distance from PyTorch on the base model is its noise.

    With --reference, a running server is compared with what `loraover record` wrote, without PyTorch, ADAPTER and
    the base model, or an ONNX graph of vectors, classes or scores. Vectors of another pooling, length or prefix than
    the model's files say are recorded first, since `record` has the options for these.

    Words after -- are passed to `vllm serve`, except options that this command sets itself.

    Exit code 0: as trained; 1: an engine differs; 3: inconclusive, since the adapter moves the answers less than the
    noise, or a server gives no logprobs; 2: unusable request, or an engine that failed.
    """

    verb = "loraover verify"
    extra = "serve"
    examples = (
        "loraover verify folded --engine onnx --engine torch -o verified",
        "loraover verify runs/a/adapter --engine vllm -- --dtype float32",
        "loraover verify folded --engine llamacpp --base-gguf SmolLM2-135M-Instruct-Q8_0.gguf",
        "loraover verify shop --endpoint http://localhost:8000 --served-name shop",
        "loraover verify --reference shop/adapter_reference.json.gz --endpoint http://localhost:8000",
        "loraover verify --reference shop/adapter_reference.json.gz --endpoint http://localhost:8000 --caches",
        "loraover verify --reference shop/adapter_reference.json.gz --endpoint http://localhost:8000 --reload "
        "'sh load.sh'",
        "loraover verify --caches --prompts mine.txt --endpoint http://localhost:8000 --served-name shop",
    )
    refused = dict.fromkeys(SET_BY_SERVE, "verify sets it")

    adapter: AnyPath | None = given_adapter("LoRA-Over checkpoint, or PEFT adapter of any kind", default=None)
    references: AnyPaths = option(
        "Reference that `loraover record` wrote, or folder with references below it, in place of ADAPTER.",
        default=(),
        flag="--reference",
    )
    published: AnyPath | None = option(
        "Published reference that has the SHA-256 of the sealed one, which --reference names.",
        default=None,
        default_text="the one beside it, if there is one",
        needs="references",
    )
    engines: AnyNames = option(
        "Engine to start and verify; several are verified one after the other.",
        default=(),
        default_text="onnx, unless there is an endpoint",
        flag="--engine",
        choices=tuple(ENGINES),
        are_different=True,
    )
    endpoint: str | None = option(
        "Address of an OpenAI-compatible server that already serves the adapter.", default=None
    )
    served_name: AnyNames = option(
        "Name by which the server at the endpoint serves the adapter, or of its file beside the graph, one for each "
        "reference.",
        default=(),
        default_text="with references, the names of the adapters' folders",
        are_different=True,
    )
    base_name: str | None = option(
        "Name by which the server at the endpoint serves the base model.",
        default=None,
        default_text="the base model's own name, or the only other name there",
        needs="endpoint",
    )
    key_variable: str | None = option(
        "Environment variable that holds the key of the server at the endpoint.",
        default=None,
        former=("--endpoint-key-variable",),
        needs="endpoint",
    )
    headers: AnyNames = option(
        "Header of every request, as NAME=VARIABLE with the environment variable that holds its value.",
        default=(),
        flag="--header",
    )
    ca_file: AnyPath | None = option(
        "PEM file of certificates that sign the server's.",
        default=None,
        default_text="those of Python",
    )
    protocol: str | None = option(
        "Protocol of the server.",
        default=None,
        default_text="tried one after the other",
        choices=("openai", "sglang", "tgi", "llama-server"),
    )
    repeats: int = option(
        "Number of times that each question is asked of the adapter, to find single servers behind one address; "
        "--quick asks once.",
        default=REPEATS,
        least=1,
        needs="references",
    )
    check_timeout_s: float | None = option(
        "Seconds that all requests about one adapter may take together.",
        default=None,
        default_text="no limit",
        flag="--check-timeout",
        least=1,
        most=TIMEOUT_MAX,
    )
    quick: bool = option(
        "Send 8 requests, which only show whether the adapter is applied at all.", default=False, needs="references"
    )
    caches: bool = option(
        "Also ask long questions without and with the server's cache of keys and values: those of a reference that "
        "`record --long` wrote, or without one --prompts.",
        default=False,
    )
    reload: str | None = option(
        "Shell command that makes the server replace an earlier version of the adapter, which it serves until then, by "
        "the adapter. Implies --caches; long questions are asked before and after the command.",
        default=None,
    )
    churn_s: float | None = option(
        "Seconds of a final part of the check that asks all models, several at a time, while adapters are loaded and "
        "unloaded; each answer is assigned to the model that gave it.",
        default=None,
        flag="--churn",
        least=1,
        most=TIMEOUT_MAX,
    )
    run: str | None = option(
        "Shell command that loads and unloads adapters during --churn; it is ended with it.",
        default=None,
        needs="churn_s",
    )
    without_mixed: bool = option(
        "Leave out the requests that ask both models at once, and judge the other answers alone.", default=False
    )
    without_template: bool = option(
        "Leave out the chats that show the chat template of the server at the endpoint.",
        default=False,
        needs="endpoint",
    )
    junit: AnyPath | None = option("File for the verdicts in the form of JUnit.", default=None, needs="references")
    confusable: AnyPaths = option(
        "Folder of another adapter that the engine may serve by mistake, for example under a wrong name.",
        default=(),
        default_text="the newest eight of this base model beside ADAPTER",
        flag="--confusable",
    )
    served_format: str = option(
        "Coarsest number format in which the engine is known to hold the base model, or its KV cache; of a reference "
        "on several weights of the base model, those that are coarser do not pass.",
        default="bf16",
        default_text="bf16, or what a named GGUF file or the finest weights of the reference hold",
        choices=NUMBER_FORMATS,
    )
    prompts: AnyPath | None = option(
        "UTF-8 text file, one prompt a line. Of each, the first 256 tokens are used; for vectors, classes and scores "
        "the whole text, which has to fit the model.",
        default=None,
        default_text="eight built-in prompts, or 32 texts",
    )
    new_tokens: int = option(
        "Length of PyTorch's greedy answers, in tokens; servers are compared at each of these tokens.",
        default=8,
        least=1,
    )
    device: str = device("Device that PyTorch runs on, such as cpu or cuda:1.", "cpu")
    compute_dtype: str = compute_dtype(
        "Data type in which PyTorch computes; what bf16 and fp16 add to the noise is measured and allowed for."
    )
    max_memory_gib: float | None = max_memory()
    base_weights: AnyPath | None = option(
        "Weights of the base model that the engine has, on which PyTorch is run: see `loraover record`.",
        default=None,
        default_text="the base model's own",
        needs="adapter",
    )
    base_gguf: AnyPath | None = option(
        "GGUF file of the base model for llama.cpp, quantised or not.",
        default=None,
        default_text="one in F32 that is written for the comparison",
    )
    output: AnyPath | None = option(
        "New folder for verify.json, verify.html, its figures and engines' logs.", default=None, short="-o"
    )

    @property
    def declared_format(self) -> str:
        """Coarsest number format that is expected; for a GGUF file of the user's, any format."""
        return self.served_format if self.base_gguf is None else NUMBER_FORMATS[-1]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loads_models:
            choose_compute(self.device, self.compute_dtype)

    @property
    def loads_models(self) -> bool:
        return self.adapter is not None

    def faults(self) -> Iterator[str]:
        adapter, references, endpoint = (self.named(name) for name in ("adapter", "references", "endpoint"))
        is_own = self.adapter is None and (self.caches or self.reload is not None or self.churn_s is not None)
        if (self.adapter is None) == (not self.references) and not (is_own and not self.references):
            yield f"give {adapter} or {references}, and not both."
        elif is_own and not self.references:
            for name in ("endpoint", "served_name", "prompts"):
                if not getattr(self, name):
                    yield f"without {references}, {self.named(name)} is missing."
        for name in OF_SERVERS if self.adapter is not None and not self.references else ():
            if self._is_given(name):
                yield f"{self.named(name)} needs {references}, which is missing."
        if self.endpoint is not None and not self.served_name and not self.references:
            yield f"{endpoint} needs {self.named('served_name')}, which is missing."
        if len(self.served_name) > 1 and not self.references:
            yield f"{self.named('served_name')}: {len(self.served_name)}, expected one for the adapter."
        if self.published is not None and (len(self.references) != 1 or self.references[0].is_dir()):
            yield f"{self.named('published')} seals one file; give one {references}."
        for name in ("reload", "churn_s"):
            is_single = len(self.references) == 1 and not self.references[0].is_dir()
            if getattr(self, name) is not None and self.references and not is_single:
                yield f"{self.named(name)} checks one adapter; give one {references}."
        yield from self._of_graphs()
        yield from self._other_weights()
        yield from super().faults()

    def _of_graphs(self) -> Iterator[str]:
        """Faults of references with an engine that is started here, which has to be the graph of an ONNX export."""
        references, endpoint, graph = (self.named(name) for name in ("references", "endpoint", "graph"))
        if self.references and self.endpoint is None and self.graph is None:
            yield f"{references} needs {endpoint}, or {graph} of vectors, classes or scores, which is missing."
        if self.references and self.endpoint is not None and self.graph is not None:
            yield f"{references} is compared with one of {endpoint} and {graph}; leave the other one out."
        if self.references and self.endpoint is None and self.graph is not None:
            others = (name for name in declarations(type(self)) if name not in (*OF_GRAPHS, "adapter"))
            if given := self.given(*others):
                yield f"{given}: not used when {references} is compared with a graph; leave it out."
        if self.served_name and self.endpoint is None and not (self.references and self.graph is not None):
            yield f"{self.named('served_name')} needs {endpoint}, which is missing."
        if self.references and self.engines and (self.graph is None or self.engines != ("onnx",)):
            yield f"{self.named('engines')}: PyTorch compares engines that it starts; leave out {references}."

    @property
    def asked(self) -> tuple[str, ...]:
        """The engines with the server at the endpoint; ONNX Runtime if neither is given."""
        given = (*self.engines, *(() if self.endpoint is None else (ENDPOINT,)))
        return given or ("onnx",)

    @property
    def gguf_of_base(self) -> AnyPath | None:
        """GGUF file of the base model for llama.cpp: the one that is named for it, or that PyTorch runs on."""
        return self.base_gguf or (self.base_weights if "llamacpp" in self.engines else None)

    def _other_weights(self) -> Iterator[str]:
        """Faults of engines that would serve other weights than those on which PyTorch is run."""
        if self.base_weights is None:
            return
        given, is_gguf = self.named("base_weights"), self.base_weights.name.lower().endswith(".gguf")
        for name in self.asked:
            if name != ENDPOINT and not (name == "llamacpp" and is_gguf):
                yield (
                    f"{given}: {name} would be started on the base model's own weights; give {self.named('endpoint')} "
                    "of a server that has these, or a GGUF file and the engine llamacpp."
                )
        if self.base_gguf is not None and self.base_gguf != self.base_weights:
            yield f"{given} and {self.named('base_gguf')} name different weights; leave out the second."


class Found(NamedTuple):
    """Findings of a verification.

    Args:
        facts: The fields of a report that say what was compared, and with what.
        results: Result of each engine, or of each adapter on a server.
        failures: Error of each of them that failed.
        logs: Engines' logs.
    """

    facts: Mapping[str, Any]
    results: Sequence[Any]
    failures: Sequence[LoraOverError] = ()
    logs: Sequence[Path] = ()


@dataclass(frozen=True)
class RecordRequest(Request):
    """Record how an adapter answers, so that any server can be checked without PyTorch and the base model.

    ADAPTER is a LoRA-Over checkpoint or any plain PEFT LoRA of a causal language model, or of a model of vectors,
    classes or scores. PyTorch runs the base model, the adapter, and each known fault of serving on the same questions.
    `loraover verify --reference` and the file of `--checker` compare a server's answers with what is recorded.

    Published questions find mistakes, not fraud: a server that knows them could answer only these as trained. For an
    audit, --sealed writes a second reference with other questions, which you keep to yourself. Its SHA-256 is in the
    published reference, which shows at the audit that the file was not changed.
    """

    verb = "loraover record"
    extra = "serve"
    examples = (
        "loraover record folded",
        "loraover record runs/a/adapter --device cuda -o shop.json.gz --checker adapter_check.pyz",
        "loraover record folded --device cuda --compute-dtype bf16",
        "loraover record folded --sealed ../sealed.json.gz --sealed-prompts secret.txt",
        "loraover record folded --long --earlier runs/a/checkpoint-100",
    )

    adapter: AnyPath = argument("Folder of a LoRA-Over checkpoint or a PEFT LoRA.")
    model: AnyName | None = option(
        "Base model, folder or hub name.", default=None, default_text="the base model that the adapter names"
    )
    prompts: AnyPath | None = option(
        "UTF-8 text file, one question a line. Of each, the first 64 tokens are used; for vectors, classes and scores "
        "the whole text, which has to fit the model.",
        default=None,
        default_text="as many of 64 built-in questions as a verdict on a server in bfloat16 needs, or 32 texts",
    )
    new_tokens: int = option(
        "Length of PyTorch's greedy answers, in tokens; servers are compared at each of these tokens.",
        default=4,
        least=1,
    )
    device: str = device("Device that PyTorch runs on, such as cpu or cuda:1.")
    compute_dtype: str = compute_dtype(
        "Data type in which PyTorch computes; what bf16 and fp16 add to the noise is measured and allowed for."
    )
    max_memory_gib: float | None = max_memory()
    pooling: str | None = option(
        "Way in which a model of vectors makes one vector of those of its tokens.",
        default=None,
        default_text="as sentence-transformers saved it; else the last token of decoders and the first of encoders",
        choices=("mean", "cls", "last", "max"),
    )
    normalised: bool | None = option(
        "Whether vectors get the length 1.", default=None, default_text="as sentence-transformers saved it; else yes"
    )
    prefix: str | None = option(
        "Text that the server puts before each input of a model of vectors, which is not sent.",
        default=None,
        default_text="none, since servers add none by themselves",
    )
    pairs: bool | None = option(
        "Whether a classifier scores pairs of texts, as rerankers do; then a tab separates the two texts of a prompt.",
        default=None,
        default_text="if it has one label",
    )
    base_weights: AnyPaths = option(
        "Weights of the base model that a server has: a GGUF file, an ONNX graph, or the folder of a model, quantised "
        "or not. Of several weights, a check takes those that the server's base model fits.",
        default=(),
        default_text="the base model's own",
        are_different=True,
    )
    sealed: AnyPath | None = option(
        "File for a second reference with other questions, of which only the SHA-256 is published.",
        default=None,
        needs="sealed_prompts",
    )
    sealed_prompts: AnyPath | None = option(
        "UTF-8 text file with the questions of the sealed reference, one a line. Show it to nobody.",
        default=None,
        needs="sealed",
    )
    long: bool | None = option(
        "Whether to record long questions with one beginning, by which `verify --caches` finds stale keys and values.",
        default=None,
        default_text="where PyTorch takes less than a minute for them",
    )
    earlier: AnyPath | None = option(
        "Folder of an earlier version of the adapter, whose keys and values a server may have kept.",
        default=None,
        needs="long",
    )
    output: AnyPath | None = option(
        "File for the reference.", default=None, default_text=f"{REFERENCE_FILE} in the adapter's folder", short="-o"
    )
    checker: AnyPath | None = option(
        "File for the checker alone, a program of the standard library that `python FILE REFERENCE URL` runs.",
        default=None,
    )
    force: bool = option("Replace a file that exists.", default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        choose_compute(self.device, self.compute_dtype)

    def faults(self) -> Iterator[str]:
        for name, path in self.files.items():
            if path.exists() and not self.force:
                yield f"{path} exists; choose another {self.named(name)}, or give {self.named('force')}."
        if len({path.resolve() for path in self.files.values()}) < len(self.files):
            yield f"{' and '.join(map(self.named, self.files))} name one file; choose one for each."
        if len(self.base_weights) > MOST_BASES:
            given = self.named("base_weights")
            yield f"{given}: {len(self.base_weights)}, expected {MOST_BASES} at most; record fewer in one reference."
        if self.earlier is not None and not self.long:
            yield f"{self.named('earlier')} needs {self.named('long')}, which is left out."
        if self.sealed is not None:
            folders = self.adapter.resolve(), self.destination.resolve().parent
            if self.sealed_prompts == self.prompts:
                yield f"{self.named('sealed_prompts')} has the published questions; a sealed reference needs others."
            if any(self.sealed.resolve().is_relative_to(folder) for folder in folders):
                yield f"{self.named('sealed', self.sealed)} would be published with the adapter; choose another folder."

    @property
    def files(self) -> dict[str, AnyPath]:
        """The files to write, by the options that name them."""
        found = {"output": self.destination, "sealed": self.sealed, "checker": self.checker}
        return {name: path for name, path in found.items() if path is not None}

    @property
    def destination(self) -> AnyPath:
        """The file to write."""
        return self.adapter / REFERENCE_FILE if self.output is None else self.output
