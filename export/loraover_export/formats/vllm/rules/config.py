"""Rules about `adapter_config.json`: fields that make an adapter more than W + scaling * B @ A with W unchanged."""

from __future__ import annotations

from collections.abc import Iterator

from loraover.adapters.uniform.refusals import OTHER_FIELDS, VARIANTS, is_inert
from loraover.adapters.uniform.request_fields import export_command
from loraover_export.formats.vllm.candidate import Candidate, Problem, listed
from loraover_export.known_faults import Versions

REFUSED = {"alora_invocation_tokens", "layer_replication", "lora_bias", "use_bdlora", "use_qalora"}
"""Variants that vLLM refuses by name: vllm/lora/peft_helper.py. It ignores all other fields that it does not know."""

NOT_REFUSED = {"lora_ga"}
"""Initialisations that change the base weights and that vLLM accepts."""

HEADS = {"classifier", "score"}
TOKEN_HEADS = Versions(since="0.33.0")
"""Releases that load the head of a token classifier as well as that of a sequence classifier."""


def variant(candidate: Candidate) -> Iterator[Problem]:
    """Fields of PEFT's LoRA variants, and unknown fields; vLLM ignores the latter without a message."""
    for field, value in candidate.config.items():
        if field in OTHER_FIELDS or is_inert(candidate.adapter.config, field, value, candidate.adapter.shapes):
            continue
        if field == "target_parameters" and candidate.adapter.stacks:
            continue
        kind = VARIANTS.get(field)
        yield Problem(
            f"{field} is set: this is {kind}"
            if kind is not None
            else f"{field} is set to {value!r:.80}, a field that this version does not know and vLLM would ignore",
            "train a plain LoRA, or merge the adapter into the base model with PEFT and serve the merged model",
            is_silent=field not in REFUSED,
        )


def required(candidate: Candidate) -> Iterator[Problem]:
    """Fields without which vLLM's PEFTHelper does not start; PEFT has a default for each."""
    found = candidate.adapter.config.model_fields_set | candidate.config.keys()
    missing = sorted({"r", "lora_alpha", "target_modules"} - found)
    if candidate.dtype is None and missing:
        yield Problem(
            f"the configuration has no {listed(missing)}, which vLLM needs",
            f"export the adapter for vLLM and serve the exported folder: "
            f"{export_command(candidate.adapter.path, 'vllm', ending='-vllm')}",
        )


def initialisation(candidate: Candidate) -> Iterator[Problem]:
    """An initialisation that changes the base weights, so that the adapter does not fit the original base model."""
    if not candidate.adapter.config.keeps_base:
        start = candidate.config["init_lora_weights"]
        yield Problem(
            f"init_lora_weights is {start!r}: PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change the base weights, "
            "so A and B are right for the changed base model only",
            "make an exact plain LoRA of a PiSSA or OLoRA with loraover export convert; save others again with PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=...); or set init_lora_weights to true if the "
            "served model holds the changed weights",
            is_silent=start.lower() in NOT_REFUSED,
        )


def bias(candidate: Candidate) -> Iterator[Problem]:
    """Trained biases, which vLLM does not load."""
    value = candidate.config.get("bias", "none")
    if value != "none":
        yield Problem(
            f"bias is {value!r}: the base model's biases were trained too, and vLLM cannot load them",
            "train with bias='none', or merge the adapter into the base model with PEFT and serve the merged model",
        )


def other_parameters(candidate: Candidate) -> Iterator[Problem]:
    """Modules or tokens that were trained in full; vLLM loads some classifier heads, other engines none."""
    for field in ("modules_to_save", "trainable_token_indices"):
        value = candidate.config.get(field)
        if value:
            names = [str(item) for item in value] if isinstance(value, list | dict) else [str(value)]
            loads = HEADS.issuperset(names) and field == "modules_to_save"
            version = candidate.architectures.version
            kinds = "sequence and token classifiers" if version in TOKEN_HEADS else "sequence classifiers"
            heads = f"vLLM {version} can load the heads of {kinds} from PEFT's own folder, but other engines cannot"
            yield Problem(
                f"{field} is set ({listed(names)}): parameters that were trained in full do not fit into A and B"
                + (f"; {heads}" if loads else ""),
                f"train without {field}, or merge the adapter into the base model with PEFT and serve the merged model",
                is_silent=field == "trainable_token_indices",
            )


def patterns(candidate: Candidate) -> Iterator[Problem]:
    """Modules whose rank or scaling differs from the others', in a folder that is served unchanged."""
    config = candidate.adapter.config
    usual = config.model_copy(update={"rank_pattern": {}, "alpha_pattern": {}})
    own = [
        path
        for path in candidate.modules
        if (config.rank(path), config.scaling(path)) != (usual.rank(path), usual.scaling(path))
    ]
    if candidate.dtype is None and own:
        fields = " and ".join(field for field in ("rank_pattern", "alpha_pattern") if getattr(config, field))
        yield Problem(
            f"{fields} gives {len(own)} of {len(candidate.modules)} modules another rank or scaling ({listed(own)}); "
            "engines read such patterns differently, and some apply them wrongly without a message",
            f"export the adapter for vLLM and serve the exported folder: "
            f"{export_command(candidate.adapter.path, 'vllm', ending='-vllm')}",
        )
