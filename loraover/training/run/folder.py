"""The folder of a run: which files it has, who may begin one, and which one can be continued.

OUT/recipe.yaml       the recipe, with hub revisions pinned, and the folder of a stand-in for the hub's model
OUT/start.json        adapters that A and B start from, and OUT/start.safetensors the first A and B; only then
OUT/data.json         digests of the training and held-out rows
OUT/metrics.jsonl     one object per logging step and measure
OUT/trainer/          sealed checkpoints to resume from
OUT/trainer/lock      locked while a process trains the run
OUT/adapter/          the trained adapter; a LoRA-Over checkpoint if that was the method; OUT/model/ for `full`
OUT/held_out.json     [nats, tokens] of each held-out completion after training
OUT/run.json          measures before and after, sizes, origins, versions
OUT/failure.json      why there is no run.json, if the run failed
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError

from loraover.checkpoint.files import TRAINER_FOLDER
from loraover.common.atomic_output import check_free, publish_text
from loraover.common.errors import ConfigError, DataError, OutputError
from loraover.common.file_lock import hold_lock, is_locked
from loraover.common.request import as_written
from loraover.common.strict_json import StrictModel, read_json
from loraover.common.strict_yaml import parse_yaml
from loraover.data.formats import Row
from loraover.data.pictures import as_json
from loraover.sources.address import address_text
from loraover.training.recipe import Recipe
from loraover.training.recipe_parts import AUTO, LoraSettings, Training
from loraover.training.run.failure import has_no_work
from loraover.training.run_result import RUN_FILE

if TYPE_CHECKING:
    from loraover.training.rows.data import Examples

RUNS = Path("runs")
RECIPE_FILE, HELD_OUT_FILE = "recipe.yaml", "held_out.json"
DATA_FILE = "data.json"
LOCK_FILE = f"{TRAINER_FOLDER}/lock"
PRODUCTS = ("adapter", "model")
CHOSEN = ("bf16", "learning_rate", "warmup_steps", "max_length")
"""Fields of `training` that a run chooses where its recipe has no value, see `loraover.training.launch.defaults`."""


def product(recipe: Recipe, output: Path) -> Path:
    """Path of the folder, inside a run's folder, that holds what was trained."""
    return output / ("model" if recipe.method == "full" else "adapter")


def is_finished(output: Path) -> bool:
    """Whether a run has a result, which is written last; what was trained may have been moved away since."""
    return (output / RUN_FILE).exists()


def run_folder(recipe: str, *, resume: bool | Literal["auto"]) -> Path:
    """Return the folder of a run whose user named none; `resume` may be "auto": continue one if there is one."""
    if not resume or (resume == "auto" and not _unfinished(recipe)):
        return new_run_folder(recipe)
    return newest_unfinished(recipe)


def new_run_folder(recipe: str) -> Path:
    """Make the first free folder `runs/RECIPE-N`; two runs that begin at the same time get two folders."""
    for number in count(1):
        folder = RUNS / f"{Path(recipe).stem}-{number}"
        try:
            RUNS.mkdir(exist_ok=True)
            folder.mkdir()
        except FileExistsError as error:
            if not RUNS.is_dir():
                raise OutputError(f"cannot write {RUNS}: it is a file. Name another folder with -o.") from error
        except OSError as error:
            raise OutputError(f"cannot write {folder}: {error.strerror}. Name another folder with -o.") from error
        else:
            return folder
    raise AssertionError("the numbers have ended")


def newest_unfinished(recipe: str) -> Path:
    """Find the run of a recipe with the highest number that has begun, has not finished, and is not being trained."""
    begun = _unfinished(recipe)
    waiting = [pair for pair in begun if not is_locked(pair[1] / LOCK_FILE)]
    if not waiting:
        why = "; the one there is being trained by another process" if begun else "; name the run's folder with -o"
        raise ConfigError(
            f"{as_written('resume')}: {RUNS}/ holds no unfinished run of {Path(recipe).stem} to continue{why}."
        )
    return max(waiting)[1]


def _unfinished(recipe: str) -> list[tuple[int, Path]]:
    """Return number and folder of a recipe's runs that have begun and have not finished."""
    stem = f"{Path(recipe).stem}-"
    numbered = [
        (int(number), folder)
        for folder in (RUNS.iterdir() if RUNS.is_dir() else ())
        if folder.name.startswith(stem) and (number := folder.name.removeprefix(stem)).isdecimal()
    ]
    return [pair for pair in numbered if (pair[1] / RECIPE_FILE).is_file() and not is_finished(pair[1])]


def check_claim(output: Path, *, resume: bool) -> None:
    """Check that a folder is free for a new run, or with `resume` that it holds a run to continue."""
    if resume:
        _check_unfinished(output)
    elif not has_no_work(output):
        check_free(output.absolute())


@contextmanager
def claim(output: Path, *, resume: bool) -> Iterator[None]:
    """Make the folder of a new run, or check that there is a run to continue; hold its lock for a block.

    A folder that is empty, or holds nothing but a failure before the first step, counts as free.
    """
    check_claim(output, resume=resume)
    with ExitStack() as stack:
        try:
            (output / TRAINER_FOLDER).mkdir(parents=True, exist_ok=resume)
            stack.enter_context(hold_lock(output / LOCK_FILE, wait=False))
        except BlockingIOError as error:
            raise ConfigError(f"{output}: the run is being trained by another process.") from error
        except OSError as error:
            raise OutputError(f"cannot write {output}: {error.strerror}.") from error
        if resume:
            _check_unfinished(output)  # the process that held the lock may have finished the run meanwhile
        yield


def _check_unfinished(output: Path) -> None:
    if is_finished(output) and any((output / name).exists() for name in PRODUCTS):
        raise ConfigError(f"{output}: the run is finished already; it holds what was trained.")
    if not (output / RECIPE_FILE).is_file():
        raise ConfigError(f"{output}: holds no run to resume.")


def has_begun(output: Path) -> bool:
    """Whether a folder holds a run that can be continued; leftovers of a run that was killed earlier are removed."""
    if (output / RECIPE_FILE).is_file():
        return True
    left = sorted(output.rglob("*")) if output.is_dir() and not is_locked(output / LOCK_FILE) else []
    if left and {str(path.relative_to(output)) for path in left} <= {TRAINER_FOLDER, LOCK_FILE}:
        shutil.rmtree(output)
    return False


def with_commits(recipe: Recipe, output: Path) -> Recipe:
    """Fill a recipe's open values with those that the run in a folder has chosen.

    That is the hub's commits, if model or data are the same, the number of processes whose micro-batches make a step,
    and fields of `training` that have no value, or `auto`. Thus neither a new commit of the hub nor another machine
    keeps the run from being continued.
    """
    begun = _read_yaml(output / RECIPE_FILE)
    recipe = recipe.model_copy(update={"training": _with_chosen(recipe.training, begun.get("training"))})
    if recipe.distributed.processes is None:
        distributed = begun.get("distributed")
        processes = distributed.get("processes") if isinstance(distributed, dict) else None
        recipe = recipe.changed("distributed", processes=processes if isinstance(processes, int) else 1)
    if recipe.model_revision is None and begun.get("model") == recipe.model:
        recipe = recipe.model_copy(update={"model_revision": begun.get("model_revision")})
    if recipe.lora.start_from is not None:
        recipe = recipe.model_copy(update={"lora": _with_pins(recipe.lora, begun.get("lora"))})
    data, kept = recipe.data.model_dump(mode="json"), begun.get("data")
    if isinstance(kept, dict) and data["revision"] is None and all(kept.get(k) == data[k] for k in ("train", "test")):
        recipe = recipe.changed("data", revision=kept.get("revision"))
    return recipe


def _with_chosen(training: Training, kept: Any) -> Training:
    """Fill fields without a value, or with `auto`, with the values that a run has chosen."""
    names = [name for name in CHOSEN if getattr(training, name) is None]
    if training.per_device_train_batch_size == AUTO:
        names += ["per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing"]
    values = {name: kept[name] for name in names if name in kept} if isinstance(kept, dict) else {}
    try:
        return Training.model_validate(training.model_dump() | values)
    except ValidationError:  # it was begun with other settings, which `write_recipe` refuses
        return training


def _with_pins(lora: LoraSettings, kept: Any) -> LoraSettings:
    """Name the adapters that A and B start from as a run has kept them, with the commits of the hub."""
    try:
        names = list(LoraSettings.model_validate(kept).start_weights)
    except ValidationError:
        return lora
    asked = list(lora.start_weights)
    if len(asked) != len(names):
        return lora
    pairs = zip(map(address_text, asked), names, strict=True)
    pinned = (name if name.startswith(f"{text}@") else text for text, name in pairs)
    return lora.with_start(dict(zip(asked, pinned, strict=True)))


def write_recipe(output: Path, recipe: Recipe) -> None:
    """Keep a run's recipe in its folder."""
    import yaml

    values = recipe.model_dump(mode="json")
    path = output / RECIPE_FILE
    if path.is_file() and (previous := _read_yaml(path)) != values:
        changed = sorted(key for key in values if previous.get(key) != values[key])
        raise ConfigError(
            f"{path}: the run was started with another recipe ({', '.join(changed)} differ); start a new run."
        )
    publish_text(path, yaml.safe_dump(values, sort_keys=False))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = parse_yaml(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path}: not YAML, so the run cannot be resumed. Start a new run.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds no recipe, so the run cannot be resumed. Start a new run.")
    return values


class RowDigests(StrictModel):
    """Contents of `data.json`: SHA-256 of rows with prompt and completion, as they are read."""

    train: str = Field(description="SHA-256 of the training rows.")
    test: str | None = Field(description="SHA-256 of the held-out rows; None: there are none.")
    chat_template: str | None = Field(
        None, description="SHA-256 of the recipe's own chat template; None: it takes the model's."
    )


def digest_rows(rows: Sequence[Row]) -> str:
    """Return the SHA-256 of rows, one line of JSON each, in which the SHA-256 of an image stands for it."""
    total = hashlib.sha256()
    for row in rows:
        total.update(as_json(row).encode() + b"\n")
    return total.hexdigest()


def keep_digests(output: Path, examples: Examples, template: str | None) -> None:
    """Write the digests of a run's rows into its folder, or compare them where the run is resumed."""
    test = None if examples.test is None else digest_rows(examples.test.rows)
    own = None if template is None else hashlib.sha256(template.encode()).hexdigest()
    found = RowDigests(train=digest_rows(examples.train.rows), test=test, chat_template=own)
    begun = read_digests(output)
    if begun is None:
        publish_text(output / DATA_FILE, found.model_dump_json(indent=1) + "\n")
    elif begun.chat_template != found.chat_template:
        raise DataError(
            f"{output}: the run was begun with another text in the file that training.chat_template_path names; put "
            "the earlier text back, or start a new run."
        )
    elif begun != found:
        kind, rows = ("held-out", examples.test) if begun.train == found.train else ("training", examples.train)
        origin = "" if rows is None else f" ({rows.origin})"
        raise DataError(
            f"{output}: the run was begun with other {kind} rows than the data hold now{origin}; put the earlier data "
            "back, or start a new run."
        )


def read_digests(folder: Path) -> RowDigests | None:
    """Read the digests of a run's rows; None if they were not kept."""
    path = folder / DATA_FILE
    return read_json(path, RowDigests) if path.is_file() else None
