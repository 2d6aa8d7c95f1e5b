"""Describe a folder of this project: a run, a checkpoint, an adapter or an export.

Folders are recognised by their files, never by their names. Files that later stages write are read as data: this module
knows their names and a few of their fields.
"""

from __future__ import annotations

import math
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from loraover.checkpoint.adapter_config import AdapterConfig
from loraover.checkpoint.checkpoint import SEAL_FILE, open_checkpoint, read_checkpoint
from loraover.checkpoint.files import CONFIG_FILE, META_FILE, TENSORS_FILE
from loraover.checkpoint.metadata import Meta
from loraover.checkpoint.peft_adapter import read_adapter_dir, site_name
from loraover.checkpoint.tensor_file import open_tensors
from loraover.common.errors import CheckpointError
from loraover.common.paths import kind_of
from loraover.common.strict_json import read_json
from loraover.inspection.next_steps import next_steps
from loraover.inspection.report import AdapterFacts, CoreFacts, FolderReport, Kind, OnnxFacts, RunFacts, VllmFacts
from loraover.training.recipe import load_recipe
from loraover.training.run.failure import FAILURE_FILE, read_failure
from loraover.training.run.folder import PRODUCTS, RECIPE_FILE, TRAINER_FOLDER
from loraover.training.run.log import logged_losses, step_of
from loraover.training.run_result import RUN_FILE, read_run

FOLD_FILE, PREFLIGHT_FILE, VLLM_FILE = "fold_certificate.json", "preflight.json", "vllm_certificate.json"
ONNX_FILE, ONNX_GRAPHS = "onnx_report.json", ("model.onnx", "decoder.onnx")

SIGNS: dict[Kind, tuple[str, ...]] = {
    "checkpoint": (META_FILE,),
    "ONNX export": (ONNX_FILE, *ONNX_GRAPHS),
    "vLLM export": (PREFLIGHT_FILE, VLLM_FILE),
    "folded adapter": (FOLD_FILE,),
    "adapter": (CONFIG_FILE,),
    "run": (RUN_FILE, RECIPE_FILE, FAILURE_FILE),
}
"""Files by which each kind is recognised; the first kind with one of its files is taken."""


class _Verdict(BaseModel):
    model_config = ConfigDict(extra="ignore")

    verdict: str


def inspect_folder(path: str | Path) -> FolderReport:
    """Describe a folder: a run, a LoRA-Over checkpoint, a plain or folded adapter, an export for vLLM or to ONNX.

    Args:
        path: The folder.

    Raises:
        CheckpointError: No such folder, none of these kinds, or a file in it that cannot be read.
        ConfigError: The folder is a run, and its recipe cannot be read; or the path is too long, or the folder may not
            be entered.
    """
    folder = Path(path)
    kind = recognise(folder)
    if kind == "run":
        report = _run(folder)
    elif kind == "ONNX export":
        has_report = (folder / ONNX_FILE).is_file()
        report = FolderReport(
            path=str(folder), kind=kind, onnx=read_json(folder / ONNX_FILE, OnnxFacts) if has_report else None
        )
    else:
        report = _adapter(folder, kind)
    return report.model_copy(update={"next_steps": next_steps(report)})


def recognise(folder: Path) -> Kind:
    """Name what a folder is, by its files.

    Args:
        folder: The folder.

    Raises:
        CheckpointError: No such folder, or none of the kinds.
        ConfigError: The path is too long, or the folder may not be entered.
    """
    if kind_of(folder) != "folder":
        raise CheckpointError(f"{folder}: no such folder; expected a run, a checkpoint, an adapter or an export.")
    for kind, names in SIGNS.items():
        if any(kind_of(folder / name) == "file" for name in names):
            return kind
    known = ", ".join(f"{names[0]} ({kind})" for kind, names in SIGNS.items())
    raise CheckpointError(f"{folder}: holds no file that this command knows: {known}.")


def read_schedule(path: str | Path) -> Meta:
    """Read the schedule of a checkpoint, or of the checkpoint that a run trained.

    Args:
        path: The folder.

    Raises:
        CheckpointError: The folder has no cores, or cannot be read.
    """
    folder = Path(path)
    if recognise(folder) == "run":
        folder = folder / "adapter"
    return open_checkpoint(folder).meta


def _adapter(folder: Path, kind: Kind) -> FolderReport:
    cores = _core_facts(read_checkpoint(folder).meta) if kind == "checkpoint" else None
    verdicts = {
        name: read_json(folder / name, _Verdict).verdict
        for name in (FOLD_FILE, VLLM_FILE, PREFLIGHT_FILE)
        if (folder / name).is_file()
    }
    has_preflight = (folder / PREFLIGHT_FILE).is_file()
    return FolderReport(
        path=str(folder),
        kind=kind,
        adapter=_adapter_facts(folder),
        cores=cores,
        vllm=read_json(folder / PREFLIGHT_FILE, VllmFacts) if has_preflight else None,
        verdicts=verdicts,
    )


def _adapter_facts(folder: Path) -> AdapterFacts:
    config = read_json(folder / CONFIG_FILE, AdapterConfig)
    with open_tensors(folder / TENSORS_FILE) as file:
        stored = {key: file.shape(key) for key in file.keys}
        dtypes = sorted({file.dtype(key) for key in file.keys})
    has_experts = config.peft_type == "LORA" and config.parameters
    shapes = read_adapter_dir(folder).shapes if has_experts else stored
    matrices = {name: shapes[key] for key in shapes if (name := site_name(key)) is not None}
    modules = {name.rpartition(".")[0] for name in matrices}
    ranks = {shape[0] for name, shape in matrices.items() if name.endswith("A") and len(shape) == 2}
    variants = [name for name, is_used in (("rsLoRA", config.use_rslora), ("DoRA", config.use_dora)) if is_used]
    return AdapterFacts(
        kind=config.peft_type,
        base_model=config.base_model_name_or_path,
        ranks=sorted(ranks),
        lora_alpha=config.lora_alpha,
        variants=variants,
        targets=sorted({module.rpartition(".")[2] for module in modules}),
        modules=len(modules),
        parameters=sum(math.prod(shape) for shape in shapes.values()),
        dtypes=dtypes,
    )


def _core_facts(meta: Meta) -> CoreFacts:
    config = meta.config
    return CoreFacts(
        decomposition=config.decomposition,
        sites=len(meta.sites),
        schedule=config.schedule if config.schedule == "all" else f"{config.schedule} by {config.score}",
        step=meta.step,
        steps=meta.steps,
        optimizer=meta.optimizer,
        versions=meta.versions,
        rounds=meta.rounds,
    )


def _run(folder: Path) -> FolderReport:
    result = read_run(folder) if (folder / RUN_FILE).is_file() else None
    failure = read_failure(folder)
    recipe = load_recipe(folder / RECIPE_FILE) if (folder / RECIPE_FILE).is_file() else None
    trained = next((folder / name for name in PRODUCTS if (folder / name / CONFIG_FILE).is_file()), None)
    made = None if trained is None else _adapter(trained, recognise(trained))
    whole = [seal.parent for seal in (folder / TRAINER_FOLDER).glob(f"checkpoint-*/{SEAL_FILE}")]
    steps = [step_of(found) for found in whole if found.name.removeprefix("checkpoint-").isdecimal()]
    run = RunFacts(
        state="finished" if result is not None else "unfinished" if failure is None else "failed",
        method=None if recipe is None else recipe.method,
        can_resume=recipe is not None and recipe.can_resume,
        model=None if recipe is None else recipe.model,
        data=None if recipe is None else recipe.data.name,
        checkpoint_step=max(steps, default=None),
        last_loss=next(reversed(logged_losses(folder)), None),
        result=result,
        failure=failure,
    )
    return FolderReport(
        path=str(folder),
        kind="run",
        adapter=None if made is None else made.adapter,
        cores=None if made is None else made.cores,
        run=run,
    )
