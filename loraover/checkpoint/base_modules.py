"""Places of an adapter's parts in a base model: the modules that it adapts, and the parameters that it replaces."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from loraover.checkpoint.peft_adapter import BASE_WEIGHT, AdapterDir, ExactAdapter
from loraover.checkpoint.target_modules import if_missing
from loraover.common.errors import CheckpointError
from loraover.common.request import as_written


def target_module(base: nn.Module, adapter: AdapterDir, module: str) -> nn.Module:
    """Return a module of the base model that an adapter changes.

    Args:
        base: The base model.
        adapter: The adapter.
        module: Path of the module.

    Raises:
        CheckpointError: The base model has no such module, or one of other dimensions.
    """
    from transformers.pytorch_utils import Conv1D

    m, n = adapter.modules[module].shape
    try:
        target = base.get_submodule(module)
    except AttributeError as error:
        raise CheckpointError(
            f"{adapter.path}: the base model ({type(base).__name__}) has no module {module!r}, and the adapter was "
            f"trained on {adapter.config.base_model_name_or_path!r}; {if_missing(module, dict(base.named_modules()))}."
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


def load_others(base: nn.Module, exact: ExactAdapter) -> dict[str, nn.Parameter]:
    """Put an adapter's other trained parameters (`modules_to_save`, biases, embeddings) into the base model.

    A parameter that modules share, such as an embedding tied to the head, is replaced only under the names that the
    adapter has, as PEFT does. It stays shared if the adapter has both names with equal values. A base weight, which
    PEFT loads into the parameter itself, replaces it under all names.

    Returns:
        The parameters that were replaced, by name.

    Raises:
        CheckpointError: A parameter of the adapter fits none of the model; nothing has been replaced then.
    """
    parameters = dict(base.named_parameters(remove_duplicate=False))
    others: dict[str, nn.Parameter] = {}
    shared: dict[str, nn.Parameter] = {}
    for key, name in exact.adapter.others.items():
        if name.endswith(".lora_B.bias"):
            continue
        if name not in parameters or tuple(parameters[name].shape) != exact.plain.shape(key):
            raise CheckpointError(
                f"{exact.plain.path}: {key} fits no parameter of the base model ({type(base).__name__})."
            )
        value = nn.Parameter(exact.plain.read(key).to(parameters[name]), requires_grad=False)
        twins = (o for other, o in others.items() if parameters[other] is parameters[name] and torch.equal(o, value))
        others[name] = next(twins, value)
        if key.endswith(BASE_WEIGHT):
            shared |= {other: value for other, p in parameters.items() if p is parameters[name]}
    others = shared | others
    replaced = {name: parameters[name] for name in others}
    put_parameters(base, others)
    return replaced


def put_parameters(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Replace parameters by name."""
    for name, parameter in parameters.items():
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, parameter)
