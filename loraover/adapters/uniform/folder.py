"""The uniform form of an adapter: delta_W = scaling * B @ A = 1 * [scaling * B, 0] @ [A; 0], with one rank for all.

Engines differ in how they read rank_pattern, alpha_pattern and use_rslora, and some round B before they scale it.
Experts of one parameter are stacked as PEFT has them, or have a pair for each projection.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from loraover.adapters.numerics.delta import is_power_of_two, scale
from loraover.adapters.numerics.matrix_certificate import Errors, MatrixCertificate, Underflow, certify_parts
from loraover.checkpoint.adapter_config import write_config
from loraover.checkpoint.base_model import naming
from loraover.checkpoint.error_bounds import U64, gamma
from loraover.checkpoint.exact_tensors import Exact
from loraover.checkpoint.expert_stacks import PRESENT_LAYOUT, ExpertStack
from loraover.checkpoint.files import TENSORS_FILE
from loraover.checkpoint.peft_adapter import AdapterDir, site_key, site_name
from loraover.checkpoint.tensor_file import header_of, open_tensors
from loraover.common.atomic_output import sync
from loraover.common.errors import ExportError, FoldError
from loraover.common.extras import install
from loraover.common.later import has_torch, torch
from loraover.models.load import ModelSource

if TYPE_CHECKING:
    from torch import Tensor

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class _Storage:
    """A data type that adapters are stored in, by its name in safetensors files."""

    name: str
    roundoff: float  # largest relative error of rounding to nearest, u
    normal: float  # smallest normal number

    @property
    def subnormal(self) -> float:
        """Spacing of the numbers near zero."""
        return self.normal * 2 * self.roundoff


STORAGE = {
    "fp32": _Storage("F32", 2.0**-24, 2.0**-126),
    "bf16": _Storage("BF16", 2.0**-8, 2.0**-126),
    "fp16": _Storage("F16", 2.0**-11, 2.0**-14),
}


def write_plain(
    adapter: AdapterDir, file: Path, dtype: str, on_tensor: Callable[[int], None] = lambda done: None
) -> list[MatrixCertificate]:
    """Write A and B of a plain LoRA with one rank and scaling 1, each rounded once, and certify each matrix."""
    if adapter.stacks:
        raise ExportError(f"{adapter.path}: it adapts stacked experts, which needs PyTorch: {install('torch')}")
    storage, certificates = STORAGE[dtype], []
    written: dict[str, NDArray[np.generic]] = {}
    with open_tensors(adapter.tensors_path) as source:
        for key, (module, side) in adapter.matrices.items():
            stored, scaling = source.numbers(key), module.scaling if side == "B" else 1.0
            exact = stored * scaling
            is_exact = scaling == 0 or (is_power_of_two(scaling) and np.array_equal(exact / scaling, stored))
            bound = np.zeros_like(exact) if is_exact else gamma(1, U64) * np.abs(exact)
            missing = adapter.rank - module.rank
            padding = ((0, missing), (0, 0)) if side == "A" else ((0, 0), (0, missing))
            exact, bound = np.pad(exact, padding), np.pad(bound, padding)
            bits = _rounded(key, exact, dtype)
            size, numbers = np.abs(exact), _widened(bits)
            allowed = np.maximum((size + bound) * storage.roundoff, storage.subnormal / 2) + bound
            error, is_zero, is_small = np.abs(numbers - exact), numbers == 0, np.abs(numbers) < storage.normal
            lost = Underflow(int((is_zero & (exact != 0)).sum()), int((~is_zero & is_small).sum()))
            norm, error_norm, bound_norm = (float(np.linalg.norm(x)) for x in (exact, error, allowed))
            errors = Errors(norm, error_norm, bound_norm, float((error / allowed).max(initial=0.0)), lost)
            name = site_name(key)
            assert name is not None, "of a key of A or B"
            m, n = exact.shape
            certificates.append(certify_parts(name, (m, n), [errors], over_parameterised=False))
            written[key] = bits
            on_tensor(len(written))
    _save(written, file, storage.name)
    return certificates


def _save(written: dict[str, NDArray[np.generic]], file: Path, dtype: str) -> None:
    """Write a safetensors file in the order of the safetensors library, and read it back."""
    entries = sorted(written.items())
    with file.open("wb") as target:
        target.write(header_of((key, dtype, bits.shape, bits.nbytes) for key, bits in entries))
        target.writelines(np.ascontiguousarray(bits).data.cast("B") for _, bits in entries)
    sync(file)
    with open_tensors(file) as kept:
        lost = next((key for key, bits in entries if kept.bytes(key) != bits.tobytes()), None)
    if lost is not None:
        raise FoldError(f"{lost}: the file does not hold what was written to it; check the disk, or write elsewhere.")


def _rounded(key: str, exact: Numbers, dtype: str) -> NDArray[np.generic]:
    """Round to the nearest numbers of a type, ties to even; those of bf16 are returned as their bits.

    NumPy has no bfloat16. Rounding to odd at float32 makes the second rounding correct (Boldo and Melquiond 2008,
    doi:10.1109/TC.2007.70819).
    """
    with np.errstate(over="ignore"):
        nearest = exact.astype(np.float16 if dtype == "fp16" else np.float32)
    rounded: NDArray[np.generic] = nearest
    if dtype == "bf16":
        wide, bits = nearest.astype(np.float64), nearest.view(np.uint32)
        bits = (bits - (np.abs(wide) > np.abs(exact))) | (wide != exact)
        bits = bits.astype(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    if not np.isfinite(_widened(rounded)).all():
        raise FoldError(
            f"{key}: an element of {np.abs(exact).max():.4g} exceeds the largest {STORAGE[dtype].name} number; a wider "
            "type holds it."
        )
    return rounded


def _widened(rounded: NDArray[np.generic]) -> Numbers:
    if rounded.dtype == np.uint16:
        return (rounded.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return rounded.astype(np.float64)


def write_uniform(
    adapter: AdapterDir,
    directory: Path,
    dtype: str,
    config: dict[str, Any],
    on_tensor: Callable[[int], None] = lambda done: None,
    pack: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
) -> list[MatrixCertificate]:
    """Write the uniform adapter, and certify each matrix against its exact value.

    Each matrix is that of `to_uniform`, rounded once. Tensors other than A and B are not written.

    Args:
        adapter: Adapter whose cores or stored values are the exact ones.
        directory: An empty folder.
        dtype: Data type to store: fp32, bf16 or fp16.
        config: Contents of `adapter_config.json`, from `uniform_config`.
        on_tensor: Called after each tensor with the number of tensors so far.
        pack: Change of the rounded tensors to those of the file; None means PEFT's stacks of experts.

    Raises:
        CheckpointError: NaN, or a stored matrix that contradicts its cores.
        FoldError: An element beyond the range of `dtype`, or a file that does not hold what was written.
    """
    write_config(config, directory)
    if not has_torch():
        return write_plain(adapter, directory / TENSORS_FILE, dtype, on_tensor)
    from loraover.adapters.numerics.rounding import write_rounded

    prepare, keys = to_uniform(adapter), adapter.matrices
    return write_rounded(adapter, keys, directory, dtype, prepare=prepare, pack=pack, on_tensor=on_tensor)


def uniform_config(adapter: AdapterDir, served: ModelSource, target_modules: list[str]) -> dict[str, Any]:
    """Return the contents of `adapter_config.json`, with every field that changes the adapter's function.

    Args:
        adapter: The adapter to be written.
        served: Base model to name if the adapter names none, or was trained on a stand-in of it.
        target_modules: Suffixes that match exactly the adapted modules; see `name_modules`.
    """
    config = plain_config(
        adapter.rank,
        target_modules,
        base_model=adapter.config.base_model_name_or_path,
        revision=adapter.config.revision,
        task_type=adapter.config.task_type,
    )
    is_named = adapter.config.base_model_name_or_path is not None and served.moved is None
    return config if is_named else naming(config, served)


def plain_config(
    rank: int,
    target_modules: list[str],
    *,
    base_model: str | None,
    revision: str | None,
    task_type: str | None,
    modules_to_save: list[str] | None = None,
) -> dict[str, Any]:
    """Return the contents of `adapter_config.json` of a plain LoRA with one rank and scaling 1."""
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "revision": revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": target_modules,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": modules_to_save,
    }


def name_modules(adapted: Collection[str], others: Collection[str]) -> list[str]:
    """Return the shortest suffixes that match every adapted module and no other.

    PEFT adapts a module whose path equals an entry, or ends with "." and an entry. An ExportError names an adapted
    module whose every suffix matches another module too.
    """
    forbidden = {suffix for path in others for suffix in _suffixes(path)}
    chosen = set()
    for path in adapted:
        suffix = next((suffix for suffix in _suffixes(path) if suffix not in forbidden), None)
        if suffix is None:
            raise ExportError(
                f"{path}: no list of target_modules can name it alone, since another module's path ends the same way; "
                "adapt both."
            )
        chosen.add(suffix)
    return sorted(chosen)


def _suffixes(path: str) -> list[str]:
    """Suffixes of a path, shortest first: q_proj, self_attn.q_proj, 0.self_attn.q_proj, ..."""
    parts = path.split(".")
    return [".".join(parts[k:]) for k in reversed(range(len(parts)))]


def to_uniform(adapter: AdapterDir) -> Callable[[str, Exact], Exact]:
    """Return a function that brings a matrix of an adapter into the uniform form, by its key in the adapter's file.

    The function pads the matrix to the largest rank; it multiplies B by its module's scaling before. A product that is
    not exact adds one rounding of float64 to the bound of B; the padding is exact.
    """
    r = adapter.rank

    def form(key: str, exact: Exact) -> Exact:
        module, side = adapter.matrices[key]
        if side == "A":
            return _padded(exact, (0, 0, 0, r - module.rank))
        return _padded(scale(exact, module.scaling), (0, r - module.rank))

    return form


def _padded(exact: Exact, sides: tuple[int, ...]) -> Exact:
    if not any(sides):
        return exact

    def zeros(matrix: Tensor) -> Tensor:
        return torch.nn.functional.pad(matrix, sides)

    return Exact(zeros(exact.value), zeros(exact.bound), exact.site)


Projections = tuple[str, str, str]
"""Names of a class's gate, up and down projections."""


def stack_fields(stacks: Sequence[ExpertStack]) -> dict[str, Any]:
    """Return the fields of `adapter_config.json` by which PEFT finds stacked pairs, and knows their layout."""
    if not stacks:
        return {}
    return {"target_parameters": [stack.path for stack in stacks], "peft_version": PRESENT_LAYOUT}


def parts_of(parameter: str, projections: Projections) -> tuple[str, ...]:
    """Return the projections that a parameter of all experts holds: gate and up, or down."""
    return projections[:2] if parameter == "gate_up_proj" else projections[2:]


def split_paths(stacks: Sequence[ExpertStack], projections: Projections) -> set[str]:
    """Return the paths by which `split_experts` names the pairs of all experts."""
    return {
        f"{stack.module}.{expert}.{name}"
        for stack in stacks
        for expert in range(stack.experts)
        for name in parts_of(stack.parameter, projections)
    }


def split_experts(adapter: AdapterDir, projections: Projections) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Return a function that gives every projection of every expert its pair: experts.3.gate_proj.lora_A, and so on.

    Gate and up have the same A, and the upper and the lower half of the rows of B.
    """

    def split(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {key: tensor for key, tensor in tensors.items() if key not in adapter.parts}
        for stack in adapter.stacks:
            names = parts_of(stack.parameter, projections)
            for expert in range(stack.experts):
                a, b = (tensors[site_key(f"{stack.expert(expert)}.lora_{matrix}")] for matrix in "AB")
                for name, rows in zip(names, b.chunk(len(names)), strict=True):
                    path = f"{stack.module}.{expert}.{name}"
                    found[site_key(f"{path}.lora_A")] = a.clone()  # safetensors refuses shared memory
                    found[site_key(f"{path}.lora_B")] = rows.contiguous()
        return found

    return split
