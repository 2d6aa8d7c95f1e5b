"""Port of training methods: parts of a run, and the way from its result to a plain LoRA on the original base model."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import nn
from torch.optim import Optimizer

from loraover.common.errors import ConfigError
from loraover.common.strict_yaml import parse_yaml
from loraover.data.formats import Row
from loraover.overparam.sites import lora_layers
from loraover.training.recipe_parts import BaseRecipe
from loraover.training.run_result import Privacy

if TYPE_CHECKING:  # recipes are read without PEFT and transformers, which take seconds to import
    from peft import PeftModel
    from transformers import PreTrainedModel, Trainer, TrainingArguments

    from loraover.training.run.trainer import TrainingProgress

ADAPTER = "default"  # PEFT's name of the only adapter


class TrainingMethod:
    """A method of training, made for one run; this base class needs only the Trainer.

    A recipe is checked by `check_recipe`. A run calls `check_rows`, `lora_options`, `freeze`, `start`, `check`, `train`
    (or `restore`) and `finish`, in this order.

    Args:
        recipe: The recipe of the run.

    Attributes:
        trains_seq2seq: Whether the method trains encoder-decoders too.
        no_resume: Reason why a run keeps no checkpoints, as the end of a sentence; empty if it can be resumed.
        no_start: Reason why A and B cannot start from an adapter, as the end of a sentence; empty if they can.
        one_process: Reason why several processes cannot train it together, as the end of a sentence; empty if they can.
        keeps_row_gradients: Whether a step holds the gradients of each row of a micro-batch.
        learning_rate: Peak rate that the kept studies chose, see `loraover.training.launch.defaults`.
        needs_fp32: Whether the method computes in float32 only.
        settings: Settings that the recipe has under the method's name.
        privacy: Guarantee of the finished run; None for methods without one.
    """

    trains_seq2seq: ClassVar[bool] = True
    no_resume: ClassVar[str] = ""
    no_start: ClassVar[str] = ""
    one_process: ClassVar[str] = ""
    keeps_row_gradients: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 3e-3
    needs_fp32: ClassVar[bool] = False

    def __init__(self, recipe: BaseRecipe) -> None:
        self.recipe = recipe
        self.settings: Any = recipe.settings
        self.privacy: Privacy | None = None

    @classmethod
    def check_recipe(cls, recipe: BaseRecipe) -> None:
        """Check the other keys of a recipe of this method, when it is read; this base class does so for `METHODS`.

        Raises:
            ValueError: Keys that the method does not take.
        """
        if recipe.lora.use_dora or recipe.lora.init_lora_weights is not True:
            raise ValueError(
                f"method {recipe.method} chooses its first A and B itself: leave out lora.use_dora and "
                "lora.init_lora_weights"
            )
        if recipe.lora.start_from is not None and cls.no_start:
            raise ValueError(f"method {recipe.method} takes no lora.start_from: {cls.no_start}; leave it out")
        if recipe.lora.target_parameters:
            raise ValueError(f"method {recipe.method} adapts modules only: leave out lora.target_parameters")

    @classmethod
    def count_clients(cls, recipe: BaseRecipe) -> int:
        """Count the parts into which the rows are divided, each of which has its own optimizer."""
        return 1

    def lora_options(self, base: PreTrainedModel) -> dict[str, Any]:
        """Return options of PEFT's LoraConfig beside those of the recipe.

        Raises:
            ConfigError: The settings do not fit the model.
        """
        return {}

    def freeze(self, model: PeftModel) -> None:
        """Freeze those of A and B that stay as PEFT has initialised them.

        Raises:
            ConfigError: The method cannot train the model.
        """

    def start(self, model: PeftModel) -> None:
        """Prepare a model whose LoRA has just been made.

        Raises:
            ConfigError: The method cannot train the model.
        """

    def count_cores(self, model: PeftModel) -> int:
        """Count the numbers that are trained in place of A and B; 0 for a method that trains A or B themselves.

        Raises:
            ConfigError: The method cannot train the model.
        """
        return 0

    def check_rows(self, rows: Sequence[Row]) -> None:
        """Check the training rows, before the model is loaded.

        Args:
            rows: Prompts and completions.

        Raises:
            ConfigError: Rows that the method cannot take.
        """

    def check(self, steps: int, examples: int) -> None:
        """Check the settings against the size of the run, before its first step.

        Args:
            steps: Optimizer steps.
            examples: Number of training examples.

        Raises:
            ConfigError: A setting that does not fit.
        """

    def train(self, trainer: Trainer, checkpoint: Path | None, steps: int, progress: TrainingProgress) -> None:
        """Take all steps, or those that are left after a checkpoint."""
        if checkpoint is not None:
            self.restore(checkpoint)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    def begin(self) -> None:
        """Prepare the first step that the Trainer takes, after `restore` where a run is resumed."""

    def before_step(self, step: int, steps: int, optimizer: Optimizer) -> None:
        """Prepare an optimizer step of the Trainer.

        Args:
            step: Optimizer steps taken before.
            steps: Optimizer steps of the run.
            optimizer: The Trainer's optimizer.
        """

    def save(self, checkpoint: Path) -> None:
        """Add what the method needs to a checkpoint of the Trainer, before it is sealed."""

    def restore(self, checkpoint: Path) -> None:
        """Read what `save` has added."""

    def finish(self, model: PeftModel) -> float | None:
        """Turn what was trained into one plain LoRA on the original base weights.

        Returns:
            Frobenius norm, over all modules, of what the plain LoRA leaves out; None: nothing.
        """
        return None


def optimizer_options(text: str | None) -> dict[str, Any]:
    """Read `training.optim_args`, "name=value, ...", with values as in YAML."""
    given: dict[str, Any] = {}
    for part in filter(None, (text or "").replace(" ", "").split(",")):
        name, sign, value = part.partition("=")
        try:
            found = parse_yaml(value)
        except ValueError:
            found = sign = ""
        if not name or not sign or isinstance(found, list | dict) or name in given:
            raise ConfigError(f"training.optim_args: {part!r}: expected a new name=value, such as momentum=0.9.")
        try:
            given[name] = float(found) if isinstance(found, str) else found  # YAML's 1e-3 is text
        except ValueError:
            given[name] = found
    return given


def optimizer_class(asked: TrainingArguments, model: nn.Module | None = None) -> tuple[Any, dict[str, Any]]:
    """Return the class of transformers' optimizer, and its options with all of `optim_args`.

    Transformers reads the names that it knows, for some optimizers none, and drops the others. The class gets them.
    Some optimizers choose among the modules of a model.
    """
    from transformers import Trainer

    given = optimizer_options(asked.optim_args)

    def made(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        other = copy.copy(asked)
        other.optim_args = ",".join(f"{name}={value}" for name, value in values.items())
        kind, options = Trainer.get_optimizer_cls_and_kwargs(other, model)
        return kind, options

    try:
        kind, options = made(given)
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"training.optim_args: optim {asked.optim.value} refuses them: {error}") from error
    if asked.optim.endswith("layerwise"):  # which hooks the model whenever it is asked for
        return kind, options

    def is_read(name: str) -> bool:
        try:
            others = {key: value for key, value in given.items() if key != name}
            return any(made(values) != (kind, options) for values in (others, {**given, name: "?"}))
        except (ValueError, AttributeError):  # of a value that is read
            return True

    unread = {name: value for name, value in given.items() if not is_read(name)}
    if unread:
        known = sorted({*inspect.signature(kind).parameters} - {"params", "lr", "weight_decay", "kwargs"})
        if unknown := sorted(unread.keys() - known):
            raise ConfigError(
                f"training.optim_args: {unknown[0]!r} is none of {', '.join(known)}, the options of {kind.__name__}."
            )
    return kind, options | unread


def count_trained(model: Any, method: TrainingMethod) -> int:
    """Count the numbers that the optimizer steps: those of the method's cores, or else of the model's parameters."""
    return method.count_cores(model) or sum(p.numel() for p in model.parameters() if p.requires_grad)


class ServedSize(NamedTuple):
    """Size of an adapter as it is served: its largest rank, and the numbers and bytes of all its tensors."""

    rank: int
    numbers: int
    bytes: int


def served_size(model: nn.Module) -> ServedSize | None:
    """Measure a model's adapter: A, B and magnitudes, whether they were trained or not; None without an adapter."""
    layers = lora_layers(model).values()
    if not layers:
        return None
    parts = [
        part
        for layer in layers
        for name in {*layer.adapter_layer_names}  # PEFT names an embedding's magnitude twice
        for part in getattr(layer, name).parameters()
    ]
    return ServedSize(
        rank=max(layer.r[ADAPTER] for layer in layers),
        numbers=sum(part.numel() for part in parts),
        bytes=sum(part.numel() * part.element_size() for part in parts),
    )
