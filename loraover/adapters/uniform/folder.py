"""The uniform form of an adapter as a PEFT folder."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraover.adapters.numerics.matrix_certificate import MatrixCertificate
from loraover.checkpoint.adapter_config import write_config
from loraover.checkpoint.base_model import naming
from loraover.checkpoint.files import TENSORS_FILE
from loraover.checkpoint.peft_adapter import AdapterDir
from loraover.common.errors import ExportError
from loraover.common.later import has_torch
from loraover.models.load import ModelSource

if TYPE_CHECKING:
    from torch import Tensor


def write_uniform(
    adapter: AdapterDir,
    directory: Path,
    dtype: str,
    config: dict[str, Any],
    on_tensor: Callable[[int], None] = lambda done: None,
    pack: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
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
    if not has_torch():
        from loraover.adapters.uniform.write_plain import write_plain

        return write_plain(adapter, directory / TENSORS_FILE, dtype, on_tensor)
    from loraover.adapters.numerics.rounded_adapter import write_rounded
    from loraover.adapters.uniform.matrices import to_uniform

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
    """Return the contents of `adapter_config.json` of a plain LoRA with one rank and scaling 1.

    Args:
        rank: Rank of every module.
        target_modules: Paths of the adapted modules, or suffixes of them.
        base_model: Folder or hub name of the base model; None if it is not known.
        revision: Commit of the base model on the hub; None for folders.
        task_type: PEFT's name of the task; None stays None, with which PEFT loads the adapter on any model.
        modules_to_save: Modules whose parameters the adapter replaces.
    """
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

    PEFT adapts a module whose path equals an entry, or ends with "." and an entry.

    Args:
        adapted: Paths of the adapted modules.
        others: Paths of all other modules of the model.

    Raises:
        ExportError: An adapted module whose every suffix matches another module too.
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
