"""The merge of an adapter from file to file: read, plan, write, certify, publish.

Files are written one tensor at a time, so that a model of any size needs the memory of one tensor.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loraover.adapters.base_weights import UNQUANTISED, BaseFiles, check_not_gguf, open_files, stored_keys
from loraover.adapters.numerics.delta import check_no_bias, read_delta
from loraover.adapters.numerics.matrix_certificate import matrix_facts
from loraover.adapters.numerics.rounding import not_kept
from loraover.adapters.numerics.tensor_rounding import round_nearest
from loraover.adapters.uniform.certificate import record_source
from loraover.adapters.uniform.refusals import HELD, check_fields
from loraover.checkpoint.base_model import base_facts
from loraover.checkpoint.base_modules import replaced_parameters, target_module
from loraover.checkpoint.files import CONFIG_FILE
from loraover.checkpoint.model_facts import CONFIG, INDEX, SINGLE
from loraover.checkpoint.peft_adapter import AdapterDir, ExactAdapter
from loraover.checkpoint.source import read_source
from loraover.checkpoint.target_modules import check_saved
from loraover.checkpoint.tensor_file import COPIED_AT_ONCE, FLOATS, TensorFile, header_of, open_tensors, torch_dtype
from loraover.common.errors import ConfigError, ExportError, FoldError
from loraover.common.provenance import environment, hardware
from loraover.common.reporter import Reporter
from loraover.common.threads import Workers, workers
from loraover.models.load import ModelSource, load_skeleton
from loraover.sources.verb import verb
from loraover_export.merge.arithmetic import (
    Lost,
    certify_merge,
    lost_by_four_bits,
    lost_by_rounding,
    merge_rows,
    out_by_in,
    row_blocks,
)
from loraover_export.merge.report import MergedWeight, MergeReport
from loraover_export.publishing import MERGED, base_of
from loraover_export.requests import MergeRequest

Merged = tuple[MergedWeight, Lost, Lost]
"""A weight's entry in the report, with the sums of what storage and a quantiser lose."""


@dataclass(frozen=True)
class PlannedTensor:
    """Tensor of the merged model.

    Args:
        key: Its key in the merged model's file.
        read: Key of the base model's tensor that it begins with, in the same shard.
        replaced: Key of the adapter's tensor that it begins with instead; None if there is none.
        module: Adapted module whose delta is added; None if there is none.
        layer: Adapted module of the base model, without weights; None if there is none.
    """

    key: str
    read: str
    replaced: str | None = None
    module: str | None = None
    layer: nn.Module | None = None

    @property
    def changes(self) -> bool:
        """Whether it differs from the base model's tensor."""
        return self.replaced is not None or self.module is not None


@dataclass(frozen=True)
class MergePlan:
    """Tensors of the merged model by shard, and whether weights that were tied have become different.

    Args:
        shards: Tensors of each file.
        untied: Names of weights that shared a tensor, and no longer do.
    """

    shards: Mapping[str, list[PlannedTensor]]
    untied: list[str]

    @property
    def changed(self) -> list[PlannedTensor]:
        """The tensors that differ from the base model's."""
        return [planned for shard in self.shards.values() for planned in shard if planned.changes]


def plan_merge(source: ModelSource, base: BaseFiles, adapter: AdapterDir, plain: TensorFile) -> MergePlan:
    """Decide what becomes of every tensor."""
    skeleton = load_skeleton(source)
    adapter.check_complete((path for path, _ in skeleton.named_modules()), skeleton.config.model_type)
    names = _Names(skeleton, base, source)
    check_saved(adapter.path / CONFIG_FILE, adapter.others.values(), names.parameters)
    replacing = replaced_parameters(skeleton, adapter, plain)
    changes: dict[str, tuple[str | None, str | None]] = {name: (key, None) for name, key in replacing.items()}
    for path in adapter.modules:
        target_module(skeleton, adapter, path)
        changes[f"{path}.weight"] = (replacing.get(f"{path}.weight"), path)
    tied = _untied(names, changes, plain)
    shards = {shard: {key: PlannedTensor(key, key) for key in file.keys} for shard, file in base.shards.items()}
    for name, (replaced, module) in (dict.fromkeys(tied, (None, None)) | changes).items():
        shard, read = names.place(name)
        key = (names.own_key(name) or name) if name in tied else read
        layer = None if module is None else skeleton.get_submodule(module)
        file, expected = base.shards[shard], tuple(names.parameters[name].shape)
        if file.dtype(read) not in FLOATS:
            raise ExportError(
                f"{source.origin}: {read} is {file.dtype(read)}, so the model is quantised; {UNQUANTISED}."
            )
        if file.shape(read) != expected:
            raise ConfigError(
                f"model: {source.origin}: {read} has shape {file.shape(read)} in the files, and {CONFIG} makes it "
                f"{expected}; they do not belong together, so fetch the model again."
            )
        shards[shard][key] = PlannedTensor(key, read, replaced, module, layer)
    return MergePlan({shard: list(tensors.values()) for shard, tensors in shards.items()}, tied)


class _Names:
    """Where the base model's files hold its parameters."""

    def __init__(self, skeleton: Any, base: BaseFiles, source: ModelSource) -> None:
        self.parameters = dict(skeleton.named_parameters(remove_duplicate=False))
        self._source = source
        self._shards = {key: shard for shard, file in base.shards.items() for key in file.keys}
        self._keys = stored_keys(skeleton, self._shards)

    def sharing(self, name: str) -> list[str]:
        """Return all names of the tensor that a parameter uses, the parameter's included."""
        return [other for other, found in self.parameters.items() if found is self.parameters[name]]

    def own_key(self, name: str) -> str | None:
        """Return the key of a parameter's tensor in the files; None if the tensor has another parameter's key."""
        return self._keys.get(name)

    def place(self, name: str) -> tuple[str, str]:
        """Return the shard and the key of a parameter, or of another that it shares its tensor with.

        Raises:
            ExportError: There is none, since transformers makes the parameter from other tensors.
        """
        for key in map(self.own_key, (name, *self.sharing(name))):
            if key is not None:
                return self._shards[key], key
        raise ExportError(
            f"{self._source.origin}: its files hold no tensor {name!r}, which transformers makes from others when it "
            "loads the model. Load it, save it with save_pretrained(..., save_original_format=False), and name that "
            f"folder with {MergeRequest.named('model')}."
        )


def _untied(names: _Names, changes: Mapping[str, tuple[str | None, str | None]], plain: TensorFile) -> list[str]:
    """Return all names of the parameters that share a tensor and are changed, unless all are replaced alike."""
    found: dict[str, None] = {}
    for name in changes:
        sharing = names.sharing(name)
        if len(sharing) > 2:
            raise ExportError(
                f"{name} shares its weight with {', '.join(other for other in sharing if other != name)}, and "
                "config.json cannot say that only one of them changed; adapt other layers only."
            )
        keys = [changes.get(other, (None, None)) for other in sharing]
        replaced = [key for key, module in keys if key is not None and module is None]
        alike = len(replaced) == 2 and (replaced[0] == replaced[1] or torch.equal(*map(plain.read, replaced)))
        if len(sharing) == 2 and not alike:
            found |= dict.fromkeys(sharing)
    return list(found)


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
        files = open_files(base, stack)
        exact = stack.enter_context(adapter.open())
        plan = plan_merge(base, files, adapter, exact.plain)
        with MERGED.draft(request, files.folder) as draft:
            files.copy_along(draft.folder)
            merged = _write(files, plan, exact, draft.folder, request.report)
            result = _report(request, base, plan, merged)
            result = draft.seal(result, request.source)
            facts = {
                "adapter": request.shown("source"),
                "merged weights": str(len(result.weights)),
                **matrix_facts([weight.matrix for weight in result.weights]),
                "share of the adapter that storage erased": f"{result.stored.erased:.2%}",
                "share of the adapter that a 4-bit quantiser would erase": f"{result.four_bit.erased:.2%}",
                **({"no longer tied": ", ".join(result.untied)} if result.untied else {}),
                **base_facts(adapter.config.base_model_name_or_path, base),
            }
            draft.describe(base.name, base.revision, facts)
    return result


def _write(files: BaseFiles, plan: MergePlan, exact: ExactAdapter, draft: Path, report: Reporter) -> list[Merged]:
    """Write the merged model's shards, the index of several, and its configuration."""
    merged: list[Merged] = []
    places: dict[str, str] = {}
    total, size, at = sum(map(len, plan.shards.values())), 0, count(1)
    with workers() as threads, report.task("writing tensors", total) as done:
        for name, tensors in plan.shards.items():
            shard = files.shards[name]
            merged += write_shard(draft / name, shard, tensors, exact, threads, lambda: done(next(at)))
            places |= {planned.key: name for planned in tensors}
            size += sum(shard.size(planned.read) for planned in tensors)
    config = files.config
    if plan.untied:
        inner, untied = config.get("text_config"), {"tie_word_embeddings": False}
        config = config | ({"text_config": inner | untied} if inner else {}) | untied
    written = {CONFIG: config}
    if [*plan.shards] != [SINGLE]:
        written[INDEX] = {"metadata": {"total_size": size}, "weight_map": places}
    for name, content in written.items():
        (draft / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
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


def write_shard(
    path: Path,
    source: TensorFile,
    tensors: Sequence[PlannedTensor],
    adapter: ExactAdapter,
    threads: Workers,
    on_tensor: Callable[[], None],
) -> list[Merged]:
    """Write one file of the merged model, tensor by tensor, and read back what was changed; threads merge rows."""
    found: list[Merged] = []
    with path.open("w+b") as file:
        read = ((planned.key, planned.read) for planned in tensors)
        file.write(header_of((key, source.dtype(old), source.shape(old), source.size(old)) for key, old in read))
        for planned in tensors:
            if planned.changes:
                try:
                    tensor, merged = _changed(planned, source, adapter, threads)
                except FoldError as error:
                    raise FoldError(
                        f"{planned.key}: {error} A merged weight keeps the base model's type; save the base model in "
                        "bfloat16 or float32 first, and merge into the saved model."
                    ) from error
                data: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
                start, rest = file.tell(), memoryview(data)
                file.write(rest)
                file.flush()
                while rest:  # read back
                    piece = os.pread(file.fileno(), COPIED_AT_ONCE, start)
                    if not piece or piece != rest[: len(piece)]:
                        raise not_kept(planned.key)
                    start, rest = start + len(piece), rest[len(piece) :]
                found += [] if merged is None else [merged]
            else:
                source.copy(planned.read, file)
            on_tensor()
    with open_tensors(path):  # the safetensors library checks the header
        return found


def _changed(
    planned: PlannedTensor, source: TensorFile, adapter: ExactAdapter, threads: Workers
) -> tuple[Tensor, Merged | None]:
    """Return a tensor that differs from the base model's."""
    name, dtype = source.dtype(planned.read), torch_dtype(source.dtype(planned.read))
    if planned.replaced is None:
        weight = source.read(planned.read)
    else:
        stored = adapter.plain.read(planned.replaced)
        weight = stored if stored.dtype == dtype else round_nearest(stored.double(), dtype)
    if planned.module is None or planned.layer is None:
        return weight, None
    delta, rows_first = read_delta(adapter, planned.module), out_by_in(planned.layer, weight)
    four_bit = lost_by_four_bits(rows_first, delta)
    parts = list(threads.map(lambda rows: merge_rows(rows_first, delta, rows), row_blocks(rows_first, delta)))
    m, n = rows_first.shape
    stored_loss, matrix = lost_by_rounding(parts), certify_merge(delta, (m, n), parts)
    size = sum(part.errors.norm**2 for part in parts) ** 0.5
    entry = MergedWeight(
        matrix=matrix,
        dtype=name,
        delta_to_weight=stored_loss.squares**0.5 / (size or 1.0),
        stored=stored_loss.result(),
        four_bit=four_bit.result(),
    )
    return weight, (entry, stored_loss, four_bit)
