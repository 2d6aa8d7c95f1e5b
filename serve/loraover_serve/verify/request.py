"""The arguments of a verification, checked before anything starts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from threading import TIMEOUT_MAX

from loraover.adapters.uniform.request_fields import given_adapter
from loraover.common.request import AnyNames, AnyPath, AnyPaths, option
from loraover.models.device import choose_compute
from loraover.models.request_fields import compute_dtype, device, max_memory
from loraover_serve.engines import ENDPOINT, ENGINES
from loraover_serve.engines.request import EngineRequest
from loraover_serve.judge.limits import NUMBER_FORMATS, REPEATS
from loraover_serve.vllm.request import SET_BY_SERVE


@dataclass(frozen=True)
class VerifyRequest(EngineRequest):
    """Verify that engines answer as an adapter was trained, and name the likely fault if one does not.

    ADAPTER is a LoRA-Over checkpoint or any plain PEFT LoRA of a causal language model. An engine gets it in the form
    that it needs, and answers the same prompts as PyTorch. Its distance from PyTorch on the base model is its noise.

    With --reference, a running server is compared with what `loraover record` wrote, without PyTorch, ADAPTER and
    the base model.

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
    )
    refused = dict.fromkeys(SET_BY_SERVE, "verify sets it")

    adapter: AnyPath | None = given_adapter("LoRA-Over checkpoint, or PEFT adapter of any kind", default=None)
    references: AnyPaths = option(
        "Reference that `loraover record` wrote, or folder with references below it, in place of ADAPTER.",
        default=(),
        flag="--reference",
        needs="endpoint",
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
        "Name by which the server at the endpoint serves the adapter, one for each reference.",
        default=(),
        default_text="with references, the names of the adapters' folders",
        needs="endpoint",
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
        needs="references",
    )
    ca_file: AnyPath | None = option(
        "PEM file of certificates that sign the server's.",
        default=None,
        default_text="those of Python",
        needs="references",
    )
    protocol: str | None = option(
        "Protocol of the server.",
        default=None,
        default_text="tried one after the other",
        choices=("openai", "sglang", "tgi", "llama-server"),
        needs="references",
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
        needs="references",
    )
    quick: bool = option(
        "Send 8 requests, which only show whether the adapter is applied at all.", default=False, needs="references"
    )
    without_mixed: bool = option(
        "Leave out the requests that ask both models at once, and judge the other answers alone.", default=False
    )
    junit: AnyPath | None = option("File for the verdicts in the form of JUnit.", default=None, needs="references")
    confusable: AnyPaths = option(
        "Folder of another adapter that the engine may serve by mistake, for example under a wrong name.",
        default=(),
        default_text="the newest eight of this base model beside ADAPTER",
        flag="--confusable",
    )
    served_format: str = option(
        "Coarsest number format in which the engine is known to hold the base model, or its KV cache.",
        default="bf16",
        default_text="bf16, or what a named GGUF file holds",
        choices=NUMBER_FORMATS,
    )
    prompts: AnyPath | None = option(
        "UTF-8 text file, one prompt a line; the first 256 tokens of each are used.",
        default=None,
        default_text="eight built-in prompts",
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
        """Coarsest number format that is expected: with a GGUF file of the user's, whatever it holds."""
        return self.served_format if self.base_gguf is None else NUMBER_FORMATS[-1]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loads_models:
            choose_compute(self.device, self.compute_dtype)

    @property
    def loads_models(self) -> bool:
        return not self.references

    def faults(self) -> Iterator[str]:
        adapter, references, endpoint = (self.named(name) for name in ("adapter", "references", "endpoint"))
        if (self.adapter is None) == (not self.references):
            yield f"give {adapter} or {references}, and not both."
        if self.endpoint is not None and not self.served_name and not self.references:
            yield f"{endpoint} needs {self.named('served_name')}, which is missing."
        if len(self.served_name) > 1 and not self.references:
            yield f"{self.named('served_name')}: {len(self.served_name)}, expected one for the adapter."
        if self.published is not None and (len(self.references) != 1 or self.references[0].is_dir()):
            yield f"{self.named('published')} seals one file; give one {references}."
        if self.references and self.engines:
            yield f"{self.named('engines')}: PyTorch compares engines that it starts; leave out {references}."
        yield from super().faults()

    @property
    def asked(self) -> tuple[str, ...]:
        """The engines with the server at the endpoint; ONNX Runtime if neither is given."""
        given = (*self.engines, *(() if self.endpoint is None else (ENDPOINT,)))
        return given or ("onnx",)
