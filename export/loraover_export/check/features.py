"""Properties of an adapter that engines treat differently, one function each.

A feature returns what was found, in words, or None if the adapter does not have it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from loraover.adapters.uniform.refusals import VARIANTS, is_inert
from loraover.checkpoint import target_modules
from loraover.checkpoint.adapter_config import KEPT_BASE, REPEATED_STARTS
from loraover.checkpoint.files import CONFIG_FILE
from loraover.checkpoint.peft_adapter import KEY_PREFIX
from loraover_export.check.subject import Subject
from loraover_export.formats.vllm.candidate import listed

Feature = Callable[[Subject], str | None]

_FIXED = {"peft_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "rank_pattern", "alpha_pattern"}
_HANDLED = {"bias", "init_lora_weights", "lora_bias", "modules_to_save", "target_parameters", "trainable_token_indices"}
_HANDLED |= {"alora_invocation_tokens", "use_dora", "use_rslora"}

VOCABULARY = ("embed_tokens", "lm_head")


def method(subject: Subject) -> str | None:
    """A PEFT method other than LoRA."""
    kind = subject.config["peft_type"]
    return None if kind == "LORA" else f"peft_type is {kind}, not LORA"


def dora(subject: Subject) -> str | None:
    """Magnitudes of DoRA."""
    return "use_dora is true, so W + B A is rescaled" if subject.config.get("use_dora") else None


def variant(subject: Subject) -> str | None:
    """Fields of PEFT's other variants of LoRA, and fields that this version does not know."""
    fields = subject.fields
    if fields is None:
        return None
    items = [(name, value) for name, value in subject.config.items() if name not in _FIXED | _HANDLED]
    found = [name for name, value in items if not is_inert(fields, name, value, subject.shapes)]
    if not found:
        return None
    kind = VARIANTS.get(found[0], "a field that this version does not know")
    return f"{listed(found)} is set: {kind}"


def alora(subject: Subject) -> str | None:
    """A LoRA that acts from certain tokens on."""
    return "alora_invocation_tokens is set: an aLoRA" if subject.config.get("alora_invocation_tokens") else None


def experts(subject: Subject) -> str | None:
    """LoRA on single parameters, such as those of fused experts."""
    value = subject.config.get("target_parameters")
    value = [value] if isinstance(value, str) else value
    return f"target_parameters names {listed(value)}" if value else None


def initialisation(subject: Subject) -> str | None:
    """An initialisation that changes the base weights, and that PEFT repeats on loading: PiSSA or OLoRA."""
    start = _start(subject)
    return f"init_lora_weights is {start!r}, which changes the base weights" if start in REPEATED_STARTS else None


def lost_initialisation(subject: Subject) -> str | None:
    """An initialisation that changes the base weights and cannot be repeated: from gradients or random numbers."""
    start = _start(subject)
    if start is None or not (start == "lora_ga" or start.startswith("pissa_niter_")):
        return None
    return f"init_lora_weights is {start!r}, which changed the base weights by gradients or random numbers"


def other_initialisation(subject: Subject) -> str | None:
    """An initialisation that PEFT does not know, or cannot repeat from the adapter and the base model alone."""
    start, given = _start(subject), subject.config.get("init_lora_weights")
    if subject.config.get("lora_bias") and isinstance(given, str):
        return f"init_lora_weights is {given!r}, which PEFT does not support together with lora_bias"
    if start is None or initialisation(subject) or lost_initialisation(subject):
        return None
    return f"init_lora_weights is {start!r}, which is unknown or starts from data or quantised weights"


def _start(subject: Subject) -> str | None:
    """Return the initialisation that changes the base weights; None if they stay the model's."""
    start = subject.config.get("init_lora_weights")
    return start if isinstance(start, str) and start.lower() not in KEPT_BASE else None


def megatron(subject: Subject) -> str | None:
    """A configuration of Megatron's layers, which engines ignore."""
    return "megatron_config is set" if subject.config.get("megatron_config") else None


def not_numbers(subject: Subject) -> str | None:
    """Matrices that hold NaN or infinity."""
    return subject.not_finite


def biases(subject: Subject) -> str | None:
    """Trained biases of the base model."""
    value = subject.config.get("bias") or "none"
    return None if value == "none" else f"bias is {value!r}: biases of the base model were trained"


def lora_bias(subject: Subject) -> str | None:
    """A bias that was trained in B."""
    keys = [key for key in subject.shapes if key.endswith(".lora_B.bias")]
    return f"{len(keys)} biases of B" if keys or subject.config.get("lora_bias") else None


def modules_to_save(subject: Subject) -> str | None:
    """Modules that were trained in full."""
    found = [name for name in _saved(subject) if name not in VOCABULARY and "norm" not in name]
    return f"modules_to_save names {listed(found)}" if found else None


def trained_vocabulary(subject: Subject) -> str | None:
    """An embedding or a head that was trained in full."""
    found = [name for name in _saved(subject) if name in VOCABULARY]
    return f"modules_to_save names {listed(found)}" if found else None


def trained_tokens(subject: Subject) -> str | None:
    """Single tokens of an embedding that were trained in full."""
    value = subject.config.get("trainable_token_indices")
    if not value:
        return None
    tokens = sum(map(len, value.values())) if isinstance(value, dict) else len(value)
    return f"trainable_token_indices names {tokens} tokens that were trained in full"


def lost_matrices(subject: Subject) -> str | None:
    """A without B, or B without A."""
    sides: dict[tuple[str, bool], set[str]] = {}
    for matrix in subject.matrices.values():
        sides.setdefault((matrix.module, matrix.is_embedding), set()).add(matrix.side)
    lost = _once(module for (module, _), found in sides.items() if len(found) == 1)
    return f"the file lacks either A or B of {listed(lost)}" if lost else None


def no_targets(subject: Subject) -> str | None:
    """A configuration that names no module of the base model."""
    served = subject.served
    if subject.fields is None or target_modules.names_any(
        subject.path / CONFIG_FILE, served.modules, served.model_type
    ):
        return None
    return f"target_modules names no module of {_base(subject)}"


def rslora(subject: Subject) -> str | None:
    """The scaling alpha / sqrt(r), where it differs from alpha / r."""
    ranked = subject.config.get("use_rslora") and subject.ranks and subject.ranks != [1]
    return "use_rslora is true: the scaling is alpha / sqrt(r)" if ranked else None


def rank_pattern(subject: Subject) -> str | None:
    """Modules whose rank differs from the configuration's r."""
    fields = subject.fields
    if fields is None:
        return None
    others = [path for path in subject.modules if fields.rank(path) != fields.r]
    return f"rank_pattern gives {len(others)} of {len(subject.modules)} modules another rank" if others else None


def alpha_pattern(subject: Subject) -> str | None:
    """Modules whose alpha differs from the configuration's."""
    fields = subject.fields
    if fields is None:
        return None
    usual = fields.model_copy(update={"alpha_pattern": {}})
    others = [path for path in subject.modules if fields.scaling(path) != usual.scaling(path)]
    return f"alpha_pattern gives {len(others)} of {len(subject.modules)} modules another alpha" if others else None


def no_alpha(subject: Subject) -> str | None:
    """A configuration that leaves alpha to PEFT's default."""
    is_default = subject.fields is not None and "lora_alpha" not in subject.fields.model_fields_set
    return "the configuration has no lora_alpha" if is_default else None


def no_fields(subject: Subject) -> str | None:
    """A configuration that leaves more to PEFT's defaults than vLLM does."""
    found = {"r", "lora_alpha", "target_modules"} - subject.config.keys() if subject.fields is not None else set()
    return f"the configuration has no {listed(sorted(found))}" if found else None


def scaling(subject: Subject) -> str | None:
    """A scaling of B A other than 1."""
    if subject.fields is None:
        return None
    factors = sorted({subject.fields.scaling(path) for path in subject.modules} - {1.0})
    return f"delta_W is {listed([f'{factor:.4g}' for factor in factors])} times B A" if factors else None


def wrong_rank(subject: Subject) -> str | None:
    """Matrices whose rank differs from the one in the configuration."""
    if subject.fields is None:
        return None
    for matrix in subject.matrices.values():
        if len(matrix.shape) != 2:
            continue
        expected = subject.fields.rank(matrix.module)
        found = matrix.shape[0 if matrix.side == "A" else -1]
        if found != expected:
            return f"{matrix.module} has rank {found}, but the configuration gives it rank {expected}"
    return None


def norms(subject: Subject) -> str | None:
    """Norms that were trained in full."""
    keys = [key for key in subject.shapes if key not in subject.matrices and "norm" in key]
    return f"{listed(keys)} is a norm that was trained in full" if keys else None


def prefix(subject: Subject) -> str | None:
    """Keys without PEFT's prefix."""
    keys = [key for key, matrix in subject.matrices.items() if not matrix.has_prefix]
    return f"{len(keys)} of {len(subject.matrices)} keys do not begin with {KEY_PREFIX}" if keys else None


def doubled_prefix(subject: Subject) -> str | None:
    """Keys with PEFT's prefix twice; without it, all of them name modules of the base model."""
    twice = [path for path in subject.modules if KEY_PREFIX in path]
    if not twice or any(path.replace(KEY_PREFIX, "") not in subject.served.modules for path in subject.modules):
        return None
    return f"{len(twice)} of {len(subject.modules)} modules have {KEY_PREFIX} twice in their keys"


def missing_modules(subject: Subject) -> str | None:
    """Adapted modules that the base model does not have."""
    missing = [path for path in subject.modules if path not in subject.served.modules]
    if doubled_prefix(subject) is not None:
        return None
    if missing == target_modules.absent_layers(missing, subject.served.modules):  # `absent_layers` has them
        return None
    return f"{len(missing)} of {len(subject.modules)} adapted modules are not in {_base(subject)} ({listed(missing)})"


def absent_layers(subject: Subject) -> str | None:
    """Matrices of layers that the base model does not have."""
    found = [] if missing_modules(subject) else target_modules.absent_layers(subject.modules, subject.served.modules)
    return f"{_base(subject)} does not have the layers of {listed(found)}" if found else None


def unnamed_modules(subject: Subject) -> str | None:
    """Matrices of modules that the configuration does not name, which keep the exports from reading the adapter."""
    if subject.fields is None or subject.lora is not None:
        return None
    return target_modules.unnamed_modules(subject.path / CONFIG_FILE, subject.modules, subject.served.model_type)


def lost_modules(subject: Subject) -> str | None:
    """Modules that the configuration names, but for which the file has no matrices."""
    if subject.lora is None or missing_modules(subject) is not None:
        return None
    served = subject.served
    config, kind = subject.path / CONFIG_FILE, served.model_type
    return target_modules.lost_modules(config, subject.modules, served.modules, served.experts, kind)


def lost_parameters(subject: Subject) -> str | None:
    """Parameters that were trained in full, but are missing in the file."""
    if missing_modules(subject) is not None:
        return None
    saved = {key.removeprefix(KEY_PREFIX) for key in subject.shapes}
    return target_modules.lost_parameters(subject.path / CONFIG_FILE, saved, subject.served.parameters)


def other_shapes(subject: Subject) -> str | None:
    """Matrices that do not fit the base model's modules."""
    wrong = []
    for matrix in subject.matrices.values():
        module = subject.served.modules.get(matrix.module)
        if module is None or module.shape is None or len(matrix.shape) != 2:
            continue
        expected = module.shape[0 if matrix.side == "A" else 1]
        if matrix.shape[1 if matrix.side == "A" else 0] != expected:
            wrong.append(matrix.module)
    return f"{listed(_once(wrong))} has another shape in {_base(subject)}" if wrong else None


def embedding(subject: Subject) -> str | None:
    """LoRA on an embedding."""
    found = _once(matrix.module for matrix in subject.matrices.values() if matrix.is_embedding)
    return f"the embedding {listed(found)} is adapted" if found else None


def tied_embedding(subject: Subject) -> str | None:
    """LoRA on an embedding that is also the head."""
    adapted = subject.served.is_tied and any(matrix.is_embedding for matrix in subject.matrices.values())
    return "the embedding is adapted, and the head shares its matrix" if adapted else None


def tied_head(subject: Subject) -> str | None:
    """LoRA on a head that is also the embedding."""
    found = adapted_head(subject) if subject.served.is_tied else None
    return None if found is None else f"{found}, and the embedding shares its matrix"


def adapted_head(subject: Subject) -> str | None:
    """LoRA on the head."""
    return "lm_head is adapted" if any(path.rpartition(".")[2] == "lm_head" for path in subject.modules) else None


def quantised_base(subject: Subject) -> str | None:
    """A base model with quantised weights."""
    method = subject.served.quantization
    return None if method is None else f"the base model's weights are quantised ({method})"


def task(subject: Subject) -> str | None:
    """A base model other than a causal language model."""
    return None if subject.served.is_causal else f"the base model is a {subject.served.architecture}"


def cores(subject: Subject) -> str | None:
    """A LoRA-Over checkpoint."""
    return "a LoRA-Over checkpoint" if subject.has_cores else None


def _saved(subject: Subject) -> list[str]:
    """Entries of `modules_to_save` that the file has tensors of."""
    value = subject.config.get("modules_to_save") or []
    names = [value] if isinstance(value, str) else value
    return _once(name for name in names if any(f"{name}." in key for key in subject.shapes))


def _base(subject: Subject) -> str:
    return subject.served.source.name


def _once(paths: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(paths))


FEATURES: dict[str, Feature] = {
    "task": task,
    "method": method,
    "DoRA": dora,
    "variant": variant,
    "aLoRA": alora,
    "experts": experts,
    "initialisation": initialisation,
    "lost initialisation": lost_initialisation,
    "other initialisation": other_initialisation,
    "megatron": megatron,
    "numbers": not_numbers,
    "biases": biases,
    "LoRA bias": lora_bias,
    "modules_to_save": modules_to_save,
    "trained vocabulary": trained_vocabulary,
    "norms": norms,
    "trained tokens": trained_tokens,
    "rsLoRA": rslora,
    "rank_pattern": rank_pattern,
    "alpha_pattern": alpha_pattern,
    "no alpha": no_alpha,
    "no fields": no_fields,
    "scaling": scaling,
    "rank": wrong_rank,
    "key prefix": prefix,
    "doubled prefix": doubled_prefix,
    "missing modules": missing_modules,
    "absent layers": absent_layers,
    "no targets": no_targets,
    "unnamed modules": unnamed_modules,
    "lost matrices": lost_matrices,
    "lost modules": lost_modules,
    "lost parameters": lost_parameters,
    "other shapes": other_shapes,
    "embedding": embedding,
    "tied embedding": tied_embedding,
    "tied head": tied_head,
    "adapted head": adapted_head,
    "quantised base": quantised_base,
    "cores": cores,
}
"""Features by name, in the order in which a report lists them."""

MORE_THAN_AB = (
    *("method", "DoRA", "variant", "aLoRA", "experts", "biases", "LoRA bias"),
    *("initialisation", "lost initialisation", "other initialisation"),
    *("modules_to_save", "trained vocabulary", "norms", "trained tokens", "rank", "doubled prefix", "missing modules"),
    "absent layers",
    *("unnamed modules", "lost matrices"),
    *("lost modules", "lost parameters", "other shapes"),
)
"""Features that A and B of the base model's modules cannot express."""
