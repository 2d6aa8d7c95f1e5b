"""Time and memory of a run, measured before it: a few steps of the same run on its model with fewer layers."""

from __future__ import annotations

import copy
import ctypes
import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import transformers
from safetensors import SafetensorError

from loraover.common.errors import LoraOverError
from loraover.common.reporter import Reporter
from loraover.data.sources import is_hub_name
from loraover.models.device import choose_device, free_memory
from loraover.models.load import ModelSource, is_encoder_decoder, load_config, load_tokenizer
from loraover.training.recipe import Recipe
from loraover.training.recipe_parts import Data
from loraover.training.run.train import train

FEW = 2
"""Layers of the smaller model, where not all layers can be tried; the slope gives the needs of further layers."""
STEPS = 4
MOST_SECONDS = 60
"""Seconds that the steps of one model may take, by the speed of a matrix product; beyond that, layers are left out."""
MOST_MEMORY = 0.25
"""Share of the free memory that the weights may take; beyond that, layers are left out."""

DEPTHS = ("num_hidden_layers", "num_decoder_layers", "decoder_layers")
"""Fields of configurations with the number of layers; an encoder and a decoder of one depth are cut alike."""

FAILS = (ValueError, TypeError, AttributeError, LookupError, RuntimeError, OSError, SafetensorError)
"""Errors of libraries, or of a full disk, after which a plan goes without a trial."""

Clock = Callable[[], float]


class RunNeeds(NamedTuple):
    """Needs of a run on this machine; the peak is PyTorch's on a CUDA device, else the process's."""

    step_seconds: float
    peak_bytes: float


class StepClock(Reporter):
    """Reporter that notes when each training step ends, by a clock in seconds."""

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        self._clock = clock
        self.ends: list[float] = []

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """Note the time at the end of each training step."""
        yield lambda done: self.ends.append(self._clock()) if label == "training steps" else None

    @property
    def step_seconds(self) -> float:
        """Median seconds of a step, without the first."""
        return median(later - earlier for earlier, later in zip(self.ends, self.ends[1:], strict=False))


def try_steps(
    recipe: Recipe, source: ModelSource, report: Reporter, clock: Clock = time.perf_counter
) -> RunNeeds | None:
    """Measure the needs of a run in a few steps with random weights, with as many layers as this machine can hold.

    If these are n of L layers, needs(L) = needs(n) + (L - n) (needs(n) - needs(2)) / (n - 2). All else is the recipe's:
    rows, trainer, method, batch and length. All matrices of LoRA-Over have cores, the most that its schedules can cost.
    Rows of full length stand for those on the hub, which are not downloaded, so that the needs are upper bounds.
    """
    config = load_config(source)
    depths = {getattr(config, name) for name in DEPTHS if hasattr(config, name)}
    if len(depths) != 1 or not isinstance(layers := depths.pop(), int):
        return None
    try:
        tried = _affordable_layers(recipe, config, layers)
        if tried <= min(FEW, layers - 1):
            report.line("time and peak memory are not predicted: this machine is too small or too slow for a trial")
            return None
        rows = ", and with rows of full length, since the data are on the hub" if _is_on_hub(recipe) else ""
        report.line(f"trying {STEPS} steps with random weights and {tried} of {layers} layers{rows}")
        # The smaller model comes first, since a process knows only its largest memory so far.
        *fewer, more = [_tried(recipe, source, config, n, clock) for n in (FEW, tried)[tried == layers :]]
    except (*FAILS, LoraOverError) as error:
        report.line(f"time and peak memory are not predicted: a trial failed: {error}")
        return None
    return extrapolated(fewer[0] if fewer else more, more, tried, layers)


def extrapolated(few: RunNeeds, more: RunNeeds, tried: int, layers: int) -> RunNeeds:
    """Return the needs of all layers, of which `FEW` and `tried` were tried."""
    left_out = (layers - tried) / max(1, tried - FEW)
    return RunNeeds(*(high + left_out * max(0.0, high - low) for low, high in zip(few, more, strict=True)))


def _affordable_layers(recipe: Recipe, config: Any, layers: int) -> int:
    """Count the layers whose weights fit, and whose steps end soon at the speed of a matrix product of their width."""
    device, training = choose_device(), recipe.training
    with torch.device("meta"):
        one, two = (sum(p.numel() for p in _cut(config, count).parameters()) for count in (1, 2))
    factor = torch.ones(config.hidden_size, config.hidden_size, device=device)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        (factor @ factor).sum().item()
        seconds.append(time.perf_counter() - started)
    work = 6 * STEPS * training.micro_batch * training.tokens  # operations for each number of the model
    most = MOST_SECONDS * 2 * config.hidden_size**3 / min(seconds) / work
    if (free := free_memory(device.type)) is not None:
        copies = 4 if recipe.method == "full" else 1  # of float32: weights, gradients and both moments of AdamW
        most = min(most, MOST_MEMORY * free / (4 * copies))
    return min(layers, 1 + int((most - one) // (two - one)))


def _cut(config: Any, layers: int) -> Any:
    """Make the model with its first layers only, and random weights."""
    cut = copy.deepcopy(config)
    for name in DEPTHS:
        if hasattr(cut, name):
            setattr(cut, name, layers)
    if getattr(cut, "layer_types", None):
        cut.layer_types = cut.layer_types[:layers]
    return getattr(transformers, config.architectures[0])._from_config(cut, dtype=config.dtype)


def _tried(recipe: Recipe, source: ModelSource, config: Any, layers: int, clock: Clock) -> RunNeeds:
    """Train a few steps of a model with few layers in a folder that is removed."""
    with tempfile.TemporaryDirectory() as scratch:
        base, timed = Path(scratch) / "base", StepClock(clock)
        with torch.random.fork_rng(devices=[]):
            _cut(config, layers).save_pretrained(base, max_shard_size="64MB")  # each is copied when it is written
        load_tokenizer(source).save_pretrained(base)
        gc.collect()
        with suppress(AttributeError, OSError, TypeError):  # another C library than glibc
            ctypes.CDLL(None).malloc_trim(0)  # which keeps the memory of the layers, and the trial's peak would have it
        short = _short(recipe, base)
        if _is_on_hub(recipe):
            file, text = Path(scratch) / "rows.jsonl", " a" * short.training.tokens
            row = {"prompt": text if is_encoder_decoder(source) else "Say:", "completion": text}
            file.write_text((json.dumps(row) + "\n") * (short.data.train_examples or 1))
            short = short.model_copy(update={"data": Data(train=str(file), chat=False)})
        result = train(short, Path(scratch) / "run", report=timed)
    return RunNeeds(timed.step_seconds * recipe.training.gradient_accumulation_steps, result.peak_bytes)


def _is_on_hub(recipe: Recipe) -> bool:
    return any(map(is_hub_name, recipe.data.sources))


def _short(recipe: Recipe, base: Path) -> Recipe:
    training = recipe.training
    rows = 2 * STEPS * training.micro_batch * recipe.clients
    changes: dict[str, dict[str, Any]] = {
        "training": {
            "max_steps": STEPS,
            "num_train_epochs": None,
            "report_to": "none",
            "gradient_accumulation_steps": 1,
        },
        "data": {"train_examples": min(rows, recipe.data.train_examples or rows), "test": None},
        "evaluation": {"examples": 0},
        "over": {"schedule": "all", "budget": None},
        "lora": {"init_lora_weights": True, "start_from": None},  # the base's weights are random anyway
    }
    parts = {name: getattr(recipe, name).model_copy(update=update) for name, update in changes.items()}
    pushes: dict[str, Any] = {"push_to_hub": None, "push_checkpoint": False, "push_model": None}
    return recipe.model_copy(update={**parts, **pushes, "model": str(base), "model_revision": None})
