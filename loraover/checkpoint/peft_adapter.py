"""A LoRA adapter on disk: `adapter_config.json` and `adapter_model.safetensors`, as PEFT writes them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TypeVar

from loraover.checkpoint.adapter_config import AdapterConfig, first_match
from loraover.checkpoint.exact_tensors import Exact, ExactArray, Factor
from loraover.checkpoint.expert_stacks import (
    PRESENT_LAYOUT,
    ExpertStack,
    ExpertWeight,
    StoredPart,
    expert_paths,
    find_stacks,
    is_flipped,
)
from loraover.checkpoint.files import CONFIG_FILE, TENSORS_FILE
from loraover.checkpoint.path_patterns import SlowPatternError
from loraover.checkpoint.target_modules import check_complete, check_named
from loraover.checkpoint.tensor_file import FLOATS, TensorFile, open_tensors
from loraover.common.arrays import Array, as_tensor
from loraover.common.errors import CheckpointError
from loraover.common.paths import kind_of
from loraover.common.request import as_written
from loraover.common.strict_json import read_json
from loraover.overparam.expert_part import SIDES, MatrixName, stack_experts, without_base_layers

KEY_PREFIX = "base_model.model."
BASE_WEIGHT = ".base_layer.weight"
"""Ending of the key of an adapted module's frozen weight, which PEFT saves beside an adapted embedding."""
_SITE_KEY = re.compile(r"(?P<module>.+)\.(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B)")

Adapter = TypeVar("Adapter", bound="AdapterDir")

STACKS = 4
"""Stacks of experts that stay in memory, so that they are not read again for every expert."""


@dataclass(frozen=True)
class AdaptedModule:
    """A module of the base model to which an adapter adds delta_W = scaling * B @ A.

    Args:
        path: Path of the module; that of an expert ends in its number and the parameter.
        is_embedding: Whether it is adapted as an embedding, so that A has one column for each token.
        shape: Shape of B @ A: (out_features, in_features), or (dimension, tokens) of an embedding.
        rank: Rank r.
        scaling: Factor of B @ A.
    """

    path: str
    is_embedding: bool
    shape: tuple[int, int]
    rank: int
    scaling: float

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Shape of the module's weight: (out_features, in_features), or (tokens, dimension) of an embedding."""
        return (self.shape[1], self.shape[0]) if self.is_embedding else self.shape

    def site(self, matrix: MatrixName) -> str:
        """Return the name of A or B as a site."""
        return f"{self.path}.lora_{'embedding_' * self.is_embedding}{matrix}"

    @property
    def keys(self) -> tuple[str, str]:
        """The keys of A and B in the adapter's file."""
        return site_key(self.site("A")), site_key(self.site("B"))


@dataclass(frozen=True)
class AdapterDir:
    """A LoRA adapter whose configuration and tensor names have been checked; a `Checkpoint` if it has cores.

    Args:
        path: Folder of the adapter.
        config: Contents of `adapter_config.json`.
        shapes: Shape of every tensor, by key. The A or B of one expert counts as a tensor, and its stack does not.
        stacks: Stacked pairs of experts, whose matrices are read from their stacks.
        trained_as: Folder of the adapter of another kind that this one was converted from, which PEFT runs in its
            place; None if this one was trained.
    """

    path: Path
    config: AdapterConfig
    shapes: Mapping[str, tuple[int, ...]]
    stacks: tuple[ExpertStack, ...] = ()
    trained_as: Path | None = None

    @cached_property
    def modules(self) -> dict[str, AdaptedModule]:
        """The adapted modules by their paths, in the order of the file."""
        found = {}
        for name, key in _sites(self.shapes).items():
            path, _, kind = name.rpartition(".")
            if kind.endswith("A"):
                (r, n), (m, _) = self.shapes[key], self.shapes[site_key(f"{name[:-1]}B")]
                scaling, is_embedding = self.config.scaling(path), kind.startswith("lora_embedding")
                found[path] = AdaptedModule(path, is_embedding, (m, n), r, scaling)
        return found

    @cached_property
    def matrices(self) -> dict[str, tuple[AdaptedModule, MatrixName]]:
        """Module of each A and B, and which of the two it is, by keys in the order of the file."""
        found = {site_key(module.site(side)): (module, side) for module in self.modules.values() for side in SIDES}
        return {key: found[key] for key in self.shapes if key in found}

    @cached_property
    def others(self) -> dict[str, str]:
        """Parameters that the adapter replaces (`modules_to_save`, biases): their names, by keys in the file."""
        keys = [key for key in self.shapes if key not in self.matrices]
        return {key: self._parameter(key.removeprefix(KEY_PREFIX)) for key in keys}

    @cached_property
    def ignored(self) -> list[str]:
        """Keys of other tensors that PEFT ignores: without its prefix, or of an adapted module's unwrapped name."""
        return [key for key, name in self.others.items() if KEY_PREFIX + self._wrapped(name) != key]

    @cached_property
    def _wrappers(self) -> Counter[str]:
        """Number of PEFT's wrappers around each adapted module."""
        return Counter([*self.modules, *(stack.module for stack in self.stacks)])

    def _parameter(self, name: str) -> str:
        """Return the base model's name of a parameter, which PEFT keeps in `base_layer` of an adapted module."""
        path, _, attribute = name.rpartition(".")
        owner = without_base_layers(path)
        return f"{owner}.{attribute}" if owner in self._wrappers else name

    def _wrapped(self, name: str) -> str:
        """Return PEFT's name of the base model's parameter: the reverse of `_parameter`."""
        path, _, attribute = name.rpartition(".")
        return f"{path}{'.base_layer' * self._wrappers[path]}.{attribute}" if path in self._wrappers else name

    @property
    def rank(self) -> int:
        """Largest rank of a module."""
        return max(module.rank for module in self.modules.values())

    @property
    def is_run_by_peft(self) -> bool:
        """Whether PEFT alone runs the adapter as trained: it reads no cores, and swaps A and B of flipped stacks."""
        return not any(stack.is_flipped for stack in self.stacks)

    @contextmanager
    def open(self) -> Iterator[ExactAdapter]:
        """Open the files, to read tensors."""
        with open_tensors(self.tensors_path) as plain:
            yield ExactAdapter(self, plain)

    @cached_property
    def parts(self) -> dict[str, StoredPart]:
        """Places of the experts' matrices in the file, by their keys."""
        return _parts(self.stacks)

    @property
    def experts(self) -> set[str]:
        """Adapted experts, such as "model.layers.0.mlp.experts.3.down_proj"."""
        return expert_paths(self.stacks)

    @property
    def tensors_path(self) -> Path:
        """File that holds the tensors."""
        return self.path / TENSORS_FILE

    def check_complete(self, modules: Iterable[str], model_type: str, experts: Collection[str] = ()) -> None:
        """Raise CheckpointError if the file lacks what the configuration names; see `target_modules.check_complete`."""
        check_complete(self.path / CONFIG_FILE, self.modules.keys(), modules, experts, model_type)

    def check_keeps_base(self) -> None:
        """Raise CheckpointError unless A and B fit the unchanged base weights."""
        if not self.config.keeps_base:
            start = (self.config.model_extra or {})["init_lora_weights"]
            raise CheckpointError(
                f"{self.path / CONFIG_FILE}: init_lora_weights is {start!r}, which changes the base weights, so A and "
                "B only fit the changed base model. `loraover export convert` makes an exact plain LoRA of a PiSSA or "
                "OLoRA; for other starts, save the adapter again with PEFT's "
                "save_pretrained(path_initial_model_for_weight_conversion=...)."
            )


class ExactAdapter:
    """The open files of an adapter, from which tensors are read one at a time.

    Args:
        adapter: Layout of the adapter.
        plain: The adapter's open file.
    """

    def __init__(self, adapter: AdapterDir, plain: TensorFile):
        self.adapter = adapter
        self.plain = plain
        self._stack = lru_cache(maxsize=STACKS)(plain.array)

    def stored(self, key: str) -> Array:
        """Return a tensor by its key as the file holds it; the A or B of one expert is taken from its stack."""
        part = self.adapter.parts.get(key)
        if part is None:
            return self.plain.array(key)
        return part.of(self._stack(part.key)).copy(order="C")

    def array(self, key: str) -> ExactArray:
        """Return a tensor by its key in the adapter's file; a stored value keeps its type.

        Raises:
            CheckpointError: The tensor holds NaN or infinity, or contradicts its cores.
        """
        return ExactArray(self.stored(key), None, None)

    def tensor(self, key: str) -> Exact:
        """Return what `array` returns as PyTorch's tensors, with floating-point numbers in float64."""
        return self.array(key).widened().tensors()

    def factor(self, name: str) -> Factor:
        """Return a matrix by its site's name, without contracting its cores."""
        matrix = as_tensor(self.stored(site_key(name)))
        m, n = matrix.shape
        return Factor(None, (matrix,), m, n)


def pack_stacks(stacks: Sequence[ExpertStack], tensors: Mapping[str, Array]) -> dict[str, Array]:
    """Return tensors in which the matrices of all experts have become stacks, in the layout since PEFT 0.19."""
    found = dict(tensors)
    for stack in stacks:
        sites = list(replace(stack, is_flipped=False).sites())
        for matrix in SIDES:
            names = [(site, stored) for site, stored, part in sites if part.matrix == matrix]
            parts = [found.pop(site_key(site)) for site, _ in names]
            found[site_key(names[0][1])] = stack_experts(matrix, parts)
    return found


def _parts(stacks: Sequence[ExpertStack]) -> dict[str, StoredPart]:
    return {
        site_key(site): StoredPart(site_key(stored), part, stack.is_flipped)
        for stack in stacks
        for site, stored, part in stack.sites()
    }


def site_key(name: str) -> str:
    """Return a site's tensor key in a PEFT adapter file, which ends in `.weight` except for embeddings."""
    return f"{KEY_PREFIX}{name}" + ("" if "lora_embedding_" in name.rpartition(".")[2] else ".weight")


def site_name(key: str) -> str | None:
    """Return the site that a tensor key in a PEFT adapter file belongs to; None for any other tensor."""
    name = key.removeprefix(KEY_PREFIX).removesuffix(".weight")
    return name if _SITE_KEY.fullmatch(name) and site_key(name) == key else None


def _sites(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Return the keys of all A and B in a file, by the names of the sites."""
    return {name: key for key in shapes if (name := site_name(key)) is not None}


def saved_labels(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Return the number of rows of a classification head that an adapter replaces; None if it replaces none."""
    heads = [key for key in shapes if key.endswith((".classifier.weight", ".score.weight", ".out_proj.weight"))]
    return next((shapes[key][0] for key in heads if "lora" not in key), None)


def read_adapter_dir(path: Path) -> AdapterDir:
    """Read the configuration and the tensor layout of an adapter.

    Raises:
        CheckpointError: The folder holds no adapter, or one that is not a LoRA of plain products B A; it has no LoRA
            matrices, or some of modules that the configuration does not name; or the shapes of A and B contradict each
            other or the configuration.
        ConfigError: The path is too long, or a folder on it may not be entered.
    """
    if kind_of(path) != "folder":
        raise CheckpointError(f"{path}: no such folder; expected a PEFT adapter directory.")
    config = read_json(path / CONFIG_FILE, AdapterConfig)
    if config.peft_type != "LORA":
        raise CheckpointError(
            f"{path / CONFIG_FILE}: peft_type is {config.peft_type!r}, expected 'LORA'. "
            "`loraover export convert` makes plain LoRAs of adapters of other kinds."
        )
    if config.use_dora:
        raise CheckpointError(
            f"{path / CONFIG_FILE}: use_dora is true. DoRA rescales the columns of W + B A, so it is not a plain "
            "low-rank product: it cannot be folded, and vLLM refuses it; train without use_dora, or approximate it by "
            "a plain LoRA with `loraover export convert` and --approximate-to-rank."
        )
    with open_tensors(path / TENSORS_FILE) as file:
        shapes = {key: file.shape(key) for key in file.keys}
        dtypes = {key: file.dtype(key) for key in file.keys}
    check_named(path / CONFIG_FILE, list(dict.fromkeys(name.rpartition(".")[0] for name in _sites(shapes))))
    for key in shapes:
        if site_name(key) is not None and dtypes[key] not in FLOATS:
            raise CheckpointError(
                f"{path / TENSORS_FILE}: {key} is {dtypes[key]}, expected one of {', '.join(FLOATS)}."
            )
    pairs = {
        name.removesuffix(".lora_A"): (a[0], b[1])
        for key, a in shapes.items()
        if (name := site_name(key)) is not None and name.endswith(".lora_A")
        if len(a) == len(b := shapes.get(site_key(f"{name[:-1]}B"), ())) == 2  # others are refused with all sites
    }
    try:
        stacks = find_stacks(config.parameters, pairs, config.rank, path / TENSORS_FILE)
        adapter = _expanded(AdapterDir(path, config, shapes), stacks)
        _check_pairs(adapter)
    except SlowPatternError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return adapter


def read_on_base(adapter: Adapter, weights: Mapping[str, ExpertWeight]) -> Adapter:
    """Return an adapter whose experts' A take the inputs of the base model, whichever way the file holds them.

    Args:
        adapter: The adapter, as `read_adapter_dir` returns it.
        weights: Parameters of the base model's experts, by path.

    Raises:
        CheckpointError: The base model has no such parameter, or one of another shape; or the file fits as it is and
            transposed, and does not record which PEFT trained it.
    """
    stacks = []
    for stack in adapter.stacks:
        if stack.path not in weights:
            raise CheckpointError(
                f"{adapter.tensors_path}: the base model has no parameter {stack.path} of experts; name the model that "
                f"the adapter was trained on with {as_written('model')}."
            )
        a, b = (adapter.shapes[site_key(f"{stack.expert(0)}.lora_{matrix}")] for matrix in "AB")
        version = adapter.config.peft_version
        flipped = is_flipped(stack, weights[stack.path], (b[0], a[1]), version, adapter.tensors_path)
        stacks.append(replace(stack, is_flipped=flipped != stack.is_flipped))
    if tuple(stacks) == adapter.stacks:
        return adapter
    config = adapter.config.model_copy(update={"peft_version": PRESENT_LAYOUT})  # the layout that `pack_stacks` writes
    with open_tensors(adapter.tensors_path) as file:
        shapes = {key: file.shape(key) for key in file.keys}
    return _expanded(replace(adapter, shapes=shapes, config=config), stacks)


def _expanded(adapter: Adapter, stacks: Sequence[ExpertStack]) -> Adapter:
    """Take apart the stacks of an adapter whose `shapes` are still those of the file.

    Patterns name a parameter of all experts, so each expert gets an exact entry in front of them.
    """
    parts = _parts(stacks)
    if (twice := min(parts.keys() & adapter.shapes.keys(), default=None)) is not None:
        raise CheckpointError(
            f"{adapter.tensors_path}: {twice} and {parts[twice].key} both adapt one expert, expected one of them; "
            "remove the other."
        )
    shapes = {key: part.shape(adapter.shapes[part.key]) for key, part in parts.items()}
    stored = {part.key for part in parts.values()}
    shapes = {key: shape for key, shape in adapter.shapes.items() if key not in stored} | shapes
    config = adapter.config
    every = {rf"{re.escape(stack.module)}\.\d+\.{stack.parameter}": stack.path for stack in stacks}
    if config.rank_pattern:
        ranks = {key: config.rank(path) for key, path in every.items()}
        config = config.model_copy(update={"rank_pattern": ranks | config.rank_pattern})
    if config.alpha_pattern:
        alphas = {k: first_match(config.alpha_pattern, path, config.lora_alpha) for k, path in every.items()}
        config = config.model_copy(update={"alpha_pattern": alphas | config.alpha_pattern})
    return replace(adapter, config=config, shapes=shapes, stacks=tuple(stacks))


def _check_pairs(adapter: AdapterDir) -> None:
    where, sites = adapter.tensors_path, _sites(adapter.shapes)
    if not sites:
        raise CheckpointError(f"{where}: no lora_A or lora_B tensors; this adapter has no LoRA layers.")
    for name, key in sites.items():
        match = _SITE_KEY.fullmatch(name)
        assert match is not None
        module, kind = match["module"], match["kind"]
        if len(adapter.shapes[key]) != 2 or 0 in adapter.shapes[key]:
            raise CheckpointError(f"{where}: {key} has shape {adapter.shapes[key]}, expected a matrix.")
        embedding = kind.replace("lora_", "lora_embedding_")
        if f"{module}.{embedding}" in sites:
            raise CheckpointError(f"{where}: {module} is listed twice, with {kind} and with {embedding}; remove one.")
        is_a = kind.endswith("A")
        twin = sites.get(f"{module}.{kind[:-1]}{'B' if is_a else 'A'}")
        if twin is None:
            raise CheckpointError(f"{where}: {key} has no {'B' if is_a else 'A'} beside it.")
        rank = adapter.shapes[key][0 if is_a else 1]
        if rank != adapter.config.rank(module):
            raise CheckpointError(
                f"{where}: {key} has rank {rank}, but {CONFIG_FILE} gives {module} rank {adapter.config.rank(module)}."
            )
