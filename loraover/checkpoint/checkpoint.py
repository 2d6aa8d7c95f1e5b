"""The LoRA-Over checkpoint: a PEFT adapter directory plus the cores behind its matrices.

    adapter_config.json, adapter_model.safetensors   as PEFT writes them
    loraover.json                                    sites, shapes, decomposition, versions, checksums
    loraover.safetensors                             cores, and their optimizer state to resume from

The cores are the truth. A checkpoint whose A and B are not their contraction is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from loraover.checkpoint.error_bounds import gamma, smallest_subnormal, unit_roundoff
from loraover.checkpoint.peft_adapter import CONFIG_FILE, TENSORS_FILE, AdapterDir, read_adapter_dir, site_key
from loraover.checkpoint.tensor_file import TensorFile, open_tensors, save_tensors, sha256_of
from loraover.common.atomic_output import publish_file, publish_text
from loraover.common.errors import CheckpointError, LoraOverError
from loraover.common.strict_json import read_json
from loraover.common.version import __version__
from loraover.overparam.config import LoraOverConfig
from loraover.overparam.decompositions import Decomposition
from loraover.overparam.importance import GradientScore
from loraover.overparam.parameterization import OverParameterization
from loraover.overparam.schedule import Round
from loraover.overparam.sharding import full, world_size
from loraover.overparam.sites import only_adapter

SCHEMA_VERSION = 2
META_FILE, CORES_FILE = "loraover.json", "loraover.safetensors"
SCORE_PREFIX = "score."


class SiteRecord(BaseModel):
    """One over-parameterised matrix of shape (m, n) in `loraover.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    m: int = Field(ge=1)
    n: int = Field(ge=1)
    step: int = Field(ge=0, description="optimizer steps taken when it was injected")
    state: dict[str, int | float | bool | str | None] = Field(
        default_factory=dict, description="optimizer state that is not a tensor, by tensor-style key"
    )

    def core_key(self, k: int) -> str:
        return f"{self.name}.core.{k}"


class _Version(BaseModel):
    model_config = ConfigDict(extra="ignore")

    format: Literal["loraover-checkpoint"]
    schema_version: int


class Meta(BaseModel):
    """Contents of `loraover.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["loraover-checkpoint"] = "loraover-checkpoint"
    schema_version: int = SCHEMA_VERSION
    base_model: str | None
    step: int = Field(ge=0, description="optimizer steps taken")
    config: LoraOverConfig
    core_dtype: Literal["float32", "float64"]
    sites: list[SiteRecord]
    rounds: list[Round] = Field(description="the schedule's decisions so far")
    steps: int | None = Field(None, ge=0, description="optimizer steps of the whole run, where it was told")
    optimizer_steps: int = Field(ge=0, description="of those `step` counts, the ones that an optimizer took")
    optimizer: str | None = Field(description="class of the optimizer that the state belongs to")
    world_size: int = Field(ge=1, description="processes that trained together")
    versions: dict[str, str]
    sha256: dict[str, str] = Field(description="of the files that belong to this checkpoint")
    digest: str = Field("", description="SHA-256 of this file's canonical JSON with an empty digest")

    def sealed(self) -> Meta:
        """With its digest."""
        return self.model_copy(update={"digest": digest_of(self.model_dump(mode="json"))})


def digest_of(content: dict[str, Any]) -> str:
    """SHA-256 of the canonical JSON, the digest itself left empty."""
    return hashlib.sha256(json.dumps({**content, "digest": ""}, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Checkpoint:
    """A LoRA-Over checkpoint whose checksums, metadata and layout have been checked.

    Tensors are read site by site, so that a large checkpoint needs little memory.
    """

    adapter: AdapterDir
    meta: Meta

    @property
    def path(self) -> Path:
        return self.adapter.path

    @property
    def cores_path(self) -> Path:
        return self.path / CORES_FILE

    @cached_property
    def decomposition(self) -> Decomposition:
        return self.meta.config.make_decomposition()

    @cached_property
    def sites(self) -> dict[str, SiteRecord]:
        return {site.name: site for site in self.meta.sites}

    def read_cores(self, file: TensorFile, site: SiteRecord) -> tuple[Tensor, ...]:
        """The cores of one site; core k has shape (1, p_k, q_k).

        Raises:
            CheckpointError: a missing core, another shape or dtype, NaN or infinity.
        """
        dtype = getattr(torch, self.meta.core_dtype)
        cores = []
        for k, shape in enumerate(self.decomposition.core_shapes(site.m, site.n)):
            core = file.read(site.core_key(k))
            if tuple(core.shape) != shape or core.dtype != dtype:
                raise CheckpointError(
                    f"{file.path}: {site.core_key(k)} is {core.dtype} {tuple(core.shape)}, expected {dtype} {shape}; "
                    "the file is damaged or belongs to another checkpoint."
                )
            cores.append(core.unsqueeze(0))
        return tuple(cores)

    def contract(self, cores: Iterable[Tensor], site: SiteRecord) -> tuple[Tensor, Tensor]:
        """Float64 contraction (m, n), and the contraction of the cores' absolute values."""
        wide = [core.double() for core in cores]
        matrix = self.decomposition.contract(wide, site.m, site.n)[0]
        magnitude = self.decomposition.contract([core.abs() for core in wide], site.m, site.n)[0]
        return matrix, magnitude

    def check_stored(self, stored: Tensor, matrix: Tensor, magnitude: Tensor, site: SiteRecord) -> None:
        """Raise CheckpointError unless `stored` can be the contraction that training wrote.

        Training contracts in the cores' dtype, on any device and in any order, and then casts. Element by
        element the two roundings are at most gamma_k(u_core) * |C_1| ... |C_K| and u_stored * |M|.
        """
        terms = self.decomposition.contraction_terms(site.m, site.n)
        contraction = gamma(terms, unit_roundoff(getattr(torch, self.meta.core_dtype))) * magnitude
        cast = unit_roundoff(stored.dtype) * (matrix.abs() + contraction) + smallest_subnormal(stored.dtype)
        excess = ((stored.double() - matrix).abs() - contraction - cast).flatten()
        worst = int(excess.argmax())
        if excess[worst] > 0:
            row, column = divmod(worst, site.n)
            raise CheckpointError(
                f"{self.adapter.tensors_path}: {site_key(site.name)} contradicts its cores: element ({row}, {column}) "
                f"is {stored[row, column]:.9g}, the cores give {matrix[row, column]:.9g}. A or B was written by "
                "something else than training; save the checkpoint again."
            )


def write_checkpoint(
    directory: str | os.PathLike[str], over: OverParameterization, *, step: int, adapter: str = "default"
) -> None:
    """Add the cores to the adapter directory that PEFT has just written.

    `loraover.json` comes last: a folder without it is a plain adapter, a folder with it is whole.

    Args:
        directory: holds `adapter`, as `model.save_pretrained` writes it, as safetensors.
        over: owns the cores.
        step: optimizer steps taken.
        adapter: whose cores.

    Raises:
        CheckpointError: no safetensors adapter there, or no site of `adapter` has cores and none is to have some.
        ConfigError: A or B were written by something else than training.
        OutputError: the files cannot be written.
    """
    over.check_unchanged()
    stored = read_adapter_dir(Path(directory))
    tensors, records, dtypes = _recorded(over, adapter)
    if len(dtypes) > 1:
        raise CheckpointError(f"{directory}: cores of several dtypes ({dtypes}); train A and B in one dtype.")
    if not dtypes and over.config.schedule != "dynamic":
        raise CheckpointError(f"{directory}: adapter {adapter!r} has no over-parameterised site to save.")
    if isinstance(over.schedule.score, GradientScore) and over.schedule.observed is not None:
        tensors |= {SCORE_PREFIX + key: value for key, value in over.schedule.score.state().items()}
    publish_file(stored.path / CORES_FILE, lambda draft: save_tensors(tensors, draft))
    meta = Meta(
        base_model=stored.config.base_model_name_or_path,
        step=step,
        config=over.config,
        core_dtype="float64" if torch.float64 in dtypes else "float32",
        sites=records,
        rounds=over.schedule.rounds,
        steps=over.steps,
        optimizer_steps=over.step,
        optimizer=over.optimizer_class,
        world_size=world_size(),
        versions={"loraover": __version__, **{name: version(name) for name in ("torch", "peft", "transformers")}},
        sha256={name: sha256_of(stored.path / name) for name in (CONFIG_FILE, TENSORS_FILE, CORES_FILE)},
    )
    publish_text(stored.path / META_FILE, meta.sealed().model_dump_json(indent=1))


def _recorded(over: OverParameterization, adapter: str) -> tuple[dict[str, Tensor], list[SiteRecord], set[torch.dtype]]:
    """Cores and optimizer state as a file takes them, what `loraover.json` says of sites, and the cores' dtypes."""
    tensors: dict[str, Tensor] = {}
    records: list[SiteRecord] = []
    dtypes: set[torch.dtype] = set()
    for group in over.groups:
        for i, site in enumerate(group.sites):
            if site.adapter != adapter:
                continue
            dtypes.add(group.dtype)
            m, n = site.shape
            plain = {}
            record = SiteRecord(name=site.path, m=m, n=n, step=group.step)
            for k, parameters in enumerate(group.parameters):
                key = record.core_key(k)
                tensors[key] = parameters[i].detach().cpu()
                for name, value in over.core_state(parameters[i]).items():
                    if isinstance(value, Tensor):
                        tensors[f"{key}.{name}"] = value.detach().cpu().clone()  # 8-bit optimizers share some
                    else:
                        plain[f"{key}.{name}"] = value
            records.append(record.model_copy(update={"state": plain}))
    return tensors, records, dtypes


def read_checkpoint(directory: str | os.PathLike[str]) -> Checkpoint:
    """Read a LoRA-Over checkpoint: its own, or a Trainer's `checkpoint-N` with the callback's files.

    Raises:
        CheckpointError: a missing, truncated, damaged or unknown file, or files that contradict one
            another. The matrices are compared with the cores where they are read (`check_stored`).
    """
    path = Path(directory)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; expected a LoRA-Over checkpoint.")
    if not (path / META_FILE).is_file():
        with open_tensors(path / TENSORS_FILE):
            pass
        raise CheckpointError(
            f"{path / META_FILE}: no such file. This folder holds a plain LoRA without the cores behind it, which can "
            "be served as it is, or its saving was cut off. After training with LoraOverCallback, the Trainer's "
            "output_dir and its checkpoint-N folders hold cores: name one of those, for a fold with a certificate or "
            "to resume."
        )
    found = read_json(path / META_FILE, _Version)
    if found.schema_version != SCHEMA_VERSION:
        raise CheckpointError(
            f"{path / META_FILE}: schema_version is {found.schema_version}, this version reads {SCHEMA_VERSION}; "
            "use the version of loraover that wrote it, or a newer one."
        )
    meta = read_json(path / META_FILE, Meta)
    if meta.digest != digest_of(json.loads((path / META_FILE).read_bytes())):
        raise CheckpointError(f"{path / META_FILE}: its digest does not match its content; the file is damaged.")
    adapter = read_adapter_dir(path)
    if adapter.config.base_model_name_or_path != meta.base_model:
        raise CheckpointError(
            f"{path / CONFIG_FILE}: base_model_name_or_path is {adapter.config.base_model_name_or_path!r}, but the "
            f"cores were trained on {meta.base_model!r}; undo the edit and use --model to name a copy of that model."
        )
    checkpoint = Checkpoint(adapter, meta)
    _check_layout(checkpoint)
    for name in (CONFIG_FILE, TENSORS_FILE, CORES_FILE):
        if sha256_of(path / name) != meta.sha256.get(name):
            raise CheckpointError(
                f"{path / name}: its SHA-256 differs from the one in {META_FILE}; it is damaged or was changed after "
                "training. Copy or save the checkpoint again."
            )
    return checkpoint


def _check_layout(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless every site has its matrix and all of its cores, in the right shapes."""
    if len(checkpoint.sites) != len(checkpoint.meta.sites):
        raise CheckpointError(f"{checkpoint.path / META_FILE}: sites: one is listed twice.")
    if not checkpoint.sites and checkpoint.meta.config.schedule != "dynamic":
        raise CheckpointError(f"{checkpoint.path / META_FILE}: sites: none, which only a dynamic schedule has.")
    with open_tensors(checkpoint.cores_path) as file:
        shapes = {key: file.shape(key) for key in file.keys}
    for site in checkpoint.meta.sites:
        key = site_key(site.name)
        if checkpoint.adapter.shapes.get(key) != (site.m, site.n):
            found = checkpoint.adapter.shapes.get(key, "nothing")
            raise CheckpointError(
                f"{checkpoint.adapter.tensors_path}: {key} is {found}, but {META_FILE} gives shape {(site.m, site.n)}."
            )
        try:
            expected = checkpoint.decomposition.core_shapes(site.m, site.n)
        except LoraOverError as error:
            raise CheckpointError(f"{checkpoint.path / META_FILE}: {site.name}: {error}") from error
        for k, shape in enumerate(expected):
            if shapes.get(site.core_key(k)) != shape:
                found = shapes.get(site.core_key(k), "missing")
                raise CheckpointError(f"{checkpoint.cores_path}: {site.core_key(k)} is {found}, expected {shape}.")


def restore(over: OverParameterization, checkpoint: Checkpoint) -> None:
    """Continue from a checkpoint: the same cores, in the same groups, with their optimizer state.

    Args:
        over: made with `inject=False` on a model that has loaded the checkpoint's adapter.
        checkpoint: of the one adapter that is trained.

    Raises:
        ConfigError: several adapters are trained.
        CheckpointError: other sites or another configuration than the checkpoint's, or a model whose
            matrices contradict the cores.
    Mutates: the model's matrices, which become the contraction of the cores.
    """
    _check_resumable(over, checkpoint)
    with open_tensors(checkpoint.cores_path) as file:
        by_step: dict[int, list[SiteRecord]] = {}
        for site in checkpoint.meta.sites:
            by_step.setdefault(site.step, []).append(site)
        for step, sites in by_step.items():
            for site in sites:
                cores = checkpoint.read_cores(file, site)
                parameter = over.sites[site.name].parameter
                matrix, magnitude = checkpoint.contract(cores, site)
                checkpoint.check_stored(full(parameter.detach()).cpu(), matrix, magnitude, site)
            over.inject([site.name for site in sites], step=step)
        for name, (group, i) in over.injected.items():
            site = checkpoint.sites[name]
            for k, (core, parameters) in enumerate(
                zip(checkpoint.read_cores(file, site), group.parameters, strict=True)
            ):
                prefix = site.core_key(k) + "."
                with torch.no_grad():
                    parameters[i].copy_(core[0])
                state: dict[str, Any] = {
                    key.removeprefix(prefix): value for key, value in site.state.items() if key.startswith(prefix)
                }
                for key in file.keys_below(prefix):
                    tensor = file.read(key)
                    state[key.removeprefix(prefix)] = tensor if tensor.ndim == 0 else tensor.to(parameters[i].device)
                over.load_core_state(parameters[i], state)
        if isinstance(over.schedule.score, GradientScore):
            over.schedule.score.load(
                {key.removeprefix(SCORE_PREFIX): file.read(key) for key in file.keys_below(SCORE_PREFIX)}
            )
    for group in over.groups:
        group.write()
    over.schedule.replay(checkpoint.meta.rounds)
    over.step, over.optimizer_class = checkpoint.meta.optimizer_steps, checkpoint.meta.optimizer


def _check_resumable(over: OverParameterization, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless the run and its model are those of the checkpoint."""
    only_adapter(over.sites.values())
    if over.config.model_dump(mode="json") != checkpoint.meta.config.model_dump(mode="json"):
        raise CheckpointError(
            f"{checkpoint.path}: was trained with {checkpoint.meta.config!r}, this run asks for {over.config!r}; "
            "resume with the same configuration or start anew."
        )
    if over.config.schedule == "dynamic" and checkpoint.meta.steps not in (None, over.steps):
        raise CheckpointError(
            f"{checkpoint.path}: its schedule was laid out for {checkpoint.meta.steps} steps, this run has "
            f"{over.steps}, so that its rounds would move. Resume with as many, or start anew."
        )
    if checkpoint.meta.base_model and over.base_model not in (None, checkpoint.meta.base_model):
        raise CheckpointError(
            f"{checkpoint.path}: was trained on {checkpoint.meta.base_model}, the model was loaded from "
            f"{over.base_model}; load that one, or set its `name_or_path` if it is a copy."
        )
    if checkpoint.meta.world_size != world_size():
        raise CheckpointError(
            f"{checkpoint.path}: was trained by {checkpoint.meta.world_size} process(es), this run has {world_size()}; "
            "the data would be divided differently. Resume with as many, or start anew."
        )
    missing = sorted(checkpoint.sites.keys() - over.sites.keys())
    if missing:
        raise CheckpointError(f"{checkpoint.path}: the model lacks {len(missing)} of its sites, first {missing[0]}.")
    for record in checkpoint.meta.sites:
        if over.sites[record.name].shape != (record.m, record.n):
            raise CheckpointError(
                f"{checkpoint.path}: {record.name} is {record.m} x {record.n}, in the model it is "
                f"{' x '.join(map(str, over.sites[record.name].shape))}; resume with the adapter's own LoraConfig."
            )
