"""Stacked LoRA pairs of fused experts in a PEFT adapter file, seen as one ordinary pair (A, B) for each expert.

PEFT wraps a module once for each of its parameters in `target_parameters`. The wrappers are nested in the parameters'
order, and the file's keys name neither parameter: `M.base_layer.lora_A` belongs to gate_up_proj of module M, and
`M.lora_A` to down_proj. The pair of expert 3 is named after the module `M.3.gate_up_proj` here.

PEFT before 0.19 took the second dimension of every parameter (E, m, n) for its inputs. Where a model stores (experts,
outputs, inputs), as most but those that call themselves `is_transposed` do, its A and B are those of the transposed
matrix: delta_W_e = scaling * (B_e @ A_e)^T, which is an ordinary pair again, of A = B_e^T and B = A_e^T.

Llama-4 stores (experts, inputs, outputs) and does not call itself so. PEFT takes its inputs for outputs, and so does
this module: delta_W_e has the shape of the parameter, and an export that cuts gate from up has to refuse it.

Source: ParamWrapper in peft/tuners/lora/layer.py of PEFT 0.18.0 and 0.21.2; peft pull request 3165.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.version import InvalidVersion, Version

from loraover.common.arrays import Array
from loraover.common.errors import CheckpointError
from loraover.common.request import as_written
from loraover.overparam.expert_part import FUSED, SIDES, ExpertPart, MatrixName, without_base_layers

if TYPE_CHECKING:
    from torch import nn

OTHER: Mapping[MatrixName, MatrixName] = {"A": "B", "B": "A"}

PRESENT_LAYOUT = "0.19.0"
"""First version of PEFT whose A takes a layer's inputs in every model."""


@dataclass(frozen=True)
class ExpertStack:
    """The pairs of all experts for one parameter.

    Args:
        module: Path of the module that holds the parameter.
        parameter: Name of the parameter.
        wrapper: Path before `.lora_A.weight` in the file: the module's, with `.base_layer` for each outer wrapper.
        is_flipped: Whether the file holds the pairs of the transposed matrices.
    """

    module: str
    parameter: str
    wrapper: str
    experts: int
    is_flipped: bool = False

    @property
    def path(self) -> str:
        """Path of the parameter in the base model."""
        return f"{self.module}.{self.parameter}"

    def expert(self, index: int) -> str:
        """Return the path by which the pair of one expert is named."""
        return f"{self.module}.{index}.{self.parameter}"

    def sites(self) -> Iterator[tuple[str, str, ExpertPart]]:
        """Yield each site's name, the name of its stack as if that were a site, and its place in the stack."""
        for matrix in SIDES:
            stored = OTHER[matrix] if self.is_flipped else matrix
            for index in range(self.experts):
                part = ExpertPart(stored, index, self.experts)
                yield f"{self.expert(index)}.lora_{matrix}", f"{self.wrapper}.lora_{stored}", part


def expert_paths(stacks: Iterable[ExpertStack]) -> set[str]:
    """Return the paths by which the pairs of all experts of these stacks are named."""
    return {stack.expert(index) for stack in stacks for index in range(stack.experts)}


@dataclass(frozen=True)
class StoredPart:
    """Place of one expert's matrix in a file.

    Args:
        key: Key of the stack.
        part: Place in the stack.
        is_flipped: Whether the stack holds the transposed matrix.
    """

    key: str
    part: ExpertPart
    is_flipped: bool

    def shape(self, stack: tuple[int, ...]) -> tuple[int, ...]:
        """Return the matrix's shape, given the stack's."""
        m, n = stack
        found = (m // self.part.experts, n) if self.part.matrix == "A" else (m, n // self.part.experts)
        return found[::-1] if self.is_flipped else found

    def of(self, stack: Array) -> Array:
        """Return the matrix, a view of the stack."""
        found = self.part.of(stack)
        return found.mT if self.is_flipped else found


@dataclass(frozen=True)
class ExpertWeight:
    """The parameter of a base model that holds one matrix for each expert.

    Args:
        shape: Shape (out_features, in_features) of each expert's matrix.
        is_transposed: Whether the parameter holds it as (in_features, out_features).
    """

    experts: int
    shape: tuple[int, int]
    is_transposed: bool


def find_expert_weights(model: nn.Module) -> dict[str, ExpertWeight]:
    """Return the parameters (E, m, n) of a model's experts by their paths; the model may be on the meta device."""
    found = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and name in FUSED:
                experts, m, n = parameter.shape
                is_transposed = bool(getattr(module, "is_transposed", False))
                shape = (n, m) if is_transposed else (m, n)
                found[f"{path}.{name}"] = ExpertWeight(experts, shape, is_transposed)
    return found


def find_stacks(
    targets: Sequence[str], pairs: Mapping[str, tuple[int, int]], rank: Callable[[str], int], where: Path
) -> list[ExpertStack]:
    """Find the stacked pairs of an adapter; a CheckpointError names pairs that its configuration does not explain."""
    wrappers: dict[str, list[str]] = {}
    for path in pairs:
        wrappers.setdefault(without_base_layers(path), []).append(path)
    stacks = []
    for module, paths in wrappers.items():
        parameters = {name for target in targets if (name := targeted_parameter(target, module)) is not None}
        if not parameters or parameters == {"weight"}:  # a matrix, whose pair is an ordinary one
            continue
        ordered = [name for name in FUSED if name in parameters]
        if len(ordered) != len(parameters) or len(paths) != len(parameters):
            raise CheckpointError(
                f"{where}: {module} has {len(paths)} stacked pairs, and target_parameters names its parameters "
                f"{', '.join(sorted(parameters))}; expected one pair for each, and no others than "
                f"{' and '.join(FUSED)}."
            )
        for name, path in zip(ordered, sorted(paths, key=len, reverse=True), strict=True):
            r, (rows, columns) = rank(f"{module}.{name}"), pairs[path]
            if not rows or rows % r or rows != columns:
                raise CheckpointError(
                    f"{where}: {path}.lora_A has {rows} rows and lora_B {columns} columns, expected the same "
                    f"multiple of {r}, the rank of {module}.{name}."
                )
            stacks.append(ExpertStack(module, name, path, rows // r))
    return stacks


def targeted_parameter(target: str, module: str) -> str | None:
    """Return the parameter of a module that an entry of `target_parameters` names; None if it names none of it."""
    owner, _, name = target.rpartition(".")
    if owner:
        return name if f".{module}".endswith(f".{owner}") else None
    return name if module.rpartition(".")[2] == "experts" else None


def is_flipped(
    stack: ExpertStack, weight: ExpertWeight, found: tuple[int, int], version: str | None, where: Path
) -> bool:
    """Decide whether a stack holds the pairs of the transposed matrices, from the sizes in the file.

    Those of square matrices are told by the version of PEFT that the adapter records.
    """
    if stack.experts != weight.experts or found not in (weight.shape, weight.shape[::-1]):
        raise CheckpointError(
            f"{where}: {stack.path} has {stack.experts} experts of shape {found} in the adapter, and {weight.experts} "
            f"of shape {weight.shape} in the base model; name the model that the adapter was trained on with "
            f"{as_written('model')}."
        )
    if weight.is_transposed or weight.shape[0] != weight.shape[1]:
        return found != weight.shape
    is_present = has_present_layout(version)
    if is_present is None:
        raise CheckpointError(
            f"{where}: the matrices of {stack.path} are square, {found}, so they fit as they are and transposed, and "
            f"the adapter does not record the version of PEFT that trained it. PEFT {PRESENT_LAYOUT} swapped A and B: "
            "set peft_version in adapter_config.json to the version that trained it."
        )
    return not is_present


def has_present_layout(version: str | None) -> bool | None:
    """Return whether a version of PEFT, as adapters record it, takes A for the inputs; None if it does not say."""
    if version is None:
        return None
    try:
        found = Version(version.partition("@")[0])  # a development version has "@" and a commit
    except InvalidVersion:
        return None
    return Version(found.base_version) >= Version(PRESENT_LAYOUT)
