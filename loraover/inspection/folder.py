"""Describe a folder of this project: a run, a checkpoint, an adapter or an export.

Folders are recognised by their files, never by their names. Files that later stages write are read as data: this module
knows their names and a few of their fields.
"""

from __future__ import annotations

import math
import shlex
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from loraover.checkpoint.adapter_config import AdapterConfig
from loraover.checkpoint.checkpoint import SEAL_FILE, open_checkpoint, read_checkpoint
from loraover.checkpoint.files import CONFIG_FILE, META_FILE, TENSORS_FILE, TRAINER_FOLDER
from loraover.checkpoint.metadata import Meta
from loraover.checkpoint.peft_adapter import read_adapter_dir, site_name
from loraover.checkpoint.tensor_file import open_tensors
from loraover.common.errors import CheckpointError
from loraover.common.paths import kind_of
from loraover.common.strict_json import read_json
from loraover.inspection.report import (
    AdapterFacts,
    CoreFacts,
    FolderReport,
    Kind,
    NextStep,
    OnnxFacts,
    RunFacts,
    VllmFacts,
)
from loraover.training.recipe import load_recipe
from loraover.training.run.failure import FAILURE_FILE, read_failure
from loraover.training.run.folder import PRODUCTS, RECIPE_FILE
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
    """Name what a folder is, by its files, or raise an error for a folder of no kind."""
    if kind_of(folder) != "folder":
        raise CheckpointError(f"{folder}: no such folder; expected a run, a checkpoint, an adapter or an export.")
    for kind, names in SIGNS.items():
        if any(kind_of(folder / name) == "file" for name in names):
            return kind
    known = ", ".join(f"{names[0]} ({kind})" for kind, names in SIGNS.items())
    raise CheckpointError(f"{folder}: holds no file that this command knows: {known}.")


def read_schedule(path: str | Path) -> Meta:
    """Read the schedule of a checkpoint, or of the checkpoint that a run trained."""
    folder = Path(path)
    if recognise(folder) == "run":
        folder = folder / "adapter"
    return open_checkpoint(folder).meta


def _adapter(folder: Path, kind: Kind) -> FolderReport:
    cores = None
    if kind == "checkpoint":
        meta = read_checkpoint(folder).meta
        config = meta.config
        cores = CoreFacts(
            decomposition=config.decomposition,
            sites=len(meta.sites),
            schedule=config.schedule if config.schedule == "all" else f"{config.schedule} by {config.score}",
            step=meta.step,
            steps=meta.steps,
            optimizer=meta.optimizer,
            versions=meta.versions,
            rounds=meta.rounds,
        )
    certificates = [name for name in (FOLD_FILE, VLLM_FILE, PREFLIGHT_FILE) if (folder / name).is_file()]
    verdicts = {name: read_json(folder / name, _Verdict).verdict for name in certificates}
    plain = read_json(folder / CONFIG_FILE, AdapterConfig)
    with open_tensors(folder / TENSORS_FILE) as file:
        shapes = {key: file.shape(key) for key in file.keys}
        dtypes = sorted({file.dtype(key) for key in file.keys})
    if plain.peft_type == "LORA" and plain.parameters:  # A and B of experts are stacked in the file
        shapes = dict(read_adapter_dir(folder).shapes)
    matrices = {name: shapes[key] for key in shapes if (name := site_name(key)) is not None}
    modules = {name.rpartition(".")[0] for name in matrices}
    adapter = AdapterFacts(
        kind=plain.peft_type,
        base_model=plain.base_model_name_or_path,
        task=plain.task_type,
        ranks=sorted({shape[0] for name, shape in matrices.items() if name.endswith("A") and len(shape) == 2}),
        lora_alpha=plain.lora_alpha,
        variants=[name for name, is_used in (("rsLoRA", plain.use_rslora), ("DoRA", plain.use_dora)) if is_used],
        targets=sorted({module.rpartition(".")[2] for module in modules}),
        modules=len(modules),
        parameters=sum(math.prod(shape) for shape in shapes.values()),
        dtypes=dtypes,
    )
    vllm = read_json(folder / PREFLIGHT_FILE, VllmFacts) if PREFLIGHT_FILE in certificates else None
    return FolderReport(path=str(folder), kind=kind, adapter=adapter, cores=cores, vllm=vllm, verdicts=verdicts)


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


def next_steps(report: FolderReport) -> list[NextStep]:
    """List the commands that take a folder further."""
    path, adapter = Path(report.path), report.adapter
    steps: list[NextStep] = []

    def step(what: str, *words: str) -> None:
        steps.append(NextStep(what=what, command=shlex.join(("loraover", *words))))

    def beside(ending: str) -> str:
        named = path if path.name not in ("", "..") else path.resolve()
        return str(named.with_name(f"{named.name}-{ending}"))

    if report.run is not None:
        recipe = str(path / RECIPE_FILE)
        if report.run.state == "finished":
            step("Show its measures", "compare", str(path))
            path /= "adapter"
        elif report.run.can_resume:
            step("Continue the run", "train", recipe, "-o", str(path), "--resume")
        elif report.run.method is not None:
            step("Start the run again", "train", recipe, "-o", beside("again"))
        if report.run.state != "finished":
            return steps
    if report.kind == "vLLM export":
        step("Serve it with vLLM", "serve", "up", str(path))
        step("Measure its cost", "serve", "parity", "--adapter", str(path), "--engine", "vllm")
        return steps
    if report.kind == "ONNX export" or adapter is None:
        return steps
    if report.cores is not None:
        fold = ("export", "fold", str(path), "-o", beside("folded"), "--check-error")
        step("Fold the cores into a plain adapter, and compare outputs", *fold)
    if adapter.kind != "LORA":
        convert = ("export", "convert", str(path), "-o", beside("lora"))
        step("Convert it into a plain LoRA, which engines read", *convert)
    elif "DoRA" not in adapter.variants:
        step("Write an adapter for vLLM", "export", "vllm", str(path), "-o", beside("vllm"))
        onnx = ("export", "onnx", str(path), "--mode", "merged", "-o", beside("onnx"))
        step("Write an ONNX graph with the adapter merged", *onnx)
    if adapter.task in ("FEATURE_EXTRACTION", "SEQ_CLS", "TOKEN_CLS") and adapter.kind == "LORA":
        step("Record its vectors, classes or scores, to check servers by", "record", str(path))
        return steps
    if report.kind == "folded adapter":
        step("Measure its cost", "serve", "parity", "--adapter", str(path))
    if adapter.base_model is not None:
        ask = ("eval", adapter.base_model, "--task", "gsm8k")
        step("Evaluate it", *ask, "--adapter", str(path), "--limit", "100")
    return steps
