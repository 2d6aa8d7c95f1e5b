"""Places of an adapter's parts in a base model: the modules that it adapts, and the parameters that it replaces."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from loraover.checkpoint.files import CONFIG_FILE
from loraover.checkpoint.peft_adapter import KEY_PREFIX, AdapterDir, ExactAdapter, saved_labels
from loraover.checkpoint.target_modules import Targets, if_missing, is_single_expert
from loraover.checkpoint.tensor_file import TensorFile
from loraover.common.errors import CheckpointError
from loraover.common.request import as_written
from loraover.common.strict_json import read_json

CLASSIFIERS = {"SEQ_CLS": "AutoModelForSequenceClassification", "TOKEN_CLS": "AutoModelForTokenClassification"}
"""Classes of transformers that load a base model with the head of a task."""


def target_module(base: nn.Module, adapter: AdapterDir, module: str) -> nn.Module:
    """Return a module of the base model that an adapter changes; a CheckpointError if there is none of its size."""
    from transformers.pytorch_utils import Conv1D

    m, n = adapter.modules[module].shape
    try:
        target = base.get_submodule(module)
    except AttributeError as error:
        names = dict(base.named_modules())
        renaming = (
            " Modules under another prefix, or with the names of an earlier transformers, get the base model's names "
            "by `loraover export convert`."
        )
        raise CheckpointError(
            f"{adapter.path}: the base model ({type(base).__name__}) has no module {module!r}, and the adapter was "
            f"trained on {adapter.config.base_model_name_or_path!r}; {if_missing(module, names)}."
            + renaming
            * (not is_single_expert(module, names))
        ) from error
    match target:
        case nn.Linear():
            found = (target.in_features, target.out_features)
        case Conv1D():
            found = (target.nx, target.nf)
        case nn.Embedding():
            found = (target.num_embeddings, target.embedding_dim)
        case _:
            raise CheckpointError(
                f"{adapter.path}: {module} is a {type(target).__name__}; expected a linear layer or embedding."
            )
    if found != (n, m):
        raise CheckpointError(
            f"{adapter.path}: {module} maps {found[0]} to {found[1]} features in the base model, but {n} to "
            f"{m} in the adapter, which was trained on {adapter.config.base_model_name_or_path!r}. "
            f"Name that model with {as_written('model')}."
        )
    return target


def replaced_parameters(base: nn.Module, adapter: AdapterDir, plain: TensorFile) -> dict[str, str]:
    """Return the keys of an adapter's other trained parameters by the names of the base model's that they replace.

    PEFT loads them into the parameter itself, and so under all names that share it, such as those of an embedding tied
    to the head. A module of `modules_to_save` has a copy of its parameters, so that only this name is replaced.

    Args:
        plain: Its open file.

    Raises:
        CheckpointError: A parameter that PEFT ignores, that fits none of the model, or that contradicts another one.
    """
    if adapter.ignored:
        raise CheckpointError(
            f"{adapter.tensors_path}: {adapter.ignored[0]} is neither A nor B, and PEFT ignores a tensor of this name. "
            f"PEFT's keys begin with {KEY_PREFIX}, and weight and bias of an adapted module are below .base_layer. "
            "Remove the tensor; if it was trained, rename it."
        )
    parameters = dict(base.named_parameters(remove_duplicate=False))
    targets = read_json(adapter.path / CONFIG_FILE, Targets)
    copies: dict[str, str] = {}
    shared: dict[str, str] = {}
    for key, name in adapter.others.items():
        if name.endswith(".lora_B.bias"):
            continue
        if name not in parameters or tuple(parameters[name].shape) != adapter.shapes[key]:
            kind, labels = type(base).__name__, saved_labels(adapter.shapes)
            auto = CLASSIFIERS.get(adapter.config.task_type or "")
            reason = f"fits no parameter of the base model ({kind})"
            if auto is not None and labels is not None:
                reason = (
                    f"is of the head of task_type {adapter.config.task_type}, and the base model is a {kind} without "
                    f"that head. Save it with one ({auto}.from_pretrained(..., num_labels={labels})"
                    f".save_pretrained(FOLDER)), and name the folder with {as_written('model')}"
                )
            raise CheckpointError(f"{adapter.tensors_path}: {key} {reason}.")
        if targets.saves(name):
            copies[name] = key
            continue
        before = shared.get(name)
        if before is not None and not torch.equal(plain.read(before), plain.read(key)):
            raise CheckpointError(
                f"{adapter.tensors_path}: {before} and {key} replace one parameter, which the base model shares, with "
                "different values; remove one of them."
            )
        shared |= {other: key for other, found in parameters.items() if found is parameters[name]}
    return shared | copies


def load_others(base: nn.Module, exact: ExactAdapter) -> dict[str, nn.Parameter]:
    """Put an adapter's other trained parameters (`modules_to_save`, biases, embeddings) into the base model.

    A parameter that modules share stays shared if all its names are replaced by equal values. Returned are the replaced
    parameters, by name. Where `replaced_parameters` raises, nothing has been replaced.
    """
    parameters = dict(base.named_parameters(remove_duplicate=False))
    found: dict[str, nn.Parameter] = {}
    others: dict[str, nn.Parameter] = {}
    for name, key in replaced_parameters(base, exact.adapter, exact.plain).items():
        if key not in found:
            value = nn.Parameter(exact.plain.read(key).to(parameters[name]), requires_grad=False)
            twins = (others[other] for other in others if parameters[other] is parameters[name])
            found[key] = next((twin for twin in twins if torch.equal(twin, value)), value)
        others[name] = found[key]
    replaced = {name: parameters[name] for name in others}
    put_parameters(base, others)
    return replaced


def put_parameters(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Replace parameters by name."""
    for name, parameter in parameters.items():
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, parameter)
