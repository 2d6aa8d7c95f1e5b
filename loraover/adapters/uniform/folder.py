"""The uniform form of an adapter: delta_W = scaling * B @ A = 1 * [scaling * B, 0] @ [A; 0], with one rank for all.

Engines differ in how they read rank_pattern, alpha_pattern and use_rslora, and some round B before they scale it.
Experts of one parameter are stacked as PEFT has them, or have a pair for each projection.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loraover.adapters.numerics.delta import scale
from loraover.adapters.numerics.matrix_certificate import MatrixCertificate
from loraover.adapters.numerics.rounding import write_rounded
from loraover.checkpoint.adapter_config import write_config
from loraover.checkpoint.base_model import naming
from loraover.checkpoint.exact_tensors import ExactArray
from loraover.checkpoint.expert_stacks import PRESENT_LAYOUT, ExpertStack
from loraover.checkpoint.peft_adapter import AdapterDir, site_key
from loraover.common.arrays import Array
from loraover.common.errors import ExportError
from loraover.models.load import ModelSource


def write_uniform(
    adapter: AdapterDir,
    directory: Path,
    dtype: str,
    config: dict[str, Any],
    on_tensor: Callable[[int], None] = lambda done: None,
    pack: Callable[[dict[str, Array]], dict[str, Array]] | None = None,
) -> list[MatrixCertificate]:
    """Write the uniform adapter, and certify each matrix against its exact value.

    Each matrix is that of `to_uniform`, rounded once. Tensors other than A and B are not written.

    Args:
        adapter: Adapter whose cores or stored values are the exact ones.
        directory: An empty folder.
        dtype: Data type to store: fp32, bf16 or fp16.
        config: Contents of `adapter_config.json`, from `uniform_config`.
        on_tensor: Called after each tensor with the number of tensors so far.
        pack: Change of the rounded tensors to those of the file; None means PEFT's stacks of experts.

    Raises:
        CheckpointError: NaN, or a stored matrix that contradicts its cores.
        FoldError: An element beyond the range of `dtype`, or a file that does not hold what was written.
    """
    write_config(config, directory)
    prepare, keys = to_uniform(adapter), adapter.matrices
    return write_rounded(adapter, keys, directory, dtype, prepare=prepare, pack=pack, on_tensor=on_tensor)


def uniform_config(adapter: AdapterDir, served: ModelSource, target_modules: list[str]) -> dict[str, Any]:
    """Return the contents of `adapter_config.json`, with every field that changes the adapter's function.

    Args:
        adapter: The adapter to be written.
        served: Base model to name if the adapter names none, or was trained on a stand-in of it.
        target_modules: Suffixes that match exactly the adapted modules; see `name_modules`.
    """
    config = plain_config(
        adapter.rank,
        target_modules,
        base_model=adapter.config.base_model_name_or_path,
        revision=adapter.config.revision,
        task_type=adapter.config.task_type,
    )
    is_named = adapter.config.base_model_name_or_path is not None and served.moved is None
    return config if is_named else naming(config, served)


def plain_config(
    rank: int,
    target_modules: list[str],
    *,
    base_model: str | None,
    revision: str | None,
    task_type: str | None,
    modules_to_save: list[str] | None = None,
) -> dict[str, Any]:
    """Return the contents of `adapter_config.json` of a plain LoRA with one rank and scaling 1."""
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "revision": revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": target_modules,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": modules_to_save,
    }


def name_modules(adapted: Collection[str], others: Collection[str]) -> list[str]:
    """Return the shortest suffixes that match every adapted module and no other.

    PEFT adapts a module whose path equals an entry, or ends with "." and an entry. An ExportError names an adapted
    module whose every suffix matches another module too.
    """
    forbidden = {suffix for path in others for suffix in _suffixes(path)}
    chosen = set()
    for path in adapted:
        suffix = next((suffix for suffix in _suffixes(path) if suffix not in forbidden), None)
        if suffix is None:
            raise ExportError(
                f"{path}: no list of target_modules can name it alone, since another module's path ends the same way; "
                "adapt both."
            )
        chosen.add(suffix)
    return sorted(chosen)


def _suffixes(path: str) -> list[str]:
    """Suffixes of a path, shortest first: q_proj, self_attn.q_proj, 0.self_attn.q_proj, ..."""
    parts = path.split(".")
    return [".".join(parts[k:]) for k in reversed(range(len(parts)))]


def to_uniform(adapter: AdapterDir) -> Callable[[str, ExactArray], ExactArray]:
    """Return a function that brings a matrix of an adapter into the uniform form, by its key in the adapter's file.

    The function pads the matrix to the largest rank; it multiplies B by its module's scaling before. A product that is
    not exact adds one rounding of float64 to the bound of B; the padding is exact.
    """
    r = adapter.rank

    def form(key: str, exact: ExactArray) -> ExactArray:
        module, side = adapter.matrices[key]
        if side == "A":
            return _padded(exact, (r, exact.value.shape[1]))
        return _padded(scale(exact, module.scaling), (len(exact.value), r))

    return form


def _padded(exact: ExactArray, shape: tuple[int, int]) -> ExactArray:
    if exact.value.shape == shape:
        return exact

    def zeros(matrix: Array) -> Array:
        whole = np.zeros(shape, matrix.dtype)
        whole[: matrix.shape[0], : matrix.shape[1]] = matrix
        return whole

    return ExactArray(zeros(exact.value), None if exact.bound is None else zeros(exact.bound), exact.site)


Projections = tuple[str, str, str]
"""Names of a class's gate, up and down projections."""


def stack_fields(stacks: Sequence[ExpertStack]) -> dict[str, Any]:
    """Return the fields of `adapter_config.json` by which PEFT finds stacked pairs, and knows their layout."""
    if not stacks:
        return {}
    return {"target_parameters": [stack.path for stack in stacks], "peft_version": PRESENT_LAYOUT}


def parts_of(parameter: str, projections: Projections) -> tuple[str, ...]:
    """Return the projections that a parameter of all experts holds: gate and up, or down."""
    return projections[:2] if parameter == "gate_up_proj" else projections[2:]


def split_paths(stacks: Sequence[ExpertStack], projections: Projections) -> set[str]:
    """Return the paths by which `split_experts` names the pairs of all experts."""
    return {
        f"{stack.module}.{expert}.{name}"
        for stack in stacks
        for expert in range(stack.experts)
        for name in parts_of(stack.parameter, projections)
    }


def split_experts(adapter: AdapterDir, projections: Projections) -> Callable[[dict[str, Array]], dict[str, Array]]:
    """Return a function that gives every projection of every expert its pair: experts.3.gate_proj.lora_A, and so on.

    Gate and up have the same A, and the upper and the lower half of the rows of B.
    """

    def split(tensors: dict[str, Array]) -> dict[str, Array]:
        found = {key: tensor for key, tensor in tensors.items() if key not in adapter.parts}
        for stack in adapter.stacks:
            names = parts_of(stack.parameter, projections)
            for expert in range(stack.experts):
                a, b = (tensors[site_key(f"{stack.expert(expert)}.lora_{matrix}")] for matrix in "AB")
                for name, rows in zip(names, np.split(b, len(names)), strict=True):
                    path = f"{stack.module}.{expert}.{name}"
                    found[site_key(f"{path}.lora_A")] = a
                    found[site_key(f"{path}.lora_B")] = rows
        return found

    return split
