"""A and B that start from a trained adapter, or from a sum of several, in place of PEFT's draws.

Of each module, the adapter's update is delta_W = sum_i w_i s_i B_i A_i, with the weights w_i of the recipe. A and B of
rank r, whose scaling is s, start as the factors of its best approximation of that rank:

    delta_W / s = U S V^T,   B = U_r S_r^1/2,   A = S_r^1/2 V_r^T

What the rank leaves out is the root of the sum of squares of the other singular values (Eckart and Young 1936). Where
delta_W has a smaller rank than r, the other columns of B are zero, and the other rows of A stay as PEFT has drawn them:
if both were zero, neither would ever have a gradient. A module whose rank and scaling are already those of the recipe
keeps its A and B bit for bit.

The matrices are kept in the run's folder, from which each process, and a run that is resumed, reads them.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor

from loraover.adapters.combine.combine import combine_adapters
from loraover.adapters.combine.sources import check_plain, read_sources
from loraover.adapters.convert.kind import named_base, why_convert
from loraover.adapters.convert.plain import plain_lora
from loraover.adapters.convert.run import convert_adapter
from loraover.adapters.numerics.delta import read_delta
from loraover.adapters.numerics.low_rank import decompose, factor_noise, product_norm
from loraover.adapters.uniform.certificate import record_source
from loraover.callbacks.step_norm import Factors, factors
from loraover.checkpoint.base_model import move
from loraover.checkpoint.model_facts import read_facts
from loraover.checkpoint.peft_adapter import AdapterDir
from loraover.checkpoint.tensor_file import open_tensors, save_tensors
from loraover.common.arrays import as_tensor
from loraover.common.atomic_output import publish_file, publish_text
from loraover.common.errors import CheckpointError, ConfigError, ExportError, FoldError
from loraover.common.paths import without_secrets
from loraover.common.ranks import launched
from loraover.common.reporter import Reporter
from loraover.common.strict_json import read_json
from loraover.models.load import ModelSource
from loraover.overparam.sites import find_sites, write_matrices
from loraover.sources.address import HubName, read_address
from loraover.sources.fetch import fetch_adapter
from loraover.training.recipe import Recipe
from loraover.training.run_result import StartedFrom, StartSource

KEY = "lora.start_from"
START_FILE, START_TENSORS = "start.json", "start.safetensors"


def pin_start(recipe: Recipe, output: Path, report: Reporter) -> Recipe:
    """Fetch the adapters that a recipe starts from.

    Where the run has their matrices already, only the commits of branches and tags of the hub are asked for.
    """
    if recipe.lora.start_from is None:
        return recipe
    begun = (output / START_FILE).is_file()
    names = {
        name: name if begun and not _can_move(name) else fetch_adapter(name, report.line).address
        for name in recipe.lora.start_weights
    }
    same = {address: [name for name in names if names[name] == address] for address in names.values()}
    if twice := next((found for found in same.values() if len(found) > 1), None):
        raise ConfigError(f"{KEY}: {' and '.join(twice)} are one adapter; name it once, with the sum of their weights.")
    return recipe.model_copy(update={"lora": recipe.lora.with_start(names)})


def _can_move(name: str) -> bool:
    """Whether a name is a branch or tag of the hub, which may get another commit.

    A name without a revision is not one here: in a run that has begun, it means the commit that the run has kept.
    """
    found = read_address(name)
    if not isinstance(found, HubName) or found.revision is None:
        return False
    return re.fullmatch(r"[0-9a-f]{40}", found.revision) is None


def start_from_adapter(
    model: PeftModel, recipe: Recipe, base: ModelSource, output: Path, report: Reporter
) -> StartedFrom | None:
    """Set A and B of a model to those that its recipe starts from."""
    if recipe.lora.start_from is None:
        return None
    with launched().first_then_others():
        if not (output / START_FILE).is_file():
            _make(model, recipe, base, output, report)
    started = read_json(output / START_FILE, StartedFrom)
    sites = find_sites(model)
    with open_tensors(output / START_TENSORS) as file:
        for name in file.keys:
            write_matrices([sites[name]], file.read(name)[None])
    report.line(f"A and B start from {started}")
    if started.fresh_modules:
        report.line(f"{started.fresh_modules} other modules start as PEFT starts them, with B = 0")
    return started


class _Module(NamedTuple):
    """Start of one module.

    Args:
        a: A, (r, in_features).
        b: B, (out_features, r).
        norm: Frobenius norm of the adapter's update.
        left_out: Frobenius norm of what the rank leaves out of it.
    """

    a: Tensor
    b: Tensor
    norm: float
    left_out: float


def _make(model: PeftModel, recipe: Recipe, base: ModelSource, output: Path, report: Reporter) -> None:
    """Compute A and B, and write them and their origin into the run's folder."""
    weights = recipe.lora.start_weights
    shown = without_secrets(", ".join(weights))
    sites = find_sites(model)  # which refuses what is more than B A
    drawn = factors(model)
    unscaled = next((path for path, one in drawn.items() if not one.scaling), None)
    if unscaled is not None:
        raise ConfigError(f"{KEY}: the scaling of {unscaled} is 0, so its update stays 0; give it another lora_alpha.")
    fetched = [fetch_adapter(name, report.line) for name in weights]
    folders = [one.folder for one in fetched]
    try:
        with tempfile.TemporaryDirectory() as scratch:
            most = max(len(one.a) for one in drawn.values())
            plain, certificates = _as_plain(folders, list(weights.values()), base, most, Path(scratch), report)
            _check_fits(plain, drawn, shown, base)
            modules = _started(plain, certificates, drawn, report)
        records = [record_source(folder) for folder in folders]
    except (CheckpointError, ExportError, FoldError) as error:
        raise ConfigError(f"{KEY}: {error}") from error
    norm, left_out = (math.hypot(*(getattr(one, part) for one in modules.values())) for part in ("norm", "left_out"))
    if not norm:
        raise ConfigError(f"{KEY}: the update of {shown} is zero in every module; train it first.")
    pairs = zip(fetched, weights.values(), records, strict=True)
    origin = StartedFrom(
        sources=[
            StartSource(path=without_secrets(one.address), weight=w, sha256=record.sha256) for one, w, record in pairs
        ],
        relative_error=left_out / norm,
        modules=len(modules),
        fresh_modules=len(drawn) - len(modules),
    )
    tensors = {
        name: (modules[site.module].a if site.matrix == "A" else modules[site.module].b).float().contiguous()
        for name, site in sites.items()
        if site.module in modules
    }
    publish_file(output / START_TENSORS, lambda draft: save_tensors(tensors, draft))
    publish_text(output / START_FILE, origin.model_dump_json(indent=1) + "\n")


def _as_plain(
    folders: list[Path], weights: list[float], base: ModelSource, rank: int, scratch: Path, report: Reporter
) -> tuple[AdapterDir, dict[str, list[Any]]]:
    """Return adapters as one plain LoRA: as it is, or their sum, or converted with at most that rank.

    With it come the certificates of its modules whose factors were computed and rounded, by their paths.
    """
    folder, certificates = folders[0], []
    if weights != [1.0]:
        folder = scratch / "sum"
        with ExitStack() as stack:
            given = [plain_lora(one, model=base.name, dtype="fp32", report=report) for one in folders]
            plain = [stack.enter_context(one).path for one in given]
            certificates.append(_passed(combine_adapters(plain, folder, weights=weights, report=report)))
    named = named_base(folder).base_model_name_or_path
    reason = why_convert(folder, read_facts(base).shapes())
    if reason is None and not (adapter := _read(folder)).others:  # else perhaps copies of base weights
        move([] if named is None else [named], base, report.line)
    else:
        converted = scratch / "converted"
        done = convert_adapter(folder, converted, approximate_to_rank=rank, model=base.name, report=report)
        certificates.append(_passed(done.certificate))
        adapter = _read(converted)
    if named is not None and Path(named).resolve() != Path(base.name).resolve():
        report.line(f"warning: the adapter was trained on {named}, and this run trains on {base.name}")
    found: dict[str, list[Any]] = {}
    for module in (module for certificate in certificates for module in certificate.modules):
        found.setdefault(module.module, []).append(module)
    return adapter, found


def _passed(certificate: Any) -> Any:
    """Return a certificate of loraover_export, or raise FoldError if it failed, so that nothing was written."""
    if not certificate.passed:
        raise FoldError("float32 does not hold the update; a matrix failed its check. Train the adapter again.")
    return certificate


def _read(folder: Path) -> AdapterDir:
    """Read an adapter that holds only A and B, and copies of base weights."""
    sources = read_sources([folder])
    check_plain(sources)
    adapter: AdapterDir = sources.adapters[0]
    return adapter


def _check_fits(adapter: AdapterDir, drawn: Mapping[str, Factors], names: str, base: ModelSource) -> None:
    """Raise ConfigError if the recipe does not adapt a module of the adapter, or one of another shape."""
    others = [path for path in adapter.modules if path not in drawn]
    if others:
        more = f" and {len(others) - 1} other modules" if len(others) > 1 else ""
        raise ConfigError(
            f"{KEY}: {names} adapts {others[0]}{more}, but this recipe's lora does not: it adapts {len(drawn)} "
            f"modules, such as {next(iter(drawn))}. Add {others[0]} to lora.target_modules, or start from an adapter "
            "without it."
        )
    for path, module in adapter.modules.items():
        here = len(drawn[path].b), drawn[path].a.shape[1]
        if module.shape != here:
            raise ConfigError(
                f"{KEY}: {names} changes {path} by a matrix of shape {module.shape}, and {base.name} has {here} there, "
                f"so the adapter belongs to another base model, {adapter.config.base_model_name_or_path}. Set model to "
                f"that base model, or start from an adapter of {base.name}."
            )


def _started(
    plain: AdapterDir, certified: Mapping[str, list[Any]], drawn: Mapping[str, Factors], report: Reporter
) -> dict[str, _Module]:
    found: dict[str, _Module] = {}
    with plain.open() as exact, report.task("setting A and B", len(plain.modules)) as done:
        for path, module in plain.modules.items():
            delta, target, certificates = read_delta(exact, path), drawn[path], certified.get(path, [])
            if not certificates and (module.rank, module.scaling) == (len(target.a), target.scaling):
                a, b = (as_tensor(exact.stored(key)) for key in module.keys)
                norm = product_norm(delta.b.value.double(), delta.a.value.double())
                found[path] = _Module(a, b, norm, 0.0)
            else:
                found[path] = _fitted(delta, target, certificates)
            done(len(found))
    return found


def _fitted(delta: Any, target: Factors, certificates: list[Any]) -> _Module:
    """Return the best approximation of a delta by A and B of the rank and scaling of `target`, which PEFT has drawn.

    The certificates are those of the steps in which the delta was computed.
    """
    noise = factor_noise(delta.b, delta.a)
    noise += sum(one.arithmetic_bound + one.storage_error for one in certificates)
    size, rank = abs(target.scaling), len(target.a)
    svd = decompose(delta.b.value.double() / target.scaling, delta.a.value.double())
    exact = svd.numerical_rank(noise / size)
    kept = svd.truncate(min(exact, rank))
    left_out = size * svd.error(rank) if exact > rank else 0.0
    norm = certificates[-1].norm if certificates else size * svd.norm
    used = len(kept.a)
    a = torch.cat([kept.a, target.a[used:]])
    b = torch.cat([kept.b, kept.b.new_zeros(len(kept.b), rank - used)], dim=1)
    return _Module(a, b, norm, math.hypot(left_out, *(one.truncation_error for one in certificates)))
