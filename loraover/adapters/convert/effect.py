"""Logits of a converted adapter against those of its source, both as PEFT loads them from their folders."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loraover.adapters.convert.request import ConvertRequest
from loraover.adapters.convert.source import Adapter, AdapterLayout
from loraover.adapters.numerics.tensor_rounding import STORAGE_DTYPES
from loraover.adapters.prompts import Prompts, logits_of, walked
from loraover.adapters.uniform.certificate import OutputsOfConversion
from loraover.adapters.verdict import Deviation, RunningDeviation, largest_of
from loraover.checkpoint.files import CONFIG_FILE
from loraover.checkpoint.peft_adapter import saved_labels
from loraover.common.errors import ConfigError
from loraover.models.device import COMPUTE_DTYPES, choose_compute
from loraover.models.load import ModelSource, load_model
from loraover.overparam.expert_part import without_base_layers
from loraover.reference import peft_config

MOVED = 0.25
"""Share of numbers that a twin moves by one or two units in the last place: 0.7 units in root mean square."""


def compare_outputs(
    request: ConvertRequest,
    adapter: Adapter[Any],
    prompts: Prompts,
    start_dtype: str | None,
    converted: Path,
    *,
    is_exact: bool,
) -> OutputsOfConversion:
    """Run the source and the converted adapter on the same prompts, and compare every logit.

    An exact conversion is compared with the noise of rounding as well: the distance of either from its twin. Each model
    has a base model in memory, since some kinds of adapters change the base weights when PEFT loads them; only the
    converted adapter and its twin share one. The base is loaded in `start_dtype`, where PEFT starts the source from the
    loaded weights.
    """
    place, _ = choose_compute(request.device, request.compute_dtype)
    source, base, compute_dtype = adapter.layout, adapter.base.source, request.compute_dtype
    times = "three times" if is_exact else "twice"
    request.report.line(f"loading the base model from {base.origin} {times}, to {place}, {compute_dtype}")
    labels = saved_labels({key: adapter.file.shape(key) for key in source.others})
    load = partial(_load, base, source, labels, start_dtype or compute_dtype, compute_dtype, str(place))
    (trained, _), (written, matrices) = load(source.path), load(converted)
    twins = Twins(load(source.path, is_twin=True)[0], matrices, STORAGE_DTYPES[request.dtype]) if is_exact else None
    error, effect = RunningDeviation(), RunningDeviation()
    with walked(prompts, written.get_base_model(), "the source and the LoRA", request.report) as steps:
        for ids, positions in steps:
            expected, found = (logits_of(model, ids, positions) for model in (trained, written))
            error.add(expected, found)
            if twins is not None:
                twins.add(expected, found, written, ids, positions)
            with written.disable_adapter():
                effect.add(expected, logits_of(written, ids, positions))
    return OutputsOfConversion(
        base=base.origin,
        device=str(place),
        compute_dtype=compute_dtype,
        tokens=prompts.tokens,
        prompt_source=prompts.source,
        error=error.result(),
        noise=None if twins is None else twins.noise(),
        adapter_effect=effect.result().max_logit,
    )


class Twins:
    """Noise of rounding: distances of the source and of the converted adapter from their twins, whose numbers moved.

    Args:
        source: Twin of the source, a model with an adapter.
        matrices: Matrices of the converted adapter, which its twin shares, and exchanges for moved ones while it runs.
        dtype: Data type that the converted adapter is stored in.
    """

    def __init__(self, source: nn.Module, matrices: list[nn.Parameter], dtype: torch.dtype) -> None:
        self._source, self._matrices, self._elsewhere = source, matrices, list(_moved(matrices, dtype))
        self._of_source, self._of_converted = RunningDeviation(), RunningDeviation()

    def add(self, expected: Tensor, found: Tensor, converted: nn.Module, ids: Tensor, positions: Tensor | None) -> None:
        """Compare logits of the source and of the converted adapter with their twins' on the same positions."""
        self._of_source.add(expected, logits_of(self._source, ids, positions))
        _exchange(self._matrices, self._elsewhere)
        self._of_converted.add(found, logits_of(converted, ids, positions))
        _exchange(self._matrices, self._elsewhere)

    def noise(self) -> Deviation:
        return largest_of([self._of_source.result(), self._of_converted.result()])


def _load(
    base: ModelSource,
    source: AdapterLayout[Any],
    num_labels: int | None,
    start_dtype: str,
    dtype: str,
    device: str,
    folder: Path,
    *,
    is_twin: bool = False,
) -> tuple[Any, list[nn.Parameter]]:
    """Load an adapter on a base model, and return the parameters that PEFT added; a twin has all of them moved.

    The base model is brought to `dtype` after PEFT has started the adapter from its weights in `start_dtype`. A twin's
    weights are moved before that where the types are the same, so that its start moves with them.
    """
    from peft import PeftModel

    task = source.config.task_type
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # transformers draws a head that the base model lacks: the same one each time
        model = load_model(base, dtype=start_dtype, task_type=task, num_labels=num_labels, device=device)
    lost = {without_base_layers(path) for path in source.modules} - dict(model.named_modules()).keys()
    if lost:
        raise ConfigError(
            f"{source.path / CONFIG_FILE}: task_type is {task!r}, for which the base model is loaded as a "
            f"{type(model).__name__}, which has no module {min(lost)}. Set task_type to the adapter's task, or leave "
            "out "
            f"{ConvertRequest.named('check_error')}."
        )
    weights = list(model.parameters())
    before = {id(parameter) for parameter in weights}
    if is_twin and start_dtype == dtype:
        _move(weights)
    adapted = PeftModel.from_pretrained(model, str(folder), config=peft_config(folder), torch_device=device).eval()
    if start_dtype != dtype:
        for weight in weights:
            weight.data = weight.data.to(getattr(torch, COMPUTE_DTYPES[dtype]))
        if is_twin:
            _move(weights)
    added = [parameter for parameter in adapted.parameters() if id(parameter) not in before]
    if is_twin:
        _move(added)
    return adapted, added


def _move(parameters: list[nn.Parameter]) -> None:
    """Replace parameters by moved ones; a unit is at least float32's, in which PEFT computes parts of some kinds."""
    for parameter, found in zip(parameters, _moved(parameters, torch.float32), strict=True):
        parameter.data = found


def _moved(parameters: list[nn.Parameter], dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield numbers of which some are moved by eps times themselves, one or two units in the last place.

    The eps is that of `dtype`, or of the numbers' own type if that is coarser.
    """
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters:
        found = parameter.detach().clone()
        if found.is_floating_point():
            eps = max(torch.finfo(dtype).eps, torch.finfo(found.dtype).eps)
            draw = torch.rand(found.shape, generator=generator)
            found.mul_(1 + eps * ((draw < MOVED / 2).to(found) - (draw > 1 - MOVED / 2).to(found)))
        yield found


def _exchange(parameters: list[nn.Parameter], others: list[Tensor]) -> None:
    for k, parameter in enumerate(parameters):
        parameter.data, others[k] = others[k], parameter.data
