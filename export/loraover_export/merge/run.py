"""The merge of an adapter from file to file: read, plan, stream, certify, publish."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

from loraover.adapters.base_files import BaseFiles, check_not_gguf, open_base
from loraover.adapters.numerics.delta import check_no_bias
from loraover.adapters.numerics.matrix_certificate import matrix_facts
from loraover.adapters.uniform.certificate import record_source
from loraover.adapters.uniform.refusals import HELD, check_fields
from loraover.checkpoint.base_model import base_facts
from loraover.checkpoint.header_facts import INDEX, SINGLE
from loraover.checkpoint.model_facts import CONFIG
from loraover.checkpoint.peft_adapter import AdapterDir, ExactAdapter
from loraover.checkpoint.source import read_source
from loraover.common.provenance import environment, hardware
from loraover.common.reporter import Reporter
from loraover.common.threads import workers
from loraover.models.load import ModelSource
from loraover.sources.verb import verb
from loraover_export.merge.plan import MergePlan, plan_merge
from loraover_export.merge.report import MergeReport
from loraover_export.merge.rounding_loss import Lost
from loraover_export.merge.stream import Merged, write_shard
from loraover_export.publishing import MERGED, base_of
from loraover_export.requests import MergeRequest


@verb(MergeRequest)
def merge_adapter(request: MergeRequest) -> MergeReport:
    """Write the base model with an adapter merged into its weights, as a Hugging Face checkpoint.

    Every adapted weight becomes W + scaling * B @ A, computed in float64 and rounded once to the data type of W. The
    other tensors are copied byte by byte, in the shards of the base model; the memory is that of the largest tensor.
    Parameters that the adapter holds in full (`modules_to_save`, biases) replace those of the base model, as PEFT loads
    them. Where embedding and head share one matrix and the adapter changes them differently, they become two matrices,
    and `config.json` then states that they are not tied. The tokenizer and the other files of the base model come
    along, and the adapter's chat template if it has one.

    Returns:
        The report, which the output holds too: the error of every merged weight with its bound, and which share of
        the adapter the storage type has erased and a 4-bit quantiser would erase. If its verdict is "failed", nothing
        was written.

    Raises:
        ConfigError: A base model that cannot be read.
        CheckpointError: An adapter that cannot be trusted, or that belongs to another base model.
        ExportError: A quantised base model, one whose files name tensors in another way than transformers does, or an
            adapter that a merged model cannot hold.
        FoldError: An element beyond the range of its data type.
        OutputError: An output that cannot be written, or that exists and may not be replaced.
    """
    check_not_gguf(request.model)
    inputs = [request.source, *(Path(found) for found in (request.model,) if found is not None)]
    MERGED.check_output(request, *inputs)
    adapter = read_source(request.source)
    adapter.check_keeps_base()
    check_no_bias(adapter)
    check_fields(adapter, "merge it with PEFT", allowed=HELD)
    if request.model is None:
        check_not_gguf(adapter.config.base_model_name_or_path)
    base = base_of(request, adapter)
    with ExitStack() as stack:
        files = open_base(base, stack)
        exact = stack.enter_context(adapter.open())
        plan = plan_merge(base, files, adapter, exact.plain)
        return _publish(request, base, files, plan, exact)


def _publish(
    request: MergeRequest, base: ModelSource, files: BaseFiles, plan: MergePlan, exact: ExactAdapter
) -> MergeReport:
    """Write the merged model with its certificate and card; where the certificate fails, publish nothing."""
    with MERGED.draft(request, files.folder) as draft:
        files.copy_along(draft.folder)
        merged = _write(files, plan, exact, draft.folder, request.report)
        result = _report(request, base, plan, merged)
        _write_json(draft.folder / CONFIG, _config(files.config, plan))
        if [*plan.shards] != [SINGLE]:
            _write_json(draft.folder / INDEX, _index(files, plan))
        result = draft.seal(result, request.source)
        draft.describe(base.name, base.revision, _facts(request, base, exact.adapter, result))
    return result


def _write(files: BaseFiles, plan: MergePlan, exact: ExactAdapter, draft: Path, report: Reporter) -> list[Merged]:
    merged: list[Merged] = []
    total, at = sum(map(len, plan.shards.values())), count(1)
    with workers() as threads, report.task("writing tensors", total) as done:
        for name, tensors in plan.shards.items():
            merged += write_shard(draft / name, files.shards[name], tensors, exact, threads, lambda: done(next(at)))
    return merged


def _report(request: MergeRequest, base: ModelSource, plan: MergePlan, merged: Sequence[Merged]) -> MergeReport:
    stored, four_bit = Lost(), Lost()
    for _, rounding, quantising in merged:
        stored.add(rounding)
        four_bit.add(quantising)
    weights = [entry for entry, _, _ in merged]
    return MergeReport(
        verdict="passed" if all(weight.matrix.passed for weight in weights) else "failed",
        base_model=base.name,
        revision=base.revision,
        source=record_source(request.source),
        tensors=sum(map(len, plan.shards.values())),
        replaced=[planned.key for planned in plan.changed if planned.replaced is not None],
        untied=plan.untied,
        stored=stored.result(),
        four_bit=four_bit.result(),
        weights=weights,
        versions=environment(),
        hardware=hardware(),
    )


def _config(config: dict[str, Any], plan: MergePlan) -> dict[str, Any]:
    if not plan.untied:
        return config
    inner = config.get("text_config")
    nested = {"text_config": inner | {"tie_word_embeddings": False}} if inner else {}
    return config | nested | {"tie_word_embeddings": False}


def _index(files: BaseFiles, plan: MergePlan) -> dict[str, Any]:
    places = {planned.key: name for name, tensors in plan.shards.items() for planned in tensors}
    sizes = (files.shards[name].size(planned.read) for name, tensors in plan.shards.items() for planned in tensors)
    return {"metadata": {"total_size": sum(sizes)}, "weight_map": places}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _facts(request: MergeRequest, base: ModelSource, adapter: AdapterDir, result: MergeReport) -> dict[str, str]:
    return {
        "adapter": request.shown("source"),
        "merged weights": str(len(result.weights)),
        **matrix_facts([weight.matrix for weight in result.weights]),
        "share of the adapter that storage erased": f"{result.stored.erased:.2%}",
        "share of the adapter that a 4-bit quantiser would erase": f"{result.four_bit.erased:.2%}",
        **({"no longer tied": ", ".join(result.untied)} if result.untied else {}),
        **base_facts(adapter.config.base_model_name_or_path, base),
    }
