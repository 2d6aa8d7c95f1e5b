"""Adapters that are read together: of one base model, and plain products of A and B."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from loraover.adapters.combine.requests import CombineRequest, ShrinkRequest
from loraover.adapters.numerics.delta import Delta, read_delta
from loraover.adapters.uniform.refusals import HELD, check_fields, check_tensors, has_targets
from loraover.adapters.uniform.write_lora import LoraOutput
from loraover.checkpoint.base_model import described
from loraover.checkpoint.expert_stacks import PRESENT_LAYOUT, ExpertStack, has_present_layout
from loraover.checkpoint.files import CONFIG_FILE
from loraover.checkpoint.peft_adapter import AdapterDir, ExactAdapter
from loraover.checkpoint.source import read_source
from loraover.checkpoint.target_modules import Targets
from loraover.checkpoint.tensor_file import open_tensors
from loraover.common.errors import ExportError
from loraover.common.strict_json import read_json

MERGE = "merge it with PEFT"
REMEDIES = {
    **dict.fromkeys(HELD, "merge it into its base model with `loraover export merge`"),
    "trainable_token_indices": "make it a plain LoRA with `loraover export convert`",
}
"""Advice about fields that a sum of deltas cannot hold, to follow "train without it, or "."""


@dataclass(frozen=True)
class Sources:
    """Adapters that have been read and checked."""

    adapters: tuple[AdapterDir, ...]

    @property
    def modules(self) -> list[str]:
        """Paths of the modules that any of the adapters has matrices for."""
        return list(dict.fromkeys(module for adapter in self.adapters for module in adapter.modules))

    @property
    def stacks(self) -> Sequence[ExpertStack]:
        """Parameters of experts that the adapters change, which are the same in all adapters that change any."""
        return next((adapter.stacks for adapter in self.adapters if adapter.stacks), ())

    @property
    def base_model(self) -> str | None:
        """Base model that the adapters name."""
        return self.adapters[0].config.base_model_name_or_path

    @property
    def task_type(self) -> str | None:
        """PEFT's name of the task of the first adapter that names one."""
        return next((kind for a in self.adapters if (kind := a.config.task_type)), None)

    @property
    def targets(self) -> dict[str, Any] | None:
        """Fields that choose the adapted modules, if all adapters have the same; None if they differ or are open.

        PEFT renames the keys of an earlier transformers, and not the paths in these fields.
        """
        found = [read_json(adapter.path / CONFIG_FILE, Targets) for adapter in self.adapters]
        is_one = all(one.choice == found[0].choice for one in found) and found[0].target_modules is not None
        return found[0].choice if is_one and not found[0].is_open else None

    def output(self, request: CombineRequest | ShrinkRequest, title: str, **more: Any) -> LoraOutput:
        """Return where and how to write a LoRA made of these adapters, with the base weights that their files hold."""
        held = held_weights(self)
        notes = [f"base weights that the sources hold were taken over as they are: {', '.join(held)}"] if held else []
        return LoraOutput(
            request.output,
            request.command(),
            title,
            base_model=self.base_model,
            revision=next((a.config.revision for a in self.adapters if a.config.revision is not None), None),
            task_type=self.task_type,
            dtype=request.dtype,
            force=request.force,
            others=held,
            stacks=self.stacks,
            targets=self.targets,
            notes=notes,
            **more,
        )

    @contextmanager
    def opened(self) -> Iterator[list[ExactAdapter]]:
        """Open the files of all adapters."""
        with ExitStack() as stack:
            yield [stack.enter_context(adapter.open()) for adapter in self.adapters]


def read_sources(paths: Sequence[Path]) -> Sources:
    """Read adapters whose deltas are to be added or compared.

    Raises:
        CheckpointError: An adapter that cannot be trusted, or that was trained on changed base weights.
        ExportError: Adapters of different base models, or of modules with different shapes.
    """
    sources = Sources(tuple(map(read_source, paths)))
    for adapter in sources.adapters:
        adapter.check_keeps_base()
    _check_experts(sources)
    named = {(a.config.base_model_name_or_path, a.config.revision or "main") for a in sources.adapters}
    if len(named) > 1:
        found = "; ".join(
            f"{a.path}: {described({(a.config.base_model_name_or_path, a.config.revision)})}" for a in sources.adapters
        )
        raise ExportError(
            f"{found}. Deltas fit one base model only. If these are the same weights, write the same "
            f"base_model_name_or_path and revision into each {CONFIG_FILE}."
        )
    seen: dict[str, tuple[str, Path]] = {}
    for adapter in sources.adapters:
        for path, module in adapter.modules.items():
            shape = f"{module.shape[0]} x {module.shape[1]}{' of an embedding' * module.is_embedding}"
            first, where = seen.setdefault(path, (shape, adapter.path))
            if first != shape:
                raise ExportError(
                    f"{path} is {first} in {where} and {shape} in {adapter.path}: these adapters belong to different "
                    "base models."
                )
    return sources


def check_plain(sources: Sources) -> None:
    """Refuse adapters that are more than A and B, and the base weights of `held_weights`."""
    for adapter in sources.adapters:
        allowed = {"target_parameters"} if has_targets(adapter) else set()
        check_fields(adapter, MERGE, allowed=allowed, remedies=REMEDIES)
        shapes = {path: module.weight_shape for path, module in adapter.modules.items()}
        check_tensors(adapter, shapes, MERGE)


def held_weights(sources: Sources) -> dict[str, Tensor]:
    """Return the base weights that the files hold, by their keys; PEFT loads them over those of the base model.

    PEFT saves them beside adapted embeddings. Where the vocabulary was resized, no other file holds the new rows.
    """
    found: dict[str, tuple[Tensor, Path]] = {}
    for adapter in sources.adapters:
        with open_tensors(adapter.tensors_path) as file:
            for key in adapter.others:
                weight = file.read(key)
                first, path = found.setdefault(key, (weight, adapter.path))
                if first.shape != weight.shape or bool((first != weight).any()):
                    raise ExportError(
                        f"{path} and {adapter.path} hold different weights as {key}, so each adapter fits only its own "
                        "weights. Train them on the same base model, with the same rows for new tokens."
                    )
    return {key: weight for key, (weight, _) in found.items()}


def deltas_of(opened: Sequence[ExactAdapter], module: str) -> list[Delta | None]:
    """Return the delta of one module in each adapter; None in those that do not adapt it."""
    return [read_delta(exact, module) if module in exact.adapter.modules else None for exact in opened]


def _check_experts(sources: Sources) -> None:
    """Refuse experts whose A and B may be swapped, and adapters whose stacks differ."""
    for adapter in sources.adapters:
        if adapter.stacks and not has_present_layout(adapter.config.peft_version):
            raise ExportError(
                f"{adapter.path}: adapts experts, and was not saved by PEFT {PRESENT_LAYOUT} or newer. Older releases "
                "stored A and B of experts swapped. Write it again with loraover export convert, which compares it "
                "with its base model."
            )
    adapters = [adapter for adapter in sources.adapters if adapter.stacks]
    stacks = [{stack.path: (stack.wrapper, stack.experts) for stack in adapter.stacks} for adapter in adapters]
    other = next((adapter for adapter, found in zip(adapters, stacks, strict=True) if found != stacks[0]), None)
    if other is not None:
        raise ExportError(
            f"{adapters[0].path} and {other.path} adapt different parameters of experts, or different numbers of "
            "experts; combine adapters that adapt the same."
        )
