"""Adapters for mlx-lm: what it cannot apply, the files that it loads, their certificate, and how to run them.

mlx-lm computes y + scale * (x @ lora_a) @ lora_b, with lora_a (in_features, r) and lora_b (r, out_features), so A and B
are transposed. Source: mlx_lm/tuner/lora.py and `load_adapters` of mlx_lm/tuner/utils.py, release 0.32.2.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from rich.console import Console

from loraover.adapters.base_weights import check_base_weights
from loraover.adapters.numerics.matrix_certificate import MatrixCertificate, matrix_facts
from loraover.adapters.numerics.rounding import round_exact, save_and_compare
from loraover.adapters.show import show_left_out, show_matrices, show_place
from loraover.adapters.uniform.folder import to_uniform
from loraover.adapters.uniform.refusals import check_fields, check_shape, check_tensors
from loraover.adapters.verdict import Certificate
from loraover.checkpoint.base_model import base_facts
from loraover.checkpoint.exact_tensors import ExactArray
from loraover.checkpoint.files import CONFIG_FILE
from loraover.checkpoint.model_facts import ServedModel, read_served
from loraover.checkpoint.peft_adapter import AdapterDir
from loraover.checkpoint.source import read_source
from loraover.checkpoint.target_modules import if_missing
from loraover.common.errors import ExportError
from loraover.models.load import ModelSource
from loraover.reporting.reporter import print_line
from loraover.sources.verb import verb
from loraover_export.publishing import MLX, EngineFormat, base_of, certified
from loraover_export.requests import MlxRequest

MERGE = "merge the adapter into the base model with PEFT, and convert the merged model with mlx_lm.convert"

SAME_NAMES = (
    "Cohere2ForCausalLM",
    "CohereForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "GemmaForCausalLM",
    "Glm4ForCausalLM",
    "GraniteForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Olmo2ForCausalLM",
    "Phi3ForCausalLM",
    "PhiForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "SmolLM3ForCausalLM",
    "StableLmForCausalLM",
    "Starcoder2ForCausalLM",
)
"""Model classes whose linear layers and embeddings have the same paths in mlx-lm.

Source: mlx_lm/models of ml-explore/mlx-lm at d78bf58e217c, in the module of each class's `model_type`.
"""

TENSORS_FILE = "adapters.safetensors"


class MlxReport(Certificate):
    """Errors of the matrices of a written adapter, and the contents of `mlx_certificate.json`."""

    verdict: Literal["passed", "failed"] = Field(
        description='"passed" if every matrix is within its bound; mlx-lm was not run'
    )
    base_model: str = Field(description="Folder or hub name of the base model")
    architecture: str = Field(description="Model class of the base model in transformers")
    dtype: str = Field(description="Data type that the adapter is stored in: fp32, bf16 or fp16")
    rank: int = Field(description="Rank of every module; smaller ranks are padded with zeros")
    scaling: dict[str, float] = Field(description="Factor that B was multiplied by, by module")
    left_out: list[str] = Field(description="Tensors not written: copies of the base model's frozen weights")
    lost_settings: dict[str, Any] = Field(
        description="Entries that mlx-lm 0.32 needs at the top level of the base model's config.json, and that it lacks"
    )
    matrices: list[MatrixCertificate] = Field(description="One certificate for each A and each scaling * B")
    versions: dict[str, str] = Field(description="Versions of Python and packages, by name")
    hardware: str = Field(description="Processor and accelerator of the machine, in words")


@verb(MlxRequest)
def export_mlx(request: MlxRequest) -> MlxReport:
    """Write an adapter as a folder that mlx-lm loads, with each module's scaling in B.

    Returns:
        The certificate of what was written. If its verdict is "failed", nothing was written.

    Raises:
        ConfigError: A base model that cannot be loaded.
        CheckpointError: An adapter that cannot be trusted, or that belongs to another base model.
        ExportError: An adapter that mlx-lm cannot apply.
        FoldError: An element beyond the range of `dtype`.
        OutputError: An output that cannot be written, or that exists and may not be replaced.
    """
    MLX.check_output(request, request.source)
    adapter = read_source(request.source)
    base = base_of(request, adapter)
    target = read_target(base)
    left_out = refuse_or_leave_out(adapter, target)
    with MLX.draft(request, request.source) as draft:
        with request.report.task("writing matrices", len(adapter.matrices)) as done:
            matrices = write_adapter(adapter, target, draft.folder, request.dtype, done)
        report = MlxReport(
            **certified(adapter, request.dtype, matrices),
            base_model=base.name,
            architecture=target.architecture,
            left_out=left_out,
            lost_settings=lost_settings(base),
        )
        report = draft.seal(report, request.source)
        facts = {"rank": str(report.rank), "stored as": report.dtype, **matrix_facts(matrices)}
        draft.describe(base.name, base.revision, facts | base_facts(base.name, base))
        draft.keep_reference(request.source, (CONFIG_FILE, TENSORS_FILE))
    return report


def read_target(source: ModelSource) -> ServedModel:
    """Read the configuration of a base model."""
    target = read_served(source, SAME_NAMES)
    if target.architecture not in SAME_NAMES:
        known = ", ".join(name.removesuffix("ForCausalLM") for name in SAME_NAMES)
        raise ExportError(
            f"{source.name} is a {target.architecture}, whose modules may have other names in mlx-lm. It refuses "
            f"unknown names, and before 0.32.2 ignores them silently. The names are known to agree for {known}. "
            f"{MERGE[0].upper()}{MERGE[1:]}."
        )
    return target


def refuse_or_leave_out(adapter: AdapterDir, target: ServedModel) -> list[str]:
    """Check that mlx-lm can apply an adapter to its base model.

    Returns:
        Keys of tensors that are left out, because they are copies of the base model's frozen weights.

    Raises:
        LoraOverError: An adapter that mlx-lm would refuse, or apply wrongly.
    """
    adapter.check_keeps_base()
    shapes, where, base = target.shapes(), adapter.tensors_path, target.source.name
    adapter.check_complete(shapes, target.model_type)
    check_fields(adapter, MERGE)
    for path in adapter.modules:
        if path not in shapes:
            raise ExportError(
                f"{where}: adapts {path}, which is neither a linear layer nor an embedding of {base}; "
                f"{if_missing(path, shapes)}, or {MERGE}."
            )
        is_embedding = target.modules[path].kind == "embedding"
        check_shape(adapter, path, shapes[path], is_embedding=is_embedding, base=base)
        if target.is_tied and (is_embedding or path == "lm_head"):
            raise ExportError(
                f"{where}: adapts {path}, but the embedding and the head of {base} are one matrix, which mlx-lm adapts "
                f"in both places or not at all. Train without {path.rpartition('.')[2]}, or {MERGE}."
            )
    copies = check_tensors(adapter, shapes, MERGE)
    check_base_weights(adapter, copies, target.source, MERGE)
    return copies


def lost_settings(source: ModelSource) -> dict[str, Any]:
    """Return the entries that mlx-lm would not find at the top level of a base model's `config.json`, to be added.

    transformers 5 writes rotary embeddings into `rope_parameters`, and many models of mlx-lm 0.32 read `rope_theta`,
    `partial_rotary_factor` and `rope_scaling` at the top level only: without a message, they take their own defaults.
    """
    from transformers import PretrainedConfig

    raw, _ = PretrainedConfig.get_config_dict(source.location, revision=source.revision)
    rope = raw.get("rope_parameters") or {}
    whole = rope.get("full_attention", rope)
    found = {key: whole[key] for key in ("rope_theta", "partial_rotary_factor") if key in whole}
    if whole.get("rope_type", "default") != "default":
        found["rope_scaling"] = whole
    if "rope_theta" in rope.get("sliding_attention", {}):
        found["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    return {key: value for key, value in found.items() if key not in raw}


def write_adapter(
    adapter: AdapterDir, target: ServedModel, directory: Path, dtype: str, on_tensor: Callable[[int], None]
) -> list[MatrixCertificate]:
    """Write the tensors and the configuration, and certify each matrix against its exact value."""
    form = to_uniform(adapter)

    def transposed(key: str, exact: ExactArray) -> ExactArray:
        matrix = form(key, exact)
        return ExactArray(matrix.value.T, None if matrix.bound is None else matrix.bound.T, matrix.site)

    rounded, certificates = round_exact(adapter, adapter.matrices, dtype, prepare=transposed, on_tensor=on_tensor)
    places = adapter.matrices.items()
    tensors = {f"{module.path}.lora_{side.lower()}": rounded[key] for key, (module, side) in places}
    save_and_compare(tensors, directory / TENSORS_FILE)
    config = {
        "model": target.source.name,
        "fine_tune_type": "lora",
        "num_layers": target.layers,
        "lora_parameters": {"rank": adapter.rank, "scale": 1.0, "dropout": 0.0, "keys": list(adapter.modules)},
    }
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    return certificates


def show_report(report: MlxReport, request: MlxRequest, console: Console) -> None:
    """Print the certificate, and how to run the adapter if it was written."""
    show_matrices(report, console)
    show_left_out(report.left_out, console)
    if report.passed and report.lost_settings:
        print_line(
            console,
            f"config.json of {report.base_model} has these settings only within rope_parameters, where mlx-lm 0.32 "
            f"does not find them for every model; add them at the file's top level: {json.dumps(report.lost_settings)}",
            "yellow",
        )
    show_place(report, request.output, console)
    if report.passed:
        words = ["mlx_lm.generate", "--model", report.base_model, "--adapter-path", str(request.output)]
        print_line(console, f"run it: {shlex.join([*words, '--prompt', 'Hello'])}")


FORMAT = EngineFormat(
    verb="mlx",
    reader="mlx-lm 0.32.2",
    refuses_peft="mlx-lm stops with an AttributeError, since it expects num_layers and lora_parameters in "
    "adapter_config.json, and transposed matrices in adapters.safetensors",
    check=lambda adapter, base: refuse_or_leave_out(adapter, read_target(base)),
    export=export_mlx,
)
