"""The adapters that are compared: the folded one, a plain ("vanilla") LoRA of its shapes, and a copy as control."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from loraover.checkpoint.base_model import resolve_base
from loraover.checkpoint.checkpoint import read_checkpoint
from loraover.checkpoint.peft_adapter import AdapterDir, read_adapter_dir
from loraover.checkpoint.tensor_file import open_tensors
from loraover.common.errors import ParityError
from loraover.models.load import ModelSource, load_model
from loraover.reference import reference_model
from loraover_serve.comparison.adapters import check_plain, check_task, write_like
from loraover_serve.judge.limits import BASE
from loraover_serve.parity.answers import Reference
from loraover_serve.parity.request import ParityRequest
from loraover_serve.parity.samples import ALSO, CONTROL, FOLDED, VANILLA


@dataclass(frozen=True)
class Arms:
    """Adapters of equal ranks and targets on one base model.

    Args:
        adapters: Folder of each arm's adapter, by the arm's name.
        checkpoint: Folder of the checkpoint that was folded, for the unfolded model; None if there is none.
        also: Names of further adapters, which answer along with the folded one.
    """

    adapters: Mapping[str, Path]
    base: ModelSource
    checkpoint: Path | None
    also: tuple[str, ...] = ()


def prepare_arms(request: ParityRequest, scratch: Path) -> Arms:
    """Read the folded adapter, and read or make the vanilla one.

    Args:
        scratch: Folder for the adapters that are made.

    Raises:
        ParityError: Adapters of different ranks or targets, or a checkpoint of other modules.
        ConfigError: An adapter that names no base model, or one of another task than causal language modelling.
        CheckpointError: Files that cannot be read as an adapter or a checkpoint, or A and B of a changed base model.
        ExportError: An adapter of stacked experts.
    """
    first = read_adapter_dir(request.adapter)
    others = {ALSO.format(i): read_adapter_dir(path) for i, path in enumerate(request.also_adapters, 2)}
    given = [first, *([] if request.baseline is None else [read_adapter_dir(request.baseline)]), *others.values()]
    for adapter in given:
        check_plain(adapter, "the parity measurement")
    vanilla = request.baseline or make_vanilla(first, scratch / VANILLA, request.seed)
    second = read_adapter_dir(vanilla)
    for name, other in {"vanilla one": second, **others}.items():
        if first.shapes != other.shapes and not request.allow_unequal:
            key = min(set(first.shapes.items()) ^ set(other.shapes.items()))[0]
            found = [adapter.shapes.get(key, "missing") for adapter in (first, other)]
            raise ParityError(
                f"{key} is {found[0]} in the folded adapter and {found[1]} in the {name}, so a difference in speed "
                f"would not be due to folding; compare adapters of equal ranks and targets, or add "
                f"{request.named('allow_unequal', True)}."
            )
    checkpoint = request.checkpoint
    if checkpoint is not None and read_checkpoint(checkpoint).matrices.keys() != first.matrices.keys():
        raise ParityError(
            f"{checkpoint} adapts other modules than {request.adapter}; name the checkpoint that was folded."
        )
    base = resolve_base([first], request.model, option=request.named("model"), say=request.report.line)
    for adapter in given:
        check_task(adapter, base, "parity")
    control = scratch / CONTROL
    shutil.copytree(vanilla, control)
    adapters = {VANILLA: vanilla.resolve(), CONTROL: control.resolve(), FOLDED: request.adapter.resolve()}
    adapters |= {name: other.path.resolve() for name, other in others.items()}
    return Arms(adapters, base, checkpoint, tuple(others))


def references(arms: Arms, *, device: str, compute_dtype: str) -> tuple[dict[str, Reference], str]:
    """Models in PyTorch to compare answers with.

    Args:
        arms: The adapters.
        compute_dtype: Data type to run in.

    Returns:
        The base model and the model of each adapter by the names of their arms, where the folded one's is the unfolded
        checkpoint if there is one; and the folded one's name.
    """
    base = load_model(arms.base, dtype=compute_dtype, device=device)
    found: dict[str, Reference] = {BASE: lambda: nullcontext(base)}
    for arm in (VANILLA, FOLDED, *arms.also):
        found[arm] = partial(reference_model, base, read_adapter_dir(arms.adapters[arm]))
    if arms.checkpoint is None:
        return found, "the folded adapter"
    found[FOLDED] = partial(reference_model, base, read_checkpoint(arms.checkpoint))
    return found, "the unfolded checkpoint"


def make_vanilla(like: AdapterDir, folder: Path, seed: int) -> Path:
    """Write a LoRA with the shapes, types and configuration of another, and random weights.

    A is drawn as PEFT draws it (Kaiming uniform). B, which PEFT starts at zero, is drawn from a normal distribution
    with the other's root mean square. Biases and fully trained modules are copied.

    Args:
        like: The other adapter.
        folder: Folder to write to.
        seed: Seed of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    with open_tensors(like.tensors_path) as file:
        for key, (_, side) in like.matrices.items():
            matrix = file.read(key)
            if side == "A":
                limit = 1 / math.sqrt(matrix.shape[1])
                drawn = (2 * torch.rand(matrix.shape, generator=generator) - 1) * limit
            else:
                drawn = torch.randn(matrix.shape, generator=generator) * float(matrix.double().square().mean().sqrt())
            tensors[key] = drawn.to(matrix.dtype)
        tensors |= {key: file.read(key) for key in file.keys if key not in tensors}
    return write_like(like, tensors, folder)
