"""The export of an adapter for llama.cpp: read, refuse, write, certify, run, publish."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from loraover.checkpoint.carried_files import keep_chat_template, keep_reference
from loraover.checkpoint.peft_adapter import AdapterDir, read_on_base
from loraover.checkpoint.source import read_source
from loraover.common.atomic_output import AbandonedError, check_file_writable, check_free, publish_file
from loraover.common.errors import EngineError, OutputError
from loraover.common.paths import kind_of
from loraover.common.provenance import environment
from loraover.sources.verb import verb
from loraover_export.formats.gguf.check import LlamaCppReference, check_adapter_file, make_reference
from loraover_export.formats.gguf.header import read_header
from loraover_export.formats.gguf.llamacpp import check_pair, load_library
from loraover_export.formats.gguf.refusals import refuse_or_leave_out
from loraover_export.formats.gguf.report import GgufReport, judge_export
from loraover_export.formats.gguf.target import GgufTarget, read_target
from loraover_export.formats.gguf.write import write_adapter
from loraover_export.publishing import base_of, certified
from loraover_export.requests import GgufRequest


@verb(GgufRequest)
def export_gguf(request: GgufRequest) -> GgufReport:
    """Write an adapter as a GGUF file for llama.cpp, and run it there if a GGUF file of the base model is given.

    Returns:
        The report. If its verdict is "failed", nothing was written. If it is "inconclusive", the adapter was written,
        but it changes logits too little for the check to distinguish it from one that does nothing.

    Raises:
        ConfigError: Arguments that cannot be used, or a base model that cannot be loaded.
        CheckpointError: An adapter that cannot be trusted, or that belongs to another base model.
        ExportError: A model family that is not known here, or an adapter that llama.cpp cannot apply.
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
    return _publish(request, adapter, target, left_out)


def check_output(request: GgufRequest) -> None:
    """Check that a new file can be written, or replace a GGUF adapter if `force` is true.

    Raises:
        ConfigError: The path is too long, or a folder on it may not be entered.
        OutputError: The file cannot be written, or another one is there.
    """
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


def _publish(request: GgufRequest, adapter: AdapterDir, target: GgufTarget, left_out: list[str]) -> GgufReport:
    """Write the file, run it and judge it; where it fails, publish nothing."""
    reference = None
    if request.base_gguf is not None:
        request.report.line(
            f"running the base model and the reference in PyTorch, and {request.base_gguf} in llama.cpp"
        )
        reference = make_reference(adapter, target.served.source, request.dtype, request.base_gguf, request.threads)
    made: list[GgufReport] = []

    def fill(draft: Path) -> None:
        made.append(_write(request, adapter, target, draft, left_out, reference))
        if made[0].verdict == "failed":
            raise AbandonedError

    publish_file(request.output, fill, parents=True, replace=request.force)
    if made[0].verdict != "failed":
        name = request.output.name
        stem = name.removesuffix(".gguf")
        keep_reference(request.source, request.output.parent, request.report.line, (name,), stem=stem)
        keep_chat_template(request.source, request.output.parent, stem=stem)
    return made[0]


def _write(
    request: GgufRequest,
    adapter: AdapterDir,
    target: GgufTarget,
    draft: Path,
    left_out: list[str],
    reference: LlamaCppReference | None,
) -> GgufReport:
    with request.report.task("writing matrices", len(adapter.matrices)) as done:
        matrices = write_adapter(adapter, target, draft, dtype=request.dtype, name=request.output.stem, on_tensor=done)
    check = None
    if reference is not None:
        request.report.line("running the written adapter in llama.cpp")
        check = check_adapter_file(reference, draft, target.family, request.threads)
    fields = certified(adapter, request.dtype, matrices)
    return GgufReport(
        **fields | {"verdict": judge_export(matrices, check), "versions": environment("gguf")},
        base_model=target.served.source.name,
        architecture=target.served.architecture,
        family=target.family.name,
        reordered=[path for path in adapter.modules if target.modules[path].heads is not None],
        left_out=left_out,
        check=check,
    )
