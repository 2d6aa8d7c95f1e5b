"""The export of an adapter for llama.cpp: read, refuse, write, certify, compare its logits, publish; its report."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from pydantic import Field
from rich.console import Console
from torch import Tensor

from loraover.adapters.numerics.matrix_certificate import MatrixCertificate, matrix_facts
from loraover.adapters.numerics.rounding import write_rounded
from loraover.adapters.prompts import logits_of, read_prompts
from loraover.adapters.show import in_one_line, show_left_out, show_place, show_verdict, undecided
from loraover.adapters.verdict import CheckVerdict, ExportVerdict, Proof, largest, verdict_on
from loraover.checkpoint.adapter_config import write_config
from loraover.checkpoint.carried_files import keep_chat_template, keep_reference, record_for_export
from loraover.checkpoint.peft_adapter import AdapterDir, read_adapter_dir, read_on_base
from loraover.checkpoint.source import read_source
from loraover.common.atomic_output import AbandonedError, check_file_writable, check_free, publish_file
from loraover.common.errors import EngineError, ExportError, OutputError
from loraover.common.paths import kind_of
from loraover.common.provenance import environment
from loraover.common.strict_json import StrictModel
from loraover.models.load import load_model
from loraover.reference import reference_model
from loraover.reporting.reporter import print_line
from loraover.sources.verb import verb
from loraover_export.formats.gguf.header import read_header
from loraover_export.formats.gguf.llamacpp import LlamaCppModel, check_pair, load_library
from loraover_export.formats.gguf.target import GgufTarget, read_target, refuse_or_leave_out
from loraover_export.formats.gguf.write import write_adapter
from loraover_export.publishing import base_of, certified
from loraover_export.requests import GgufRequest

FLOATS = {"F32", "F16", "BF16"}
"""Storage types of GGUF files that quantise nothing."""
NOISE_FACTOR = 6.0
ARITHMETIC = 2.0**-16
"""Error of 256 successive roundings to float32, as a share of the adapter's effect."""
TABLE = 2.0**-9
"""Error of four roundings to float16, as in llama.cpp's table of GELU, as a share of the adapter's effect."""


class GgufCheck(StrictModel):
    """Logits of llama.cpp with the adapter, on a GGUF file of the base model, against the PyTorch reference's."""

    base_gguf: str = Field(description="File of the base model")
    weight_types: list[str] = Field(description="Storage types of its matrices, such as F32 or Q4_K")
    engine: str = Field(description="Version of llama-cpp-py-sync, whose libllama ran")
    prompts: int = Field(description="Number of prompts")
    tokens: int = Field(description="Number of tokens in all prompts")
    prompt_source: str = Field(description="Where the prompts come from, in words")
    base_distance: float = Field(
        description="Largest logit difference of the two base models, which is the effect of quantisation and rounding"
    )
    error: float = Field(description="Largest logit error of llama.cpp with the adapter")
    rounding_distance: float = Field(
        description="Largest change of a logit in PyTorch by the rounding of A and B to the adapter's data type"
    )
    adapter_effect: float = Field(description="Largest change that the adapter makes to a logit in PyTorch")

    arithmetic: float = Field(description="Allowed error from the engine's arithmetic, as a share of adapter_effect")

    @property
    def bound(self) -> float:
        """Largest allowed error: NOISE_FACTOR times the larger of two measured distances, or a share of the effect.

        The distance of the base models is what quantisation and the engine's arithmetic do to a model. The distance by
        rounding is what the file's data type does to the adapter; llama.cpp rounds activations to that type as well.
        The share is for a base model that is exact because its activations are small, while the adapter makes them
        large. Of 288 exports for random models with two layers, the largest error was 0.6 times its bound.
        """
        distance = max(self.base_distance, self.rounding_distance)
        return max(NOISE_FACTOR * distance, self.arithmetic * self.adapter_effect)

    @property
    def verdict(self) -> CheckVerdict:
        """Verdict on the error; inconclusive where an adapter that does nothing could pass as well."""
        return verdict_on(self.error, self.bound, self.adapter_effect)


class GgufReport(Proof):
    """Result of an export for llama.cpp."""

    verdict: ExportVerdict = Field(
        description='"not checked": every matrix is within its bound, and llama.cpp was not run'
    )
    base_model: str = Field(description="Folder or hub name of the base model")
    architecture: str = Field(description="Model class of the base model in transformers")
    family: str = Field(description="llama.cpp's name of the architecture")
    dtype: str = Field(description="Data type that the adapter is stored in: fp32, fp16 or bf16")
    rank: int = Field(description="Rank of every module; smaller ranks are padded with zeros")
    scaling: dict[str, float] = Field(description="Factor that B was multiplied by, by module")
    reordered: list[str] = Field(description="Modules whose rows of B are in llama.cpp's order")
    left_out: list[str] = Field(description="Tensors not written: copies of the base model's frozen weights")
    matrices: list[MatrixCertificate] = Field(description="One certificate for each A and each scaling * B")
    check: GgufCheck | None = Field(description="Logits of llama.cpp against PyTorch's; None without --base-gguf")
    versions: dict[str, str] = Field(description="Versions of Python and packages, by name")
    hardware: str = Field(description="Processor and accelerator of the machine, in words")


@verb(GgufRequest)
def export_gguf(request: GgufRequest) -> GgufReport:
    """Write an adapter as a GGUF file for llama.cpp, and run it there if a GGUF file of the base model is given.

    Returns:
        The report. If its verdict is "failed", nothing was written. If it is "inconclusive", the adapter was written,
        but it changes logits too little for the check to distinguish it from one that does nothing.

    Raises:
        ConfigError: Arguments that cannot be used, or a base model that cannot be loaded.
        CheckpointError: An adapter that cannot be trusted, or that belongs to another base model.
        ExportError: A model family that is not known here, or an adapter that llama.cpp cannot apply; or one that no
            reference can be recorded of, which is written all the same.
        EngineError: A GGUF file of the base model that llama.cpp cannot run.
        ModuleNotFoundError: `base_gguf` is given, and llama-cpp-py-sync is not installed.
        FoldError: An element beyond the range of `dtype`.
        OutputError: An output that cannot be written, or that exists and may not be replaced.
    """
    check_output(request)
    if request.base_gguf is not None:
        check_pair(request.base_gguf, None)
        load_library()
    adapter = read_source(request.source)
    base = base_of(request, adapter)
    target = read_target(base)
    adapter = read_on_base(adapter, target.served.experts)
    left_out = refuse_or_leave_out(adapter, target)
    compare = None if request.base_gguf is None else _comparison(request, request.base_gguf, adapter, target)
    made: list[GgufReport] = []

    def fill(draft: Path) -> None:
        name, check = request.output.stem, None
        with request.report.task("writing matrices", len(adapter.matrices)) as done:
            matrices = write_adapter(adapter, target, draft, dtype=request.dtype, name=name, on_tensor=done)
        if compare is not None:
            request.report.line("running the written adapter in llama.cpp")
            check = compare(draft)
        fields = certified(adapter, request.dtype, matrices) | {"versions": environment("gguf")}
        if fields["verdict"] == "passed":
            fields["verdict"] = "not checked" if check is None else check.verdict
        report = GgufReport(
            **fields,
            base_model=base.name,
            architecture=target.served.architecture,
            family=target.family.name,
            reordered=[path for path in adapter.modules if target.modules[path].heads is not None],
            left_out=left_out,
            check=check,
        )
        made.append(report)
        if report.verdict == "failed":
            raise AbandonedError

    publish_file(request.output, fill, parents=True, replace=request.force)
    (report,) = made
    if report.verdict != "failed":
        _write_files_beside(request)
    return report


def _write_files_beside(request: GgufRequest) -> None:
    """Write the source's reference and chat template beside the adapter, and record a new reference if asked.

    Raises:
        ExportError: An adapter that no reference can be recorded of.
    """
    folder, name = request.output.parent, request.output.name
    stem = name.removesuffix(".gguf")
    keep_reference(request.source, folder, request.report.line, (name,), stem=stem)
    keep_chat_template(request.source, folder, stem=stem)
    if request.record:
        known = () if request.base_gguf is None else (request.base_gguf,)
        weights = [file for file in known if {*read_header(file).weight_types} - FLOATS]
        how = {"model": request.model, "report": request.report}
        record_for_export(request.source, folder, (name,), stem=stem, base_weights=weights, **how)


def check_output(request: GgufRequest) -> None:
    """Check that a new file can be written, or replace a GGUF adapter if `force` is true."""
    target = request.output.absolute()
    found = kind_of(target)
    if found == "folder":
        raise OutputError(f"{target} is a folder; name a file in it, such as {target / 'adapter.gguf'}.")
    if request.force and found == "file" and not target.is_symlink():
        is_ours = False
        with suppress(EngineError):
            is_ours = read_header(target).is_adapter
        if not is_ours:
            raise OutputError(
                f"{target} holds no GGUF adapter, and {request.named('force')} replaces GGUF adapters only; choose "
                "another output."
            )
    else:
        check_free(target, outside=request.source)
    check_file_writable(target, parents=True)


def _comparison(
    request: GgufRequest, base_gguf: Path, adapter: AdapterDir, target: GgufTarget
) -> Callable[[Path], GgufCheck]:
    """Run the base model in both engines, and the adapted one in PyTorch; return the check of a written file."""
    request.report.line(f"running the base model and the reference in PyTorch, and {base_gguf} in llama.cpp")
    base = target.served.source
    model, prompts = load_model(base), read_prompts(base)

    def in_pytorch(of: AdapterDir) -> list[Tensor]:
        with reference_model(model, of) as adapted_model:
            return [logits_of(adapted_model, ids, None) for ids in prompts.batches]

    def in_engine(file: Path | None) -> list[Tensor]:
        with LlamaCppModel(base_gguf, file, request.threads) as engine:
            return [torch.from_numpy(engine.logits(ids[0].tolist())) for ids in prompts.batches]

    plain = [logits_of(model, ids, None) for ids in prompts.batches]
    adapted = in_pytorch(adapter)
    with TemporaryDirectory() as folder:
        rounding_distance = largest(adapted, in_pytorch(_rounded(adapter, Path(folder), request.dtype)))
    found = in_engine(None)
    if found[0].shape != plain[0].shape:
        raise ExportError(
            f"{base_gguf}: has {found[0].shape[1]} tokens, {base.name} has {plain[0].shape[1]}; name a GGUF file of "
            "the base model."
        )
    base_distance, effect = largest(plain, found), largest(plain, adapted)

    def check(file: Path) -> GgufCheck:
        written = in_engine(file)
        return GgufCheck(
            base_gguf=str(base_gguf),
            weight_types=read_header(base_gguf).weight_types,
            engine=version("llama-cpp-py-sync"),
            prompts=len(written),
            tokens=sum(map(len, written)),
            prompt_source=prompts.source,
            base_distance=base_distance,
            rounding_distance=rounding_distance,
            error=largest(adapted, written),
            adapter_effect=effect,
            arithmetic=TABLE if target.family.gelu else ARITHMETIC,
        )

    return check


def _rounded(adapter: AdapterDir, folder: Path, dtype: str) -> AdapterDir:
    """Write A and B in a data type as a PEFT folder, so that PyTorch can run them.

    The scaling stays in the configuration, so that a fault of the uniform form is no noise of this comparison.
    """
    try:
        write_rounded(adapter, adapter.matrices, folder, dtype)
        write_config(adapter.config.model_dump(), folder)
    except OSError as error:
        raise OutputError(f"cannot write to the temporary folder {folder}: {error.strerror or error}.") from error
    return read_adapter_dir(folder)


def show_report(report: GgufReport, request: GgufRequest, console: Console) -> None:
    """Print the certificate, the check, the verdict, and how to run the adapter if it was written."""
    facts = in_one_line(matrix_facts(report.matrices))
    print_line(console, f"{report.family}, rank {report.rank}, {report.dtype}, {facts}")
    show_left_out(report.left_out, console)
    if (check := report.check) is not None:
        kinds = "/".join(check.weight_types)
        print_line(console, f"llama.cpp against the PyTorch reference, {check.tokens} tokens, {kinds}:")
        print_line(console, f"  largest logit error {check.error:.2e}, allowed {check.bound:.2e}")
        print_line(console, f"  base model against base model {check.base_distance:.2e}")
        print_line(console, f"  change that the adapter makes {check.adapter_effect:.3g}")
        if check.verdict == "inconclusive":
            remedy = "A GGUF file of the base model in F32 allows a smaller error; "
            remedy += "if this one is in F32, it holds another model's weights."
            print_line(console, undecided("The adapter", remedy), "yellow")
    show_verdict(report, f"export {report.verdict}", console)
    if report.verdict == "not checked":
        print_line(console, "llama.cpp was not run; --base-gguf FILE compares its logits with PyTorch's")
    show_place(report, request.output, console, reason="an adapter that fails its check is not kept")
    if report.verdict != "failed":
        print_line(console, f"run it: {shlex.join(['llama-server', '-m', 'BASE.gguf', '--lora', str(request.output)])}")
