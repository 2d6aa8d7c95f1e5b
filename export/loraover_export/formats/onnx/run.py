"""The ONNX export of adapters: read, write graphs and adapters' files, compare both engines' answers, publish."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import onnx
import torch

from loraover.adapters.numerics.delta import read_deltas
from loraover.adapters.numerics.matrix_certificate import MatrixCertificate, matrix_facts
from loraover.adapters.prompts import BUILT_IN_PROMPTS
from loraover.checkpoint.carried_files import keep_chat_template, record_for_export
from loraover.checkpoint.peft_adapter import saved_labels
from loraover.common.errors import ConfigError, ExportError
from loraover.common.provenance import environment, hardware
from loraover.common.strict_json import read_json
from loraover.models.device import choose_compute, choose_device
from loraover.models.load import ModelSource, load_encoder, load_model, load_tokenizer
from loraover.models.memory import Needs, memory_explained
from loraover.reference import check_fits
from loraover.sources.verb import verb
from loraover_export.formats.onnx.check import Compute, OnnxReference, check_graph, make_reference, run_cases
from loraover_export.formats.onnx.inputs import VECTORS, Inputs, find_task, read_inputs
from loraover_export.formats.onnx.kinds.base import ComparedTokens, GraphKind, GraphPlan, has_provider
from loraover_export.formats.onnx.kinds.decoder import Decoder
from loraover_export.formats.onnx.kinds.traced import HiddenStates, Seq2Seq, Stateless, check_takes_rows
from loraover_export.formats.onnx.report import GraphCheck, OnnxReport, SwappableLayout, export_verdict, read_layout
from loraover_export.formats.onnx.swappable import adapter_files, markers, write_adapter, write_swappable
from loraover_export.merge.arithmetic import merge
from loraover_export.publishing import ONNX
from loraover_export.requests import OnnxRequest


@verb(OnnxRequest)
def export_onnx(request: OnnxRequest) -> OnnxReport:
    """Write ONNX graphs with an adapter merged into the weights, or with adapters to swap at run time.

    A swappable graph takes A and B as inputs, and each adapter becomes a file with them. Adapters for the graph of an
    earlier export need the precision, device and cache of that graph, which are the defaults then. In the form for
    onnxruntime-web, the LoRA inputs are required, and adapters are safetensors files.

    Returns:
        The report, which the output holds too. If its verdict is "failed", nothing was written. If it is
        "inconclusive", the export was written, but an adapter changes logits too little for the check to distinguish
        it from one that does nothing.

    Raises:
        ConfigError: Arguments that cannot be used, a base model that cannot be loaded, or memory that does not
            suffice for the check; the message says what would fit.
        CheckpointError: An adapter that cannot be trusted, or that belongs to another base model.
        ExportError: A model or an adapter that no graph can be written for; or an adapter that no reference can be
            recorded of, which is written all the same.
        FoldError: An element beyond the range of the graph's data type.
        OutputError: An output that cannot be written, or that exists and may not be replaced.
    """
    read = [*request.sources, *(() if request.graph is None else (request.graph,))]
    ONNX.check_output(request, *read)
    inputs = read_inputs(request)
    with ONNX.draft(request, request.sources[0]) as draft:
        export = Export(request, inputs, draft.folder)
        result, draft = export.run(), replace(draft, request=export.request)
        is_merged, graphs = result.mode == "merged", export.kind.graphs
        for name, adapter in inputs.adapters.items():
            keep_chat_template(adapter.path, draft.folder, stem=None if is_merged else name)
        result = draft.seal(result)
        facts: dict[str, str] = {"mode": result.mode, "precision": result.precision, "verdict": result.verdict}
        facts |= {f"adapter {name}": source for name, source in result.adapters.items()}
        for check in result.checks:
            name = f"max {check.quantity} error, {check.adapter or 'no adapter'}"
            facts[name] = f"{check.error:.2e}, allowed {check.bound:.2e}"
        facts |= matrix_facts(result.matrices) | inputs.base.facts()
        draft.describe(result.base_model, inputs.base.revision, facts)
        written: dict[str, list[str]] = {}
        for name, adapter in inputs.adapters.items():
            own = {file.name for graph in graphs for file in adapter_files(Path(name), graph, graphs)}
            found = [path for path in draft.folder.iterdir() if path.is_file()]
            written[name] = [  # of a merged export, every file with numbers holds some of the adapter
                path.name for path in found if (path.suffix not in (".json", ".md") if is_merged else path.name in own)
            ]
            draft.keep_reference(adapter.path, written[name], stem=name)
    if request.record and result.verdict != "failed":
        export.record(written)
    return result


KINDS: dict[str, type[GraphKind]] = {
    "CAUSAL_LM": Decoder,
    "SEQ_2_SEQ_LM": Seq2Seq,
    "SEQ_CLS": Stateless,
    "TOKEN_CLS": Stateless,
    "FEATURE_EXTRACTION": HiddenStates,
}
# ONNX Runtime registers these among the standard operators; the standard's own checker does not know them.
RUNTIME_OPERATORS = ("SimplifiedLayerNormalization",)
ROWS = 3, 12  # rows and tokens in each, from which the checks cut their cases
WEB_INT4 = (
    "onnxruntime-web computes int4 graphs in another way than the ONNX Runtime that checks them here: logits of "
    "SmolLM2 differed by up to 1.8. Use fp32 where answers must agree."
)


class Export:
    """ONNX export, step by step.

    Args:
        inputs: The sources and their base model.
        draft: An empty folder for the files.

    Raises:
        ConfigError: No such base model, a task that no graph is made for, or an option that does not fit it.
        ExportError: An earlier graph that has another base model or form, or an encoder-decoder model that is no T5.
    """

    def __init__(self, request: OnnxRequest, inputs: Inputs, draft: Path) -> None:
        self.inputs, self.draft, self.report = inputs, draft, request.report
        if request.graph is not None:
            request = _as_exported(request, request.graph, read_earlier(request.graph, inputs.base))
        self.plan = GraphPlan(request.precision or "fp32", request.device or "cpu")
        self.request = replace(request, precision=self.plan.precision, device=self.plan.device)
        if self.request.web and self.plan.precision == "int4":
            self.report.line(WEB_INT4)
        self.task = find_task(inputs.task_type, inputs.base)
        if KINDS[self.task] is Seq2Seq and not self.request.cache:
            raise ConfigError(
                f"{request.named('cache', False)} is for decoder models; {inputs.base.origin} is an encoder-decoder "
                "model, whose graphs always have a cache. Leave it out."
            )
        kind = KINDS[self.task]
        self.kind = kind() if self.request.cache or issubclass(kind, Stateless) else Stateless()
        self.deltas = {name: list(read_deltas(adapter)) for name, adapter in inputs.adapters.items()}

    def run(self) -> OnnxReport:
        """Write graphs and adapters, check them, and return the report.

        Raises:
            LoraOverError: A model or an adapter that cannot be exported; a check that fails is in the report.
        """
        request, device, base = self.request, self.plan.device, self.inputs.base
        with nullcontext() if request.graph else self.kind.prepared():
            if request.check or request.graph is None:
                self._load()
            cases = self.kind.cases(token_rows(self.tokenizer, self.model)) if request.check else []
            references = self._references(cases) if request.check else {}
            matrices, found_base = self._write(cases)
            checks = self._check(cases, references, found_base) if request.check else []
        return OnnxReport(
            verdict=export_verdict(checks, matrices),
            mode=request.mode,
            precision=self.plan.precision,
            device=device,
            cache=not isinstance(self.kind, Stateless),
            web=request.web,
            check_device=str(choose_device(request.check_device)) if request.check else None,
            compute_dtype=request.compute_dtype if request.check else None,
            checked_on=(device if has_provider(device) else "cpu") if request.check else None,
            base_model=base.name,
            adapters={name: str(adapter.path) for name, adapter in self.inputs.adapters.items()},
            checks=checks,
            matrices=matrices,
            versions=environment("onnx", "onnxruntime", "onnxruntime-genai"),
            hardware=hardware(),
        )

    def record(self, written: Mapping[str, Sequence[str]]) -> None:
        """Record the reference of each swappable adapter beside it; of int4 decoders, on the weights of the graph.

        Args:
            written: Names of the files of each adapter in the output.
        """
        request = self.request
        is_quantised = self.plan.precision == "int4" and self.task == "CAUSAL_LM"
        how = {
            "base_weights": [request.graph or request.output] if is_quantised else [],
            "model": request.model,
            "device": request.check_device,
            "compute_dtype": request.compute_dtype,
            "report": request.report,
        }
        for name, adapter in self.inputs.adapters.items():
            record_for_export(adapter.path, request.output, written[name], stem=name, **how)

    def _load(self) -> None:
        """Load the base model and its tokenizer, and check that every adapter fits."""
        base, adapters = self.inputs.base, self.inputs.adapters.values()
        self.report.line(f"loading the base model from {base.origin}")
        self.tokenizer = load_tokenizer(base)
        labels = next(filter(None, (saved_labels(adapter.shapes) for adapter in adapters)), None)
        if self.task == VECTORS:
            self.model = load_encoder(base, {path for adapter in adapters for path in adapter.modules})
        else:
            self.model = load_model(base, task_type=self.task, num_labels=labels)
        if (choose := getattr(self.model, "set_experts_implementation", None)) is not None:  # transformers 5 on
            choose("eager")  # the others have no float64, in which the check runs
        for adapter in adapters:
            check_fits(self.model, adapter)
        if self.task == "SEQ_CLS":
            check_takes_rows(self.model, base)

    def _references(self, cases: list[ComparedTokens]) -> dict[str | None, OnnxReference]:
        """PyTorch's outputs by adapter; the key None has those without an adapter."""
        request, adapters = self.request, self.inputs.adapters
        device, dtype = choose_compute(request.check_device, request.compute_dtype)

        def needs() -> Needs:
            return Needs.of_model(
                self.inputs.base,
                adapters=sum(prod(shape) for adapter in adapters.values() for shape in adapter.shapes.values()),
                tokens=max(case.ids.numel() for case in cases),
                copies=2 if device.type == "cpu" else 1,  # it is written as well, on the CPU
                logits=3,
                at_least=8 if self.plan.precision == "fp32" else 4,  # the noise is that of float32 against a wider run
            )

        where = {"device": str(device), "compute_dtype": request.compute_dtype}
        found: dict[str | None, OnnxReference] = {}
        label, merged = "running the adapted models in PyTorch, adapters", request.mode == "merged"
        with (
            memory_explained("the check in PyTorch", needs=needs, option="check_device", **where),
            self.report.task(label, len(adapters) + 1) as done,
        ):
            for name, adapter in [(None, None), *adapters.items()]:
                found[name] = make_reference(
                    *(self.kind, self.model, adapter, cases, self.plan.precision),
                    merged=merged,
                    compute=Compute(device, dtype),
                )
                done(len(found))
        return found

    def _write(self, cases: list[ComparedTokens]) -> tuple[list[MatrixCertificate], list[torch.Tensor] | None]:
        """Write graphs and adapters into the draft; also return a merged int4 graph's logits without the adapter."""
        request = self.request
        if request.graph is not None:
            return self._write_adapters(read_layout(request.graph, self.kind.graphs)), None
        if request.mode == "swappable":
            every = {delta.module: delta for deltas in self.deltas.values() for delta in deltas}
            rank = max(delta.rank for delta in every.values())
            drawn = markers(every.values(), rank)
            self._export(replace(self.plan, markers=drawn, rank=rank), self.draft)
            dtype = "fp16" if self.plan.precision == "fp16" else "fp32"
            layout = write_swappable(self.draft, self.kind.graphs, drawn, self.inputs.base.name, dtype, web=request.web)
            return self._write_adapters(layout), None
        found_base = None
        if request.check and self.plan.precision == "int4":
            folder = self.draft / ".base"
            folder.mkdir()
            self._export(self.plan, folder)
            found_base = run_cases(self.kind, self.kind.runner(folder, self.plan.device, None), cases)
            shutil.rmtree(folder)
        ((name, adapter),) = self.inputs.adapters.items()
        certificates = merge(self.model, adapter, self.deltas[name])
        self._export(self.plan, self.draft)
        return certificates, found_base

    def _export(self, plan: GraphPlan, out: Path) -> None:
        self.report.line(f"building the {plan.precision} graph of {type(self.model).__name__}")
        work = out / ".work"
        work.mkdir()
        self.kind.export(self.model, self.tokenizer, plan, work, out)
        shutil.rmtree(work)
        for graph in self.kind.graphs:
            check_file(out / graph)

    def _write_adapters(self, layout: SwappableLayout) -> list[MatrixCertificate]:
        return [
            certificate
            for name, deltas in self.deltas.items()
            for certificate in write_adapter(self.draft / name, layout, self.kind.graphs, deltas)
        ]

    def _check(
        self,
        cases: list[ComparedTokens],
        references: dict[str | None, OnnxReference],
        found_base: list[torch.Tensor] | None,
    ) -> list[GraphCheck]:
        folder = self.request.graph or self.draft
        if found_base is None and self.plan.precision == "int4":
            found_base = run_cases(self.kind, self.kind.runner(folder, self.plan.device, None), cases)
        checks = []
        for name, reference in references.items():
            if self.request.mode == "merged" and name is None:
                continue
            self.report.line(f"running the graph in ONNX Runtime, {'no adapter' if name is None else name}")
            adapter = None if name is None or self.request.mode == "merged" else self.draft / name
            known = None if name is None else found_base
            found = check_graph(self.kind, folder, self.plan.device, adapter, cases, reference, references[None], known)
            checks += [check.model_copy(update={"adapter": name}) for check in found]
        return checks


def token_rows(tokenizer: Any, model: Any) -> torch.Tensor:
    """Rows of token ids of real text, repeated until there are enough; of all ids if the text has no tokens."""
    ids: list[int] = []
    for prompt in BUILT_IN_PROMPTS:
        ids += tokenizer(prompt, add_special_tokens=False).input_ids
    ids = ids or list(range(model.get_input_embeddings().num_embeddings))
    while len(ids) < prod(ROWS):
        ids += ids
    return torch.tensor(ids[: prod(ROWS)]).reshape(ROWS)


def read_earlier(graph: Path, base: ModelSource) -> OnnxReport:
    """Read the report of an earlier swappable export, for whose graph further adapters are written.

    Args:
        graph: Folder of the export.
        base: Base model of the adapters.

    Raises:
        CheckpointError: No report of an ONNX export in the folder.
        ExportError: A merged export, or a graph of another base model.
    """
    exported = read_json(graph / ONNX.certificate, OnnxReport)
    if exported.mode != "swappable":
        raise ExportError(f"{graph} is a {exported.mode} export; adapters can be added to a swappable one only.")
    if exported.base_model != base.name:
        raise ExportError(
            f"{graph} is a graph of {exported.base_model}, but the adapters belong to {base.name}; export a graph of "
            f"that model, or name a copy of it with {OnnxRequest.named('model')}."
        )
    return exported


def _as_exported(request: OnnxRequest, graph: Path, exported: OnnxReport) -> OnnxRequest:
    """Return the request with the settings of the earlier graph to which adapters are added; refuse other settings."""
    if request.web and not exported.web:
        raise ExportError(
            f"{graph} was exported without {request.named('web')}; leave it out, or export another graph with it."
        )
    for field in ("precision", "device"):
        asked, found = getattr(request, field), getattr(exported, field)
        if asked not in (None, found):
            raise ExportError(
                f"{graph} was exported with {request.named(field, found)}; leave {request.named(field, asked)} out, "
                "or export another graph with it."
            )
    if exported.cache and not request.cache:
        raise ExportError(
            f"{graph} was exported with a cache; leave out {request.named('cache', False)}, or export another graph "
            "with it."
        )
    return replace(
        request, precision=exported.precision, device=exported.device, cache=exported.cache, web=exported.web
    )


def check_file(graph: Path) -> None:
    """Check the structure, the types of standard operators and the external data of a graph."""
    model = onnx.load(graph, load_external_data=False)
    for node in model.graph.node:
        if node.op_type in RUNTIME_OPERATORS and node.domain == "":
            node.domain = "com.microsoft"
    copy = graph.with_name(f".{graph.name}.check")  # in the graph's folder, where its external data is
    try:
        onnx.save(model, copy)
        onnx.checker.check_model(copy)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"{graph.name}: the onnx checker refuses it: {error}") from error
    finally:
        copy.unlink(missing_ok=True)
