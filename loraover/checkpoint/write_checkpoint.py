"""Writing of a LoRA-Over checkpoint while it is trained."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from loraover.checkpoint.checkpoint import SCORE_PREFIX
from loraover.checkpoint.files import CONFIG_FILE, CORES_FILE, META_FILE, TENSORS_FILE
from loraover.checkpoint.metadata import Meta, SiteRecord
from loraover.checkpoint.peft_adapter import AdapterDir, read_adapter_dir
from loraover.checkpoint.tensor_file import save_tensors, sha256_of
from loraover.common.atomic_output import publish_file, publish_text
from loraover.common.errors import CheckpointError
from loraover.common.version import __version__
from loraover.overparam.importance import GradientScore
from loraover.overparam.optimizers import PLAIN
from loraover.overparam.parameterization import OverParameterization
from loraover.overparam.sharding import world_size


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
        CheckpointError: The folder holds no adapter in safetensors; or no matrix of the adapter has cores, and no
            dynamic schedule can give it some later; or A and B are trained in several dtypes, or by an optimizer
            that keeps neither tensors nor numbers.
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
    tensors, records, dtypes = _recorded(over, adapter)
    if len(dtypes) > 1:
        raise CheckpointError(f"{directory}: the cores have several dtypes ({dtypes}); train A and B in one dtype.")
    if not dtypes and over.config.schedule != "dynamic":
        raise CheckpointError(f"{directory}: adapter {adapter!r} has no over-parameterised site to save.")
    if isinstance(over.schedule.score, GradientScore) and over.schedule.observed is not None:
        tensors |= {SCORE_PREFIX + key: value for key, value in over.schedule.score.state().items()}
    publish_file(stored.path / CORES_FILE, lambda draft: save_tensors(tensors, draft))
    meta = _meta(stored, over, step, records, dtypes)
    publish_text(stored.path / META_FILE, meta.sealed().model_dump_json(indent=1))


def _meta(
    stored: AdapterDir, over: OverParameterization, step: int, records: list[SiteRecord], dtypes: set[torch.dtype]
) -> Meta:
    """Describe the cores that were written beside a stored adapter."""
    return Meta(
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


def _recorded(over: OverParameterization, adapter: str) -> tuple[dict[str, Tensor], list[SiteRecord], set[torch.dtype]]:
    """Collect the tensors of the cores and their optimizer state, the records of sites, and the cores' dtypes."""
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
    return tensors, records, dtypes
