"""What a GGUF adapter cannot hold, or llama.cpp would ignore or stumble over: each is refused with its reason."""

from __future__ import annotations

from loraover.checkpoint.peft_adapter import CONFIG_FILE, KEY_PREFIX, AdapterDir
from loraover.common.errors import ExportError
from loraover_export.gguf.target import Target
from loraover_export.uniform.matrices import module_of
from loraover_export.uniform.variants import TRAINING_ONLY, VARIANTS

MERGE = "merge the adapter into the base model with PEFT, and convert that with llama.cpp"
BASE_WEIGHT = ".base_layer.weight"
OTHERS = {
    ".lora_B.bias": "a bias of B",
    ".lora_A.bias": "a bias of A",
    "trainable_tokens_": "single trained tokens",
    "norm": "a norm, and llama.cpp loads the norms of an adapter but never applies them",
}
"""Tensors other than A and B, by a part of their keys."""


def check_adapter(adapter: AdapterDir, target: Target) -> list[str]:
    """Check that llama.cpp can run an adapter on its base model.

    Args:
        adapter: the adapter.
        target: the base model.

    Returns:
        Keys of tensors that are left out, because they are copies of the base model's frozen weights.

    Raises:
        CheckpointError: an adapter for changed base weights.
        ExportError: an adapter that is more than A and B, or that llama.cpp cannot apply.
    """
    adapter.check_keeps_base()
    _check_config(adapter)
    for site in adapter.sites:
        if site.endswith("A"):
            _check_module(adapter, module_of(site), target)
    return _check_tensors(adapter, target)


def _check_config(adapter: AdapterDir) -> None:
    """Refuse fields of PEFT's variants, of trained parameters, and unknown ones."""
    expected = {"bias": "none", "modules_to_save": None, "trainable_token_indices": None}
    for field, value in (adapter.config.model_extra or {}).items():
        if not value or field in TRAINING_ONLY or field == "init_lora_weights" or value == expected.get(field):
            continue
        if field in expected:
            kind = "parameters were trained in full, which do not fit into A and B"
        else:
            kind = f"this is {VARIANTS[field]}" if field in VARIANTS else "a field that this version does not know"
        raise ExportError(
            f"{adapter.path / CONFIG_FILE}: {field} is {value!r:.80}: {kind}; train without it, or {MERGE}."
        )


def _check_tensors(adapter: AdapterDir, target: Target) -> list[str]:
    copies = []
    matrices = set(adapter.sites.values())
    for key, shape in adapter.shapes.items():
        if key in matrices:
            continue
        module = target.modules.get(key.removeprefix(KEY_PREFIX).removesuffix(BASE_WEIGHT))
        if key.endswith(BASE_WEIGHT) and module is not None and shape == module.shape:
            copies.append(key)
            continue
        kind = next((kind for part, kind in OTHERS.items() if part in key), "neither A nor B of a module")
        raise ExportError(f"{adapter.tensors_path}: {key} is {kind}; train without it, or {MERGE}.")
    return copies


def _check_module(adapter: AdapterDir, path: str, target: Target) -> None:
    where, base = adapter.tensors_path, target.source.name
    if path in target.others:
        raise ExportError(f"{where}: adapts {path}, for which llama.cpp's {target.family.name} has no weight; {MERGE}.")
    module = target.modules.get(path)
    if module is None:
        raise ExportError(f"{where}: adapts {path}, which {base} does not have; name the right base with --model.")
    is_embedding = f"{path}.lora_embedding_A" in adapter.sites
    kind = "lora_embedding_" if is_embedding else "lora_"
    a, b = (adapter.shapes[adapter.sites[f"{path}.{kind}{side}"]] for side in "AB")
    found = (a[1], b[0]) if is_embedding else (b[0], a[1])
    if is_embedding != module.is_embedding or found != module.shape:
        raise ExportError(
            f"{where}: {path} has shape {found} in the adapter and {module.shape} in {base}; name the model that the "
            "adapter was trained on with --model."
        )
    is_head = path == "lm_head"
    if target.tied and (is_embedding or is_head):
        reason = (
            "llama.cpp keeps no weight of the head to adapt"
            if is_head
            else "llama.cpp would apply the embedding's adapter to the head as well, and end the process at most ranks"
        )
        raise ExportError(
            f"{where}: adapts {path}, but the embedding and the head of {base} are one matrix: {reason}. Train without "
            f"{path.rpartition('.')[2]}, or {MERGE}."
        )
