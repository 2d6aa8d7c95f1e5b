"""Batches on which a model is run in the middle of training, without an effect on the training."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from loraover.common.errors import ConfigError
from loraover.overparam.sharding import reshard

Loss = Callable[[Any, Any], Tensor]
"""Function of a model and a batch that returns the mean loss, a scalar with a graph."""


def model_loss(model: Any, batch: Any) -> Tensor:
    """Return the loss that a Hugging Face model computes from a batch with labels.

    Args:
        model: Model whose output has a `loss`.
        batch: Keyword arguments of the model's forward.

    Raises:
        ConfigError: The model computes no loss from this batch.
    """
    check_collated(batch)
    loss: Tensor | None = model(**batch).loss
    if loss is None:
        raise ConfigError(
            f"the model computes no loss from a batch of {', '.join(batch)}; give a function of the model and a batch "
            "as `loss`, for a trainer's callback `callback.loss = trainer_loss(trainer)`."
        )
    return loss


def check_collated(batch: Any) -> None:
    """Refuse a batch that is not a dictionary of a model's arguments; an online trainer has rows of prompts instead."""
    if not isinstance(batch, Mapping):
        raise ConfigError(
            f"no loss can be computed from a batch that is a {type(batch).__name__} and not a dict; give a function of "
            "the model and a batch as `loss`. A trainer that makes its samples while it trains, such as GRPO and RLOO, "
            "cannot calibrate: use schedule dynamic with a score other than loss_impact, or schedule all, and with "
            "eigen the options {short: gradient, long: gradient}."
        )


@dataclass(frozen=True)
class Probe:
    """Fixed batches on which a schedule runs the model to compute scores.

    Every process must have the same batches.

    Args:
        model: PEFT model that is trained, or a wrapper of it.
        batches: Collated batches, on the model's device.
        loss: Function of the model and a batch that returns the mean loss; by default the model's own, from a batch
            with labels.

    Example:
        ```python
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from loraover import Budget, LoraOverConfig, OverParameterization, Probe

        base = "HuggingFaceTB/SmolLM2-135M-Instruct"
        batch = AutoTokenizer.from_pretrained(base)(["2 + 2 = 4", "3 + 4 = 7"], return_tensors="pt")
        batch["labels"] = batch["input_ids"]
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules="all-linear"))
        config = LoraOverConfig(schedule="static", budget=Budget(fraction=0.25))
        over = OverParameterization(model, config, probe=Probe(model, [batch]))
        ```
    """

    model: nn.Module
    batches: Sequence[Any]
    loss: Loss = model_loss


@contextmanager
def calibrating(probe: Probe, seed: int) -> Iterator[None]:
    """Hold a model in training mode with checkpointed activations; restore it and the random state after the block."""
    with undisturbed(probe, seed), in_mode(probe.model, training=True):
        yield


@contextmanager
def undisturbed(probe: Probe | None, seed: int) -> Iterator[None]:
    """Run a block with the model in eval mode and seeded random numbers; restore both afterwards."""
    if probe is None:
        yield
        return
    with seeded(seed, {p.device for p in probe.model.parameters()}), in_mode(probe.model, training=False):
        try:
            yield
        finally:
            reshard(probe.model)


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Run a block in training or eval mode, but batch norms in eval mode, which leaves their statistics as they are."""
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    for module in modes:
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.eval()
    try:
        yield
    finally:
        for module, before in modes.items():
            module.training = before


@contextmanager
def seeded(seed: int, devices: Iterable[torch.device]) -> Iterator[None]:
    """Seed all random generators for a block, and restore their states (Python's, NumPy's, PyTorch's) after it.

    The CPU's generator is always included.
    """
    used = set(devices)
    gpus = sorted({device.index or 0 for device in used if device.type == "cuda"})
    apple = torch.mps.get_rng_state() if any(device.type == "mps" for device in used) else None
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=gpus):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        for index in gpus:
            torch.cuda.default_generators[index].manual_seed(seed)
        if apple is not None:
            torch.mps.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            if apple is not None:
                torch.mps.set_rng_state(apple)
