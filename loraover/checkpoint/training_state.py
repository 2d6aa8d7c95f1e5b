"""The state of a training run in a LoRA-Over checkpoint: written while it is trained, and put back to continue."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraover.checkpoint.checkpoint import SCORE_PREFIX, Checkpoint
from loraover.checkpoint.error_bounds import orthogonality_error, unit_roundoff
from loraover.checkpoint.files import CONFIG_FILE, CORES_FILE, META_FILE, TENSORS_FILE
from loraover.checkpoint.metadata import Meta, SiteRecord
from loraover.checkpoint.peft_adapter import AdapterDir, read_adapter_dir, site_key
from loraover.checkpoint.tensor_file import TensorFile, open_tensors, save_tensors, sha256_of
from loraover.common.arrays import Array, as_array, as_tensor
from loraover.common.atomic_output import publish_file, publish_text
from loraover.common.errors import CheckpointError
from loraover.common.version import __version__
from loraover.overparam.block_bases import SIDES
from loraover.overparam.importance import GradientScore
from loraover.overparam.optimizers import PLAIN
from loraover.overparam.parameterization import OverParameterization
from loraover.overparam.sharding import full, world_size
from loraover.overparam.sites import only_adapter


def write_checkpoint(
    directory: str | os.PathLike[str], over: OverParameterization, *, step: int, adapter: str = "default"
) -> None:
    """Make a LoRA-Over checkpoint of an adapter that PEFT has just saved, by adding the cores to its folder.

    `loraover.json` is written last: a folder without it is an ordinary adapter, a folder with it is complete.

    Args:
        directory: Folder into which `model.save_pretrained` has saved the adapter as safetensors.
        over: The cores, on the model that was saved.
        step: Number of steps taken, which the checkpoint records.
        adapter: PEFT's name of the adapter that was saved.

    Raises:
        CheckpointError: No adapter in safetensors or no matrix with cores, several dtypes, or an unknown optimizer.
        ConfigError: A matrix was changed outside the optimizer step.
        OutputError: The files cannot be written.

    Example:
        ```python
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from loraover import LoraOverConfig, OverParameterization, write_checkpoint

        base = "HuggingFaceTB/SmolLM2-135M-Instruct"
        batch = AutoTokenizer.from_pretrained(base)("2 + 2 = 4", return_tensors="pt")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules="all-linear"))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        over = OverParameterization(model, LoraOverConfig())
        over.attach(optimizer)  # any ordinary optimizer that holds the LoRA matrices
        for _ in range(4):  # your loop
            model(**batch, labels=batch["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        over.finish()
        model.save_pretrained("checkpoint")  # an ordinary LoRA adapter
        write_checkpoint("checkpoint", over, step=4)  # the cores beside it, to fold or to resume
        ```
    """
    over.check_unchanged()
    stored = read_adapter_dir(Path(directory))
    tensors, records, dtypes = _recorded(over, adapter, directory)
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


def _recorded(
    over: OverParameterization, adapter: str, directory: str | os.PathLike[str]
) -> tuple[dict[str, Tensor], list[SiteRecord], set[torch.dtype]]:
    """Collect the tensors of the cores, their optimizer state and the scores, the records of sites, and the dtype."""
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
            first = [group.sites[group.first_site(k, i)].path for k in range(len(group.stacks))]
            shares = {k: name for k, name in enumerate(first) if len(group.stacks[k]) < len(group.sites)}
            record = SiteRecord(name=site.path, m=m, n=n, step=group.step, joined=group.is_joined, shares=shares)
            if (follower := over.followers.get(group)) is not None:
                tensors |= {record.gauge_key + key: value for key, value in follower.site_state(i).items()}
            for k in range(len(group.stacks)):
                key = record.core_key(k)
                tensors[key] = group.core(k, i).cpu()
                state = group.core_state(k, group.owner(k, i)) if k in group.trained else {}
                for name, value in state.items():
                    if isinstance(value, Tensor):
                        tensors[f"{key}.{name}"] = value.detach().cpu().clone()  # 8-bit optimizers share some
                    elif isinstance(value, PLAIN):
                        plain[f"{key}.{name}"] = value
                    else:
                        raise CheckpointError(
                            f"{key}: the optimizer's state {name!r} is a {type(value).__name__}, which a checkpoint "
                            "cannot hold; use an optimizer that keeps tensors and numbers, such as AdamW."
                        )
            records.append(record.model_copy(update={"state": plain}))
    if len(dtypes) > 1:
        raise CheckpointError(f"{directory}: the cores have several dtypes ({dtypes}); train A and B in one dtype.")
    if not dtypes and over.config.schedule != "dynamic":
        raise CheckpointError(f"{directory}: adapter {adapter!r} has no over-parameterised site to save.")
    if isinstance(over.schedule.score, GradientScore) and over.schedule.observed is not None:
        tensors |= {SCORE_PREFIX + key: value for key, value in over.schedule.score.state().items()}
    return tensors, records, dtypes


def restore(over: OverParameterization, checkpoint: Checkpoint) -> None:
    """Continue training from a checkpoint: put its cores, their optimizer state and its schedule into `over`.

    The model's matrices become the contraction of the cores, in the dtype that the model holds them in. PEFT loads a
    16-bit adapter as float32, or, to repeat the same steps, in its own dtype with `autocast_adapter_dtype=False`.

    Args:
        over: Over-parameterisation without cores (`inject=False`) of a model that holds the checkpoint's adapter.
        checkpoint: The checkpoint to continue from.

    Raises:
        ConfigError: Several adapters are trained.
        CheckpointError: The run or its model differs from the checkpoint's, or its matrices contradict the cores.

    Example:
        ```python
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        from loraover import OverParameterization, read_checkpoint, restore

        checkpoint = read_checkpoint("checkpoint")  # of `write_checkpoint`
        base = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
        model = PeftModel.from_pretrained(base, "checkpoint", is_trainable=True)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        over = OverParameterization(model, checkpoint.meta.config, inject=False)
        restore(over, checkpoint)
        over.attach(optimizer)
        ```
    """
    _check_resumable(over, checkpoint)
    dtypes = stored_dtypes(checkpoint, checkpoint.sites)
    with open_tensors(checkpoint.cores_path) as file:
        alike: dict[tuple[int, ...], list[SiteRecord]] = {}
        for site in checkpoint.meta.sites:  # all of a group have followed their bases for as many steps
            key = f"{site.gauge_key}counts"
            counts = file.read(key).flatten().tolist()[1:] if key in file.keys else []
            alike.setdefault((site.step, site.joined, *counts), []).append(site)
        for (step, *_), sites in alike.items():
            for site in sites:
                cores = checkpoint.read_cores(file, site)
                _check_orthogonal(checkpoint, cores, site)
                held = full(over.sites[site.name].values).cpu()
                coarser = max(held.dtype, dtypes[site.name], key=unit_roundoff)
                checkpoint.check_stored(as_array(held.to(coarser)), cores, site)
            over.inject_as({site.name: site.owner for site in sites}, step=step)
        for name in over.injected:
            _load_site(checkpoint, file, checkpoint.sites[name], over)
        if isinstance(over.schedule.score, GradientScore):
            kept = file.keys_below(SCORE_PREFIX)
            over.schedule.score.load({key.removeprefix(SCORE_PREFIX): file.read(key) for key in kept})
    for group in over.groups:
        if all(checkpoint.sites[site.name].joined for site in group.sites):
            group.join()
        else:
            group.split()
        group.write()
    over.schedule.replay(checkpoint.meta.rounds)
    over.step, over.optimizer_class = checkpoint.meta.optimizer_steps, checkpoint.meta.optimizer


def stored_dtypes(adapter: AdapterDir, names: Iterable[str]) -> dict[str, torch.dtype]:
    """Return the dtypes in which an adapter's file holds the matrices of these sites."""
    with adapter.open() as file:
        return {name: as_tensor(file.stored(site_key(name))).dtype for name in names}


def _check_orthogonal(checkpoint: Checkpoint, cores: Sequence[Array], record: SiteRecord) -> None:
    """Raise CheckpointError if bases that the optimizer does not step have lost their orthogonality."""
    bases = checkpoint.decomposition.of_site(record.name).bases
    if bases is None or bases.are_stepped:
        return
    sides = [bases.blocks(side, record.m, record.n) for side in SIDES]
    size = max([blocks.size for blocks in sides if blocks is not None], default=1)
    bound = orthogonality_error(size, getattr(torch, checkpoint.meta.core_dtype))
    found = bases.departure([as_tensor(core).double() for core in cores], record.m, record.n)
    if found > bound:
        raise CheckpointError(
            f"{checkpoint.cores_path}: the bases of {record.name} are not orthogonal: V^T V is {found:.3g} away from "
            f"the identity, rounding explains {bound:.3g}. The file was changed or the run had gone wrong; start anew "
            "from the adapter."
        )


def _load_site(checkpoint: Checkpoint, file: TensorFile, record: SiteRecord, over: OverParameterization) -> None:
    """Put the cores of a site, their optimizer state and the moments that its bases follow into its group."""
    group, i = over.injected[record.name]
    for k, core in enumerate(checkpoint.read_cores(file, record)):
        group.core(k, i).copy_(as_tensor(core[0]))
        prefix = record.core_key(k) + "."
        state: dict[str, Any] = {
            key.removeprefix(prefix): value for key, value in record.state.items() if key.startswith(prefix)
        }
        for key in file.keys_below(prefix):
            name = key.removeprefix(prefix)
            # As PyTorch's load_state_dict does; the device of `step` is known once an optimizer is attached.
            state[name] = file.read(key) if name == "step" else file.read(key).to(group.core(k, i).device)
        if state and k not in group.trained:
            raise CheckpointError(
                f"{checkpoint.path}: {record.core_key(k)} has optimizer state ({next(iter(state))}), but is not "
                "trained; the file is damaged or belongs to another checkpoint."
            )
        if state:
            group.load_core_state(k, group.owner(k, i), state)
    if (follower := over.followers.get(group)) is not None:
        prefix = record.gauge_key
        state, earlier = {}, follower.earlier_forms()
        for key, expected in follower.site_state(i).items():
            state[key] = file.read(prefix + key)
            found = tuple(state[key].shape), state[key].dtype
            if found not in ((tuple(expected.shape), expected.dtype), earlier.get(key)):
                raise CheckpointError(
                    f"{checkpoint.cores_path}: {prefix}{key} is {state[key].dtype} {tuple(state[key].shape)}, expected "
                    f"{expected.dtype} {tuple(expected.shape)}; the file is damaged or belongs to another checkpoint."
                )
        follower.load_site_state(i, state)


def _check_resumable(over: OverParameterization, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError if the run or its model differs from the checkpoint's."""
    only_adapter(over.sites.values())
    if over.config.model_dump(mode="json") != checkpoint.meta.config.model_dump(mode="json"):
        raise CheckpointError(
            f"{checkpoint.path}: was trained with {checkpoint.meta.config!r}, this run asks for {over.config!r}; "
            "resume with the same configuration or start anew."
        )
    if over.config.schedule == "dynamic" and checkpoint.meta.steps not in (None, over.steps):
        raise CheckpointError(
            f"{checkpoint.path}: its schedule was laid out for {checkpoint.meta.steps} steps, this run has "
            f"{over.steps}, so its rounds would move. Resume with the same number, or start anew."
        )
    if checkpoint.meta.base_model and over.base_model not in (None, checkpoint.meta.base_model):
        raise CheckpointError(
            f"{checkpoint.path}: was trained on {checkpoint.meta.base_model}, the model was loaded from "
            f"{over.base_model}; load that one, or set its `name_or_path` if it is a copy."
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
