"""Rules about the adapter and the served model: the same modules, the same shapes, and support by vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from loraover.checkpoint.files import CONFIG_FILE
from loraover.checkpoint.target_modules import (
    LOST,
    absent_layers,
    alike_module,
    left_to_the_type,
    lost_modules,
    unnamed_modules,
)
from loraover.common.request import as_written
from loraover.overparam.expert_part import FUSED
from loraover_export.formats.vllm.candidate import Candidate, Problem, listed
from loraover_export.formats.vllm.releases import EXPERTS_BELOW, Architecture
from loraover_export.known_faults import known_faults

MERGE = "merge the adapter into the base model with PEFT and serve the merged model"
EXPORT = "write it with loraover export vllm"

MAX_VOCABULARY = 258048
"""Tokens that vLLM's LogitsProcessorWithLoRA can hold: vllm/lora/layers/logits_processor.py."""


def architecture(candidate: Candidate) -> Iterator[Problem]:
    """A model class that vLLM does not have, or serves without adapters only."""
    known, served = candidate.architectures, candidate.served.architecture
    if candidate.architecture is not None:
        return
    if served in known.without_lora:
        found = f"vLLM {known.version} serves {served} without LoRA adapters only"
    elif served in known.unknown:
        found = f"whether vLLM {known.version} serves {served} with LoRA adapters is not known"
    else:
        found = f"vLLM {known.version} has no class {served}"
    yield Problem(
        found, "merge the adapter into the base model with PEFT and serve the merged model, or adapt another base model"
    )


def base_model(candidate: Candidate) -> Iterator[Problem]:
    """A served model other than the one that the adapter was trained on, which vLLM never checks."""
    trained, served = candidate.adapter.config.base_model_name_or_path, candidate.served.source.name
    moved = candidate.served.source.moved
    if moved is not None:
        found = (
            f"trained on a {moved.trained}, to be served on {served}; the logits of these two models differ by up to "
            f"{moved.difference:.3g}"
        )
    elif trained is None:
        found = f"the adapter names no base model, so it may not have been trained on {served}"
    elif trained == served or (Path(trained).exists() and Path(trained).resolve() == Path(served).resolve()):
        return
    else:
        found = f"trained on {trained}, to be served on {served}; only names and shapes of modules are compared"
    yield Problem(found, f"make sure that {served} holds the weights that were trained on", is_warning=True)


def modules(candidate: Candidate) -> Iterator[Problem]:
    """Adapted modules that the served model lacks, and modules that are named without matrices or the reverse."""
    if candidate.architecture is None:
        return
    if all(candidate.present.get(path) == path for path in candidate.modules):  # else another class was trained
        served = candidate.served
        config, kind = candidate.adapter.path / CONFIG_FILE, served.model_type
        lost = lost_modules(config, candidate.modules, served.modules, served.experts, kind)
        if lost is not None:
            yield Problem(lost, LOST, is_silent=True)
        unnamed = unnamed_modules(config, candidate.modules, kind) if left_to_the_type(config) else None
        if unnamed is not None:
            yield Problem(f"{unnamed}; vLLM applies all of them", "name all trained modules there", is_silent=True)
    missing = [path for path in candidate.modules if path not in candidate.present]
    if not missing:
        return
    if candidate.dtype is None and missing == absent_layers(missing, candidate.places):
        found = f"vLLM ignores the matrices of {listed(missing)}, whose layers the served model does not have"
        yield Problem(found, "make sure that the adapter was trained on this model", is_warning=True)
        return
    alike = alike_module(missing[0], candidate.places)
    endings = {path.rpartition(".")[2] for path in candidate.places}  # others are refused by name
    yield Problem(
        f"{len(missing)} of {len(candidate.modules)} adapted modules are not in the served model ({listed(missing)}); "
        "vLLM ignores matrices below an unknown prefix and answers as the base model",
        f"the served model has {alike}: loraover export convert renames the tensors where one prefix fits"
        if alike is not None
        else f"name the model that the adapter was trained on with {as_written('model')}, in place of "
        f"{candidate.served.source.name}",
        is_silent=all(path.rpartition(".")[2] in endings for path in missing),
    )


def shapes(candidate: Candidate) -> Iterator[Problem]:
    """Matrices that do not fit the served model's modules."""
    wrong = [
        (path, candidate.modules[path], candidate.served_module(path).shape)
        for path in candidate.present
        if candidate.served_module(path).shape not in (None, candidate.modules[path])
    ]
    if wrong:
        path, (n, m), expected = wrong[0]
        assert expected is not None
        yield Problem(
            f"{len(wrong)} of {len(candidate.modules)} adapted modules have other shapes in the served model; {path} "
            f"maps {n} to {m} features in the adapter, {expected[0]} to {expected[1]} in the model. vLLM would fill "
            "only part of a larger module, and fail on a smaller one",
            "serve the model that the adapter was trained on, with the same vocabulary; name it with "
            f"{as_written('model')}",
            is_silent=True,
        )


def targets(candidate: Candidate) -> Iterator[Problem]:
    """Modules that vLLM's class cannot adapt, by kind of layer."""
    allowed = candidate.architecture
    if allowed is None:
        return
    refused: dict[str, list[str]] = {}
    outside = _outside(candidate)
    for path in candidate.present:
        reason = None if path in outside else _refusal(path, candidate, allowed)
        if reason is not None:
            refused.setdefault(reason, []).append(path)
    for reason, paths in refused.items():
        yield Problem(
            f"{listed(paths)}: {reason}",
            "train without these target modules, or merge the adapter into the base model with PEFT and serve the "
            "merged model",
        )
    heads = [path for path in candidate.present if path.rpartition(".")[2] == "lm_head"]
    if heads and not any(path in paths for paths in refused.values() for path in heads):
        yield Problem(
            "the output head is adapted; vLLM's prompt_logprobs are computed without it",
            "read the logprobs of generated tokens instead",
            is_warning=True,
        )


def _refusal(path: str, candidate: Candidate, allowed: Architecture) -> str | None:
    served, mapped = candidate.served_module(path), allowed.rename(candidate.present[path])
    name = mapped.rpartition(".")[2]
    if served.kind == "expert":
        return None
    if served.kind == "other":
        return f"a {served.type_name}, neither a linear layer nor an embedding"
    if (served.kind == "embedding") != candidate.adapter.modules[path].is_embedding:
        return f"a {served.type_name} in the served model, but adapted as another kind of layer"
    if served.kind == "embedding" or name == "lm_head":
        return None if name in allowed.embeddings else f"{candidate.served.architecture} supports no LoRA there in vLLM"
    if name in allowed.packed and name not in allowed.packed[name]:
        return f"vLLM expects its parts {', '.join(allowed.packed[name])} instead"
    return None


def towers(candidate: Candidate) -> Iterator[Problem]:
    """Modules outside of the language model of a multimodal class: `_get_punica_wrapper` in vllm/lora/model_manager.py.

    With --enable-tower-connector-lora, a class that supports the option adapts its towers and connectors, too.
    """
    allowed, outside = candidate.architecture, _outside(candidate)
    if allowed is None or not outside:
        return
    reached = {path for path, name in outside.items() if name.startswith(allowed.towers)}
    left_out = [path for path in outside if path not in reached or not candidate.adapts_towers]
    if left_out:
        option, helps = "--enable-tower-connector-lora", reached.issuperset(left_out)
        known = {allowed.rename(place) for place in candidate.places}
        inside = {name.rpartition(".")[2] for name in known if name.startswith(allowed.language_model or "")}
        yield Problem(
            f"{listed(left_out)}: outside of {allowed.language_model}, the language model, and vLLM adapts only the "
            "language model"
            + (f" unless it is started with {option}" if helps else f"; {option} does not reach these modules")
            + "; their matrices have no effect",
            f"start the server with {option}" if helps else f"train without these target modules, or {MERGE}",
            is_silent=all(path.rpartition(".")[2] in inside for path in left_out),  # others are refused by name
        )
    elif reached:
        yield Problem(
            f"{listed([*reached])}: vLLM calls LoRA of towers and connectors experimental, and keeps encoded images by "
            "the adapter's name (vllm-project/vllm#44939)",
            "give each version of the adapter another name",
            is_warning=True,
        )


def _outside(candidate: Candidate) -> dict[str, str]:
    """Adapted modules outside of the language model of a multimodal class, each with vLLM's name for it."""
    allowed = candidate.architecture
    if allowed is None:
        return {}
    names = {path: allowed.rename(place) for path, place in candidate.present.items()}
    return {path: name for path, name in names.items() if not name.startswith(allowed.language_model or "")}


def target_modules(candidate: Candidate) -> Iterator[Problem]:
    """Modules that --lora-target-modules leaves out: `is_in_target_modules` in vllm/lora/utils.py of vLLM 0.32."""
    allowed, chosen = candidate.architecture, candidate.lora_targets
    if allowed is None or not chosen:
        return
    places = {path: allowed.rename(place) for path, place in candidate.present.items()}
    left_out = [path for path, name in places.items() if chosen.isdisjoint(_target_names(name, allowed))]
    if left_out:
        yield Problem(
            f"{listed(left_out)}: --lora-target-modules {' '.join(sorted(chosen))} leaves out these modules; vLLM "
            "loads their matrices and applies them nowhere, without a message",
            "start the server without --lora-target-modules, or name all modules of the adapters in it",
            is_silent=True,
        )


def _target_names(name: str, allowed: Architecture) -> set[str]:
    """Return the values of --lora-target-modules with which vLLM adapts a module, or what it is fused into."""
    owner, found, _ = name.rpartition(".experts.")
    if found or name.endswith(".experts"):
        return {"experts", f"{owner}.experts" if found else name}
    prefix, _, last = name.rpartition(".")
    fused = next((whole for whole, parts in allowed.packed.items() if last in parts), last)
    return {fused, f"{prefix}.{fused}", *allowed.packed.get(fused, ())}


def experts(candidate: Candidate) -> Iterator[Problem]:
    """LoRA of experts in a form that vLLM's class does not read: vllm/lora/model_manager.py and lora_weights.py."""
    allowed, adapter = candidate.architecture, candidate.adapter
    pairs = _pairs(candidate)
    owners = list(dict.fromkeys([*(stack.module for stack in adapter.stacks), *pairs]))
    if allowed is None or not owners:
        return
    below = EXPERTS_BELOW.get(candidate.served.architecture)
    if below is not None:
        yield Problem(
            f"{listed(owners)}: vLLM's {candidate.served.architecture} has its experts below {below}, and ignores "
            "matrices below an unknown prefix",
            MERGE,
            is_silent=True,
        )
    unknown = [module for module in owners if not _has_gates_among_outputs(module, candidate)]
    if unknown:
        yield Problem(
            f"{listed(unknown)}: the shapes of {' and '.join(FUSED)} do not fit each other as (outputs, inputs); the "
            "model stores inputs before outputs without saying so, as Llama-4 does",
            MERGE,
            is_silent=True,
        )
    yield from _partial(candidate, pairs)
    if candidate.platform == "cpu":
        yield Problem("vLLM has no LoRA of experts on a CPU", f"serve on a GPU, or {MERGE}")
    if candidate.dtype is None and adapter.stacks and not allowed.stacked_experts:
        yield Problem(
            f"the file stacks the experts, and vLLM's {candidate.served.architecture} reads a pair for each expert",
            EXPORT,
        )
    elif candidate.dtype is None and any(stack.is_flipped for stack in adapter.stacks):
        yield Problem("A and B of the experts are swapped, as PEFT before 0.19 saved them", EXPORT, is_silent=True)


def _pairs(candidate: Candidate) -> dict[str, set[str]]:
    """Return the paths of experts' projections with their own pair, by the served module that holds all experts."""
    found: dict[str, set[str]] = {}
    for path, place in candidate.present.items():
        if path not in candidate.adapter.experts and candidate.places[place].kind == "expert":
            found.setdefault(place.rsplit(".", 2)[0], set()).add(place)
    return found


def _partial(candidate: Candidate, pairs: dict[str, set[str]]) -> Iterator[Problem]:
    """Yield experts of which only a part is adapted."""
    kinds: dict[str, set[str]] = {}
    for stack in candidate.adapter.stacks:
        kinds.setdefault(stack.module, set()).add(stack.parameter)
    partial = [module for module, parameters in kinds.items() if len(parameters) < len(FUSED)]
    if partial:
        yield Problem(
            f"{listed(partial)}: only one of {' and '.join(FUSED)} is adapted, and vLLM fails to load it unless both "
            "are adapted",
            f"train with both in target_parameters, or {MERGE}",
        )
    for module, paths in pairs.items():
        expected = 3 * candidate.served.experts[f"{module}.{FUSED[0]}"].experts
        if len(paths) < expected:
            yield Problem(
                f"the file has {len(paths)} of {expected} pairs of {module}, and vLLM fails to load it unless each "
                "projection of each expert has one",
                f"train with all of them, or {MERGE}",
            )


def _has_gates_among_outputs(module: str, candidate: Candidate) -> bool:
    """Return whether gate_up_proj of each expert is (2 I, H) and down_proj (H, I), in rows of outputs."""
    shapes = [weight.shape for name in FUSED if (weight := candidate.served.experts.get(f"{module}.{name}"))]
    if len(shapes) < len(FUSED):
        return False
    (outputs, hidden), (down_outputs, down_inputs) = shapes
    return (outputs, hidden) == (2 * down_inputs, down_outputs)


def no_ops(candidate: Candidate) -> Iterator[Problem]:
    """Modules whose matrices vLLM loads but applies nowhere."""
    allowed, version = candidate.architecture, candidate.architectures.version
    if allowed is None:
        return
    for fault, known in known_faults().no_ops:
        if candidate.served.architecture not in known.classes or version not in fault.versions:
            continue
        paths = [path for path in candidate.modules if allowed.rename(path).rpartition(".")[2] == known.module]
        if paths:
            yield Problem(
                f"{listed(paths)}: vLLM {version} loads these matrices but applies them nowhere, without a message: "
                f"{known.reason} ({', '.join(fault.threads)})",
                fault.cure,
                is_silent=True,
            )


def vocabulary(candidate: Candidate) -> Iterator[Problem]:
    """A vocabulary that is too large for vLLM's LoRA on the output layer."""
    allowed, size = candidate.architecture, candidate.served.vocabulary or 0
    if allowed is not None and "lm_head" in allowed.embeddings and size > MAX_VOCABULARY:
        yield Problem(
            f"the served model has a vocabulary of {size} tokens; vLLM supports LoRA of "
            f"{candidate.served.architecture} only up to {MAX_VOCABULARY}",
            "merge the adapter into the base model with PEFT and serve the merged model",
        )
