"""Arguments of the exports, checked before any file is read.

They stand apart from what they ask for, since `--help` imports this module, and should not wait for anything heavy.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from loraover.adapters.uniform import request_fields
from loraover.adapters.uniform.request_fields import (
    base_model,
    check_faults,
    given_adapter,
    logits_device,
    logits_dtype,
    max_memory,
    plain_adapter,
    prompts,
    records,
    replaces,
    stored_dtype,
)
from loraover.common.request import AnyName, AnyNames, AnyPath, AnyPaths, Request, argument, option
from loraover.models.device import DTYPES, choose_compute
from loraover.sources.address import name_of
from loraover.sources.hub import keeps_private, pushes

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class FoldRequest(Request):
    """Contract CHECKPOINT's cores into a plain PEFT adapter and certify every matrix.

    CHECKPOINT is the adapter folder of a LoRA-Over run, or a checkpoint-N of a Hugging Face Trainer. Its cores are the
    small tensors that training kept in place of each LoRA matrix; multiplied out, they give the matrix again.

    Exit code 1: a check failed, and nothing was written. Exit code 3: the adapter was written, but it changes logits
    too little for --check-error to distinguish it from an adapter that does nothing.
    """

    verb = "loraover export fold"
    examples = (
        "loraover export fold runs/demo/lora-over/adapter -o folded",
        "loraover export fold output/checkpoint-500 -o folded --dtype bf16 --check-error",
        "loraover export fold output/checkpoint-500 -o folded --check-error --device cuda --compute-dtype bf16",
    )

    checkpoint: AnyPath = given_adapter("LoRA-Over checkpoint, or checkpoint-N of a Hugging Face Trainer")
    output: AnyPath = option("New folder for the adapter, its certificate, its report and a model card.", short="-o")
    dtype: str = stored_dtype()
    check_error: bool = option(
        "Also compare the adapter's logits with those of the model that still computes with cores.", default=False
    )
    trained_on: str | None = option(
        "How bitsandbytes quantised the base model in training: also measure how far logits differ between that base "
        "and the full one.",
        default=None,
        choices=("nf4", "int8"),
        needs="check_error",
    )
    record: bool = records("the folded adapter")
    push_to_hub: str | None = pushes("the folded adapter")
    private: bool = keeps_private()
    model: AnyName | None = base_model(" for the comparison of logits, and for the reference")
    prompts: AnyPath | None = prompts()
    device: str = logits_device()
    compute_dtype: str = logits_dtype()
    max_memory_gib: float | None = max_memory()
    force: bool = replaces("folded adapter")

    def faults(self) -> Iterator[str]:
        if self.record and not self.check_error:  # a reference takes all of the check's arguments but its prompts
            choose_compute(self.device, self.compute_dtype)
            yield from check_faults(self, "check_error", "prompts")
        else:
            names = ("model", "prompts", "max_memory_gib", "device", "compute_dtype")
            yield from check_faults(self, "check_error", *names)


@dataclass(frozen=True)
class MergeRequest(Request):
    """Write the base model with SOURCE merged into its weights, and say how much of the adapter rounding erased.

    SOURCE is a LoRA-Over checkpoint, a folded adapter or any plain PEFT LoRA. Each sum is computed in float64 and
    rounded once to the data type of the base model's weight. The memory is that of the largest tensor.
    `loraover export inspect-merge` says whether a merge by another tool holds an adapter.

    Exit code 1: a written weight failed its check, and nothing was written.
    """

    verb = "loraover export merge"
    examples = (
        "loraover export merge folded -o merged",
        "loraover export merge folded -o merged --model ./Qwen3-0.6B",
    )

    source: AnyPath = plain_adapter()
    output: AnyPath = option("New folder for the merged model, its certificate and a model card.", short="-o")
    model: AnyName | None = base_model()
    force: bool = replaces("merged model")


@dataclass(frozen=True)
class InspectMergeRequest(Request):
    """Say whether MERGED, weights that any tool wrote, hold ADAPTER, and how: once, not at all, twice, or in part.

    ADAPTER is a LoRA-Over checkpoint or a PEFT adapter of any kind. MERGED is a folder, hub name or address of
    safetensors files, or a GGUF file. For every module, MERGED minus the base model is compared with the adapter's
    delta, and the rest with what the number format of MERGED rounds. Tokenizers and all other tensors are compared too.

    Exit code 1: the adapter is missing in some modules, or was merged wrongly, or something else was changed. Exit code
    3: no fault was found, but not everything could be compared or decided.
    """

    verb = "loraover export inspect-merge"
    examples = (
        "loraover export inspect-merge my-lora merged --model ./Qwen3-0.6B",
        "loraover export inspect-merge my-lora merged-Q4_K_M.gguf --model ./Qwen3-0.6B",
    )

    adapter: AnyPath = given_adapter("LoRA-Over checkpoint, or PEFT adapter of any kind")
    merged: AnyName = argument("Merged model: folder, hub name or address of safetensors files, or a GGUF file.")
    model: AnyName | None = option(
        "Base model: folder, hub name or address of safetensors files, or a GGUF file in F32, F16 or BF16.",
        default=None,
        default_text="the one that the adapter names",
    )
    html: AnyPath | None = option("New .html file for a page with the strength of every module.", default=None)


@dataclass(frozen=True)
class VllmRequest(Request):
    """Write SOURCE as an adapter that vLLM, SGLang and PEFT read identically, and show how to serve it.

    SOURCE is a LoRA-Over checkpoint, a folded adapter or a PEFT adapter of any kind; a kind that has an exact plain
    LoRA, such as LoHa or PiSSA, is converted first. A pre-flight then checks it against vLLM's loading rules: what vLLM
    refuses, and what it would serve wrongly without a message.

    Exit code 2: the pre-flight found an error, and nothing was written. Exit code 1: a written matrix failed its
    check, and nothing was written.
    """

    verb = "loraover export vllm"
    examples = (
        "loraover export vllm folded -o vllm-adapter",
        "loraover export vllm folded -o vllm-adapter --model ./Qwen3-0.6B --name support --vllm-version 0.33.0",
    )
    json_help = "Print pre-flight report, certificate and commands as JSON."

    source: AnyPath = given_adapter("LoRA-Over checkpoint, folded adapter or PEFT adapter of any kind")
    output: AnyPath = option("New folder for the adapter, its reports and a model card.", short="-o")
    model: AnyName | None = option(
        "Model to be served, folder or hub name.", default=None, default_text="the adapter's base model"
    )
    convert: bool = option(
        "Convert an adapter of another kind into the plain LoRA that expresses it, if an exact one exists.",
        default=True,
    )
    dtype: str = stored_dtype("bf16")
    name: str | None = option(
        "Name by which requests choose the adapter.", default=None, default_text="the output folder's name"
    )
    vllm_version: str | None = option(
        "Release of vLLM whose rules apply, such as 0.33.0.", default=None, default_text="0.32.0"
    )
    push_to_hub: str | None = pushes("the adapter")
    private: bool = keeps_private()
    force: bool = replaces("adapter for vLLM")

    def faults(self) -> Iterator[str]:
        name = self.adapter_name
        if not name.strip() or not name.isprintable():
            yield f"{self.named('name')}: {name!r} cannot be sent in a request; choose one of printable characters."

    @property
    def adapter_name(self) -> str:
        """Name by which requests choose the adapter."""
        return str(self.output.absolute().name) if self.name is None else self.name


@dataclass(frozen=True)
class OnnxRequest(Request):
    """Write ONNX graphs with SOURCE merged into the weights, or with adapters to swap at run time.

    SOURCE is a LoRA-Over checkpoint, a folded adapter or any plain PEFT LoRA; swappable takes several. Decoder models
    become one onnxruntime-genai graph with a KV cache, T5 an encoder and a decoder, classifiers and models of
    vectors one graph.

    Exit code 1: ONNX Runtime's outputs are too far from the PyTorch reference's, and nothing was left at the
    output. Exit code 3: the export was written, but an adapter changes logits too little for the check to distinguish
    it from one that does nothing.
    """

    verb = "loraover export onnx"
    extra = "export"
    examples = (
        "loraover export onnx folded -o onnx-merged --mode merged --precision int4",
        "loraover export onnx adapter-a adapter-b -o onnx-swappable --mode swappable --name support --name sales",
        "loraover export onnx adapter-a adapter-b -o onnx-web --mode swappable --web",
        "loraover export onnx adapter-c -o more --mode swappable --web --graph onnx-web",
    )

    sources: AnyPaths = given_adapter(
        "LoRA-Over checkpoint, folded adapter or plain PEFT LoRA; a merged graph takes exactly one",
        metavar="SOURCE...",
    )
    output: AnyPath = option("New folder for the graphs, the adapters' files, the report and a model card.", short="-o")
    mode: str = option(
        "How the adapter is exported: merged into the graph's weights, or as a file that is loaded at run time.",
        choices=("merged", "swappable"),
    )
    precision: str | None = option(
        "Number format of the graph's weights.",
        default=None,
        default_text="that of an earlier graph, else fp32",
        choices=("fp32", "fp16", "int4"),
        also={DTYPES[short]: short for short in ("fp32", "fp16")},
    )
    device: str | None = option(
        "Device to build the graph for.",
        default=None,
        default_text="that of an earlier graph, else cpu",
        choices=("cpu", "cuda"),
    )
    model: AnyName | None = base_model()
    cache: bool = option(
        "Give a decoder model's graph a KV cache; an encoder-decoder model always has one, a classifier none.",
        default=True,
    )
    names: AnyNames = option(
        "Names of swappable adapters' files, in the order of the sources.",
        default=(),
        default_text="the names of the sources' folders",
        flag="--name",
    )
    graph: AnyPath | None = option(
        "Folder of an earlier swappable export whose graph the new adapters are for; only their files are written.",
        default=None,
    )
    web: bool = option(
        "Write a swappable graph and adapters for onnxruntime-web, in a browser or in node.", default=False
    )
    check: bool = option(
        "Compare ONNX Runtime's outputs with PyTorch's before anything is left at the output.", default=True
    )
    record: bool = records("each swappable adapter", ", on the graph's own weights if they are int4")
    check_device: str = request_fields.device(
        "Device that PyTorch runs on for check and reference, wherever the graph will run."
    )
    compute_dtype: str = request_fields.compute_dtype("Data type that PyTorch runs in for check and reference.")
    force: bool = replaces("ONNX export")

    def faults(self) -> Iterator[str]:
        swappable = self.named("mode", "swappable")
        if self.mode == "merged":
            if len(self.sources) != 1:
                merged = self.named("mode", "merged")
                yield f"{merged} takes one adapter, found {len(self.sources)}; export each alone, or use {swappable}."
            if given := self.given("names", "graph", "web"):
                yield f"{given}: for {swappable} only. A merged graph runs in onnxruntime-web as it is."
            if self.record:
                given = self.named("record")
                yield f"{given}: for {swappable} only, since a merged graph has no base model; leave it out."
        else:
            names, option = self.adapter_names, self.named("names")
            if len(names) != len(self.sources):
                yield f"{option} is given {len(names)} times for {len(self.sources)} sources."
            for name in names:
                if not _NAME.fullmatch(name):
                    yield (
                        f"{name!r} cannot be the name of an adapter's file; choose one of letters, digits, '.', '_' "
                        f"and '-' with {option}."
                    )
            if twice := sorted({name for name in names if names.count(name) > 1}):
                yield f"two sources are named {twice[0]!r}; give each another name with {option}, in their order."
        if self.web and self.device == "cuda":
            yield f"{self.named('web')} is for onnxruntime-web's CPU operators, found {self.named('device', 'cuda')}."
        if self.record:
            choose_compute(self.check_device, self.compute_dtype)
        else:
            yield from check_faults(self, "check", "check_device", "compute_dtype")

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """Names of the adapters, which are those of a swappable graph's files, in the order of the sources."""
        return self.names or tuple(map(name_of, self.addresses.get("sources", self.sources)))


@dataclass(frozen=True)
class GgufRequest(Request):
    """Write SOURCE as a GGUF adapter for llama.cpp, and run it there on your GGUF file of the base model.

    SOURCE is a LoRA-Over checkpoint, a folded adapter or any plain PEFT LoRA. The scaling of every module is in the
    file, rsLoRA and patterns included, and the rows of queries and keys are in llama.cpp's order. An adapter that
    llama.cpp would apply wrongly or only in part is refused.

    Exit code 1: a matrix or llama.cpp's logits failed their check, and nothing was written. Exit code 3: the adapter
    was written, but it changes logits too little for the check to distinguish it from one that does nothing.
    """

    verb = "loraover export gguf"
    extra = "llamacpp"
    examples = (
        "loraover export gguf folded -o adapter.gguf",
        "loraover export gguf runs/a/adapter -o adapter.gguf --base-gguf SmolLM2-135M-Instruct-F32.gguf",
    )

    source: AnyPath = plain_adapter()
    output: AnyPath = option("New file for the adapter, such as adapter.gguf.", short="-o")
    model: AnyName | None = base_model()
    dtype: str = stored_dtype()
    base_gguf: AnyPath | None = option(
        "GGUF file of the base model, on which llama.cpp runs the adapter for a comparison with PyTorch.", default=None
    )
    threads: int | None = option(
        "Number of threads for llama.cpp on that file.", default=None, default_text="one for each core", least=1
    )
    record: bool = records("the adapter", ", on the weights of that file if they are quantised")
    force: bool = replaces("GGUF adapter")

    def faults(self) -> Iterator[str]:
        if self.threads is not None and self.base_gguf is None:
            yield f"{self.named('threads')} is for the run in llama.cpp; use it with {self.named('base_gguf')}."
        if not self.output.name.isprintable() or not self.output.stem.strip():
            yield (
                f"{self.named('output')}: {self.output.name!r} cannot name the adapter; choose printable characters."
            )


@dataclass(frozen=True)
class MlxRequest(Request):
    """Write SOURCE as an adapter for mlx-lm, and show how to run it.

    SOURCE is a LoRA-Over checkpoint, a folded adapter or any plain PEFT LoRA. The scaling of every module is in the
    file, rsLoRA and patterns included. An adapter that mlx-lm would apply wrongly is refused.
    `loraover verify --engine mlx` compares mlx-lm's answers with PyTorch's.

    Exit code 1: a written matrix failed its check, and nothing was written.
    """

    verb = "loraover export mlx"
    examples = (
        "loraover export mlx folded -o mlx-adapter",
        "loraover export mlx runs/a/adapter -o mlx-adapter --dtype bf16",
    )

    source: AnyPath = plain_adapter()
    output: AnyPath = option("New folder for the adapter, its certificate and a model card.", short="-o")
    model: AnyName | None = base_model()
    dtype: str = stored_dtype()
    force: bool = replaces("adapter for mlx-lm")


@dataclass(frozen=True)
class AttestRequest(Request):
    """Write a statement of ADAPTER's files and of the checks that they passed, or compare the files with it.

    The statement has in-toto's form, and is attestation.json in the adapter's folder: the SHA-256 of each file, the
    verdicts of the certificates, and the SHA-256 of the certificates and of the reference. Each certificate has to name
    the SHA-256 of the files beside it. With a key, the whole folder is signed with it by OpenSSF's package
    model-signing, to model.sig.

    Exit code 1: with --check, a file or the signature is not as attested; else, a certificate has failed.
    """

    verb = "loraover export attest"
    examples = (
        "loraover export attest folded",
        "loraover export attest for-vllm --private-key signing.pem",
        "loraover export attest for-vllm --check --public-key signing.pub",
    )

    adapter: AnyPath = argument("Folder of an adapter that an export wrote.")
    check: bool = option("Compare the files with the statement that the folder holds.", default=False)
    private_key: AnyPath | None = option(
        "PEM file of an elliptic-curve key to sign the folder with.", default=None, default_text="no signature"
    )
    password_variable: str | None = option(
        "Environment variable that holds the password of the private key.", default=None, needs="private_key"
    )
    public_key: AnyPath | None = option(
        "PEM file of the public key to verify the signature with.",
        default=None,
        default_text="the signature is not verified",
        needs="check",
    )
    force: bool = replaces("attestation")

    def faults(self) -> Iterator[str]:
        if self.check and (given := self.given("private_key", "force")):
            yield f"{given}: {self.named('check')} writes nothing; leave one of them out."
        if self.password_variable is not None and self.password_variable not in os.environ:
            yield f"{self.named('password_variable')}: {self.password_variable} is not set; give the variable's name."
