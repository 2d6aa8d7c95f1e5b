"""Logprobs of sampled tokens by the model that is trained, in the number format of the engine that sampled them.

A change that is smaller than a step of bfloat16 vanishes, so logprobs of a young adapter can be compared only if both
sides round in the same way. Here each module rounds its weights and inputs while it runs, so that no second copy of the
model is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.func import functional_call

from loraover.common.errors import ConfigError
from loraover.overparam.sites import Site, find_sites, lora_layers, only_adapter
from loraover_serve.judge.names import ATTENTION

Adapter = dict[str, Tensor]
"""A and B of all modules by the names of the model's parameters, in the main memory."""


@dataclass(frozen=True)
class Row:
    """An answer that the engine has sampled.

    Args:
        ids: Token ids of the prompt and of the answer, without padding.
        places: Places in `ids` of the tokens that the engine has sampled, rising and above 0.
        engine: The engine's logprob of each of these, in nats.
        own: The trainer's logprobs, if it has computed them.
        version: Number of the adapter that should have sampled the row; None means the present one.
        is_base: Whether to run it without an adapter, beside rows that have one.
    """

    ids: tuple[int, ...]
    places: tuple[int, ...]
    engine: tuple[float, ...]
    own: tuple[float, ...] | None = None
    version: int | None = None
    is_base: bool = False

    @property
    def prompt(self) -> str:
        """Digest of the tokens that come before the first sampled one."""
        return blake2b(repr(self.ids[: self.places[0]]).encode(), digest_size=8).hexdigest()

    def scored(self) -> Row:
        """The row without the tokens for which the engine has told no logprob."""
        kept = [index for index, value in enumerate(self.engine) if value == value]
        return replace(
            self,
            places=tuple(self.places[index] for index in kept),
            engine=tuple(self.engine[index] for index in kept),
            own=None if self.own is None else tuple(self.own[index] for index in kept),
        )


@dataclass(frozen=True)
class EngineNumbers:
    """Form in which an engine holds the policy.

    Args:
        dtype: Number format of its weights and outputs.
        merged: Whether the adapter is added to the weights before they are rounded, rather than applied beside them.
    """

    dtype: torch.dtype
    merged: bool


class Policy:
    """The model that is trained, in the form in which an engine holds it, or holds it by mistake.

    Args:
        model: The PEFT model. Its A and B are trained, and nothing else.
        engine: Form in which the engine holds it.
        temperature: Number by which logits are divided.
        batch_size: Number of rows that are run at once.
        attention: Implementation of attention to run with; None takes the trainer's.

    Raises:
        ConfigError: A model without a LoRA, one that trains more than A and B, or one that is sharded over processes.
    """

    def __init__(
        self,
        model: nn.Module,
        engine: EngineNumbers,
        temperature: float,
        batch_size: int,
        attention: str | None = None,
    ) -> None:
        if not isinstance(model, PeftModel):
            raise ConfigError(
                f"VerifyRollouts judges how strongly a LoRA is applied, and {type(model).__name__} has none: full "
                "fine-tuning has no adapter that can be disabled; train with peft_config, or leave VerifyRollouts out."
            )
        self.model, self.engine, self.temperature, self.batch_size = model, engine, temperature, batch_size
        self.attention = attention
        self.sites = [*find_sites(model).values()]
        only_adapter(self.sites)
        if any(site.is_cut for site in self.sites):
            raise ConfigError(
                "VerifyRollouts: A and B are sharded over processes (FSDP or ZeRO), where it cannot run them; use DDP."
            )
        trained = {parameter for site in self.sites for parameter in site.holders()}
        self.names = {name: one for name, one in model.named_parameters() if one in trained}
        if other := [name for name, one in model.named_parameters() if one.requires_grad and one not in trained]:
            raise ConfigError(f"VerifyRollouts: {other[0]} is trained beside A and B; leave out modules_to_save.")
        self.layers = lora_layers(model)
        self.coarse = [
            module
            for module in model.modules()
            if any(
                one is not None and one.is_floating_point() and one.dtype != engine.dtype
                for one in module._parameters.values()
            )
        ]
        for path, layer in self.layers.items() if engine.merged else ():
            weight = getattr(layer.get_base_layer(), "weight", None)
            if weight is None or not weight.is_floating_point() or any(layer.use_dora.values()):
                raise ConfigError(f"VerifyRollouts cannot repeat how {path} is merged: it is quantised, or has DoRA.")
        self.mixes = not engine.merged and all(
            isinstance(layer, Linear) and not any(layer.use_dora.values()) for layer in self.layers.values()
        )
        """Whether rows that are `is_base` can run beside others; false once a module has seen tokens without rows."""

    @property
    def adapter_name(self) -> str:
        """PEFT's name of the adapter that is trained."""
        return self.sites[0].adapter

    @property
    def scaling(self) -> float:
        """Factor of B @ A."""
        return float(next(layer.scaling[self.adapter_name] for layer in self.layers.values()))

    @property
    def has_dropout(self) -> bool:
        """Whether the trainer's own logprobs are of a model with random zeros in it."""
        config: Any = self.model.get_base_model().config
        dropped = [module.p for module in self.model.modules() if isinstance(module, nn.Dropout)]
        return any(dropped) or bool(getattr(config, "attention_dropout", 0))

    @property
    def is_zero(self) -> bool:
        """Whether the adapter changes nothing yet, since B is zero."""
        return not any(bool(site.tensor.detach().any()) for site in self.sites if site.matrix == "B")

    def copy(self) -> Adapter:
        """Copy A and B into the main memory."""
        return {name: one.detach().to("cpu", copy=True) for name, one in self.names.items()}

    def changes(self, factors: Mapping[str, float]) -> dict[str, Callable[[Adapter], Adapter]]:
        """Adapters as mistakes change them: B times each factor but 1, or zero in a part of the modules."""
        every_b = [site for site in self.sites if site.matrix == "B"]
        found = {name: partial(self._times, factor, every_b) for name, factor in factors.items() if factor != 1}
        numbers = [int(site.layer.split()[-1].replace("-", "0")) for site in every_b]
        middle = (max(numbers) + 1) // 2
        is_attention, is_upper = [site.kind in ATTENTION for site in every_b], [one >= middle for one in numbers]
        for missing, name, other in (
            (is_attention, "all but attention layers", "attention layers only"),
            (is_upper, "the upper half of the layers missing", "the lower half of the layers missing"),
        ):
            if len({*missing}) == 2:
                sides = list(zip(every_b, missing, strict=True))
                found[name] = partial(self._times, 0.0, [site for site, is_in in sides if is_in])
                found[other] = partial(self._times, 0.0, [site for site, is_in in sides if not is_in])
        return {**found}

    def _times(self, factor: float, sites: Sequence[Site], adapter: Adapter) -> Adapter:
        """An adapter of which some matrices are multiplied."""
        changed = {name: one.clone() for name, one in adapter.items()}
        places = {one: name for name, one in self.names.items()}
        for site in sites:
            site.of(changed[places[site.parameter]]).mul_(factor)
        return changed

    @torch.no_grad()
    def logprobs(
        self,
        rows: Sequence[Row],
        adapter: Adapter | None = None,
        *,
        base: bool = False,
        temperature: float | None = None,
    ) -> list[float]:
        """Logprobs in nats of the sampled tokens of all rows, one after the other.

        Args:
            rows: The rows.
            adapter: A and B to run with; None takes the present ones.
            base: Whether to run without an adapter.
            temperature: Number by which logits are divided; None takes the trainer's.
        """
        was_training = self.model.training
        trained = {one: one.requires_grad for one in self.model.parameters()}
        self.model.eval()
        try:
            with self._as_in_engine(base):
                found = [
                    value
                    for start in range(0, len(rows), self.batch_size)
                    for value in self._scores(rows[start : start + self.batch_size], adapter or {}, temperature)
                ]
        finally:
            self.model.train(was_training)
            for one, requires_grad in trained.items():  # PEFT's disable_adapter trains every A and B when it ends
                one.requires_grad_(requires_grad)
        return found

    def _scores(self, rows: Sequence[Row], adapter: Adapter, temperature: float | None) -> Iterator[float]:
        """Logprobs of a batch of rows, whose ends are aligned."""
        device = self.sites[0].parameter.device
        length, keep = max(len(row.ids) for row in rows), max(len(row.ids) - row.places[0] for row in rows)
        ids = torch.zeros(len(rows), length, dtype=torch.long, device=device)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            ids[index, length - len(row.ids) :] = torch.tensor(row.ids, device=device)
            mask[index, length - len(row.ids) :] = 1
        given = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
            "use_cache": False,
            "logits_to_keep": torch.arange(length - keep - 1, length, device=device),  # a number would slice a view
        }
        held = {name: tensor.to(device) for name, tensor in adapter.items()}
        with self._zeroed(torch.tensor([not row.is_base for row in rows], device=device)):
            logits = functional_call(self.model, held, (), given).logits[:, -keep - 1 : -1]
        scores = (logits.float() / (temperature or self.temperature)).log_softmax(-1)
        told = scores.gather(-1, ids[:, -keep:, None])[..., 0]
        for row, mine in zip(rows, told.cpu(), strict=True):
            yield from mine[torch.tensor(row.places) - len(row.ids) + keep].tolist()

    @contextmanager
    def _zeroed(self, has_adapter: Tensor) -> Iterator[None]:
        """Multiply what B gives by 0 in some rows, while the block runs the model."""

        def hook(_module: nn.Module, _args: object, output: Tensor) -> Tensor | None:
            if output.ndim < 3 or len(output) != len(has_adapter):  # an expert's tokens, of all rows
                self.mixes = False
                return None
            return output * has_adapter[:, None, None]

        layers = [] if bool(has_adapter.all()) else [*self.layers.values()]
        hooks = [layer.lora_B[self.adapter_name].register_forward_hook(hook) for layer in layers]
        try:
            yield
        finally:
            for one in hooks:
                one.remove()

    @contextmanager
    def _as_in_engine(self, base: bool) -> Iterator[None]:
        """Round weights and inputs of each module as the engine does, while the block runs the model."""
        merges = self.engine.merged and not base
        hooks = []
        if merges:
            layers = {layer.get_base_layer(): layer for layer in self.layers.values()}
            hooks += [hook for one, layer in layers.items() for hook in self._swapped(one, layer)]
        else:
            layers = {}
        hooks += [hook for one in self.coarse if one not in layers for hook in self._swapped(one, None)]
        base_model: Any = self.model.get_base_model()
        attention = base_model.config._attn_implementation
        try:
            base_model.set_attn_implementation(self.attention or attention)
            with self.model.disable_adapter() if base or merges else nullcontext():
                yield
        finally:
            base_model.set_attn_implementation(attention)
            for hook in hooks:
                hook.remove()

    def _swapped(self, module: nn.Module, layer: Any) -> list[Any]:
        """Hooks that round a module's parameters while it runs, after adding the adapter's delta."""
        dtype, held = self.engine.dtype, list[Mapping[str, Any]]()
        if type(module) is nn.Embedding and layer is None:  # its answer is rounded in place of its whole table
            return [module.register_forward_hook(lambda _module, _args, output: output.to(dtype))]

        def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            held.append(module._parameters)
            mine = dict(module._parameters)
            if layer is not None:
                weight = mine["weight"]
                delta = layer.get_delta_weight(self.adapter_name)
                mine["weight"] = weight + delta.to(weight.dtype)  # type: ignore[union-attr]
            module.__dict__["_parameters"] = {
                name: one.to(dtype) if one is not None and one.is_floating_point() else one
                for name, one in mine.items()
            }
            return tuple(one.to(dtype) if isinstance(one, Tensor) and one.is_floating_point() else one for one in args)

        def after(*_: Any) -> None:
            module.__dict__["_parameters"] = held.pop()

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]
