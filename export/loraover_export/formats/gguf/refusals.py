"""Refusals, with their reasons, of everything that a GGUF adapter cannot hold or that llama.cpp would ignore."""

from __future__ import annotations

from loraover.adapters.base_weights import check_base_weights
from loraover.adapters.uniform.refusals import OTHERS, check_fields, check_shape, check_tensors, written_parameters
from loraover.checkpoint.peft_adapter import AdapterDir
from loraover.checkpoint.target_modules import if_missing
from loraover.common.errors import ExportError
from loraover_export.formats.gguf.target import GgufTarget

MERGE = "merge the adapter into the base model with PEFT, and convert that with llama.cpp"
NORM = {"norm": "a norm, and llama.cpp loads the norms of an adapter but never applies them"}


def refuse_or_leave_out(adapter: AdapterDir, target: GgufTarget) -> list[str]:
    """Check that llama.cpp can run an adapter on its base model.

    Args:
        adapter: The adapter.
        target: The base model.

    Returns:
        Keys of tensors that are left out, because they are copies of the base model's frozen weights.

    Raises:
        CheckpointError: An adapter for changed base weights, or one that lacks modules that its configuration names.
        ConfigError: The adapter holds base weights, and the base model's cannot be read.
        ExportError: An adapter that is more than A and B, or that llama.cpp cannot apply.
    """
    adapter.check_keeps_base()
    adapter.check_complete(target.served.modules, target.served.model_type, target.served.experts)
    check_fields(adapter, MERGE, allowed=written_parameters(adapter))
    for path in adapter.modules:
        _check_module(adapter, path, target)
    weights = {path: module.shape for path, module in target.modules.items()}
    copies = check_tensors(adapter, weights, MERGE, OTHERS | NORM)
    check_base_weights(adapter, copies, target.served.source, MERGE)
    return copies


def _check_module(adapter: AdapterDir, path: str, target: GgufTarget) -> None:
    where, base = adapter.tensors_path, target.served.source.name
    names = target.served.modules
    if path in names and path not in target.modules:
        raise ExportError(f"{where}: adapts {path}, for which llama.cpp's {target.family.name} has no weight; {MERGE}.")
    module = target.modules.get(path)
    if module is None:
        raise ExportError(f"{where}: adapts {path}, which {base} does not have; {if_missing(path, names)}.")
    if names[path].kind == "expert" and path not in adapter.experts:
        raise ExportError(
            f"{where}: adapts {path} alone, and llama.cpp's {module.tensor} holds all experts, whose pairs PEFT stacks "
            f"if target_parameters names them; {MERGE}."
        )
    check_shape(adapter, path, module.shape, is_embedding=module.is_embedding, base=base)
    is_head = path == "lm_head"
    if target.served.is_tied and (module.is_embedding or is_head):
        reason = (
            "llama.cpp keeps no weight of the head to adapt"
            if is_head
            else "llama.cpp would apply the embedding's adapter to the head as well, and end the process at most ranks"
        )
        raise ExportError(
            f"{where}: adapts {path}, but the embedding and the head of {base} are one matrix: {reason}. Train without "
            f"{path.rpartition('.')[2]}, or {MERGE}."
        )
