"""LoRA itself, with the variants whose base weights change: PiSSA, OLoRA and DoRA.

Plain LoRA, rsLoRA and patterns: delta_W = s B A, of rank r. Of experts that share one parameter, each has its pair.

PiSSA and OLoRA start from A_0 and B_0 that are made from the base weight W, and train on W - s B_0 A_0, so that
delta_W = s B A - s B_0 A_0 on the original base model, of rank 2 r. PEFT makes A_0 and B_0 again, in float32, whenever
it loads such an adapter, and so does this file. PiSSA: the first r singular triplets of W; OLoRA: the first r columns
of Q and rows of R in W = Q R. Both products depend on W only.

DoRA: W' = m (W + s B A) / ||W + s B A||, with the norm of each row; delta_W = W' - W, of full rank. PEFT can combine it
with PiSSA and OLoRA, which is refused here.

Sources: Hu et al. 2021, arXiv:2106.09685; Meng et al. 2024, arXiv:2404.02948; Büyükakyüz 2024, arXiv:2406.01775; Liu et
al. 2024, arXiv:2402.09353.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, final

from loraover.adapters.convert.methods.base import ConversionMethod, Dense, LowRank, Place
from loraover.adapters.convert.methods.single_precision import (
    MERGE_THERE,
    QR_ROUNDINGS,
    basis_error,
    determined,
    singular_part,
)
from loraover.adapters.convert.methods.tokens import token_places
from loraover.adapters.convert.source import Adapter, MethodConfig, Module
from loraover.adapters.numerics.delta import read_delta
from loraover.adapters.numerics.low_rank import product_norm
from loraover.checkpoint.adapter_config import KEPT_BASE, REPEATED_STARTS, AdapterConfig
from loraover.checkpoint.error_bounds import U32
from loraover.checkpoint.expert_stacks import ExpertStack, find_expert_weights
from loraover.checkpoint.files import CONFIG_FILE
from loraover.checkpoint.peft_adapter import AdapterDir, ExactAdapter, read_adapter_dir, read_on_base
from loraover.checkpoint.target_modules import LOST
from loraover.common.errors import CheckpointError
from loraover.common.later import torch

if TYPE_CHECKING:
    from torch import Tensor


TOKENS = "token_adapter.trainable_tokens_delta"


def stacks_of(adapter: Adapter[Any]) -> Sequence[ExpertStack]:
    """Return the stacked pairs of an adapter of any kind."""
    found = _read_stacks(adapter)
    return () if found is None else found.stacks


def _read_stacks(adapter: Adapter[Any]) -> AdapterDir | None:
    config = adapter.config
    if not isinstance(config, AdapterConfig) or not config.parameters:
        return None
    return read_on_base(read_adapter_dir(adapter.layout.path), find_expert_weights(adapter.base.model))


class LoraFields(MethodConfig, AdapterConfig):
    """Fields of LoraConfig that change the delta."""

    init_lora_weights: bool | str | None = True
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None

    @property
    def subtracted_initialisation(self) -> str | None:
        """Initialisation whose A and B PEFT subtracts from the base weight; None if the base weight stays as it is."""
        start = self.init_lora_weights
        return start if isinstance(start, str) and start.lower() not in KEPT_BASE else None


@final
class Lora(ConversionMethod[LoraFields]):
    """LoRA, rsLoRA, PiSSA, OLoRA and DoRA."""

    config = LoraFields
    tensors = (
        *("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B"),
        *("lora_magnitude_vector", "lora_magnitude_vector.weight", TOKENS),
    )
    embeddings = True
    inert = frozenset({"target_parameters"})
    rank = "r; PiSSA and OLoRA 2 r; DoRA full"

    def reads_weights(self, config: LoraFields) -> bool:
        return config.use_dora or config.subtracted_initialisation is not None or bool(config.trainable_token_indices)

    def is_exact(self, config: LoraFields) -> bool:
        return not config.use_dora and config.subtracted_initialisation in (None, *REPEATED_STARTS)

    def named(self, adapter: Adapter[LoraFields]) -> list[str]:
        return [path for path, tensors in adapter.layout.modules.items() if tensors != {TOKENS}]

    def places(self, adapter: Adapter[LoraFields]) -> Iterator[Place]:
        _check_tokens(adapter)
        stacked = _read_stacks(adapter)
        if stacked is not None and stacked.stacks:
            stacked.check_keeps_base()
            exact = ExactAdapter(stacked, adapter.file)

            def expert_delta(path: str) -> LowRank:
                delta = read_delta(exact, path)
                return LowRank(delta.b.value.double(), delta.a.value.double())

            for stack in stacked.stacks:
                for path in map(stack.expert, range(stack.experts)):
                    yield Place(path, False, partial(expert_delta, path))
        wrappers = set() if stacked is None else {stack.wrapper for stack in stacked.stacks}
        for path, tensors in adapter.layout.modules.items():
            if path in wrappers:
                continue
            if TOKENS not in tensors:
                yield from self.place(adapter, path)
                continue
            module = adapter.module(path)
            if tensors != {TOKENS}:
                raise module.refuse("it has both a LoRA and single trained tokens; train with one of them.")
            tokens = module.config.trainable_token_indices  # a list belongs to the input embedding, whatever its path
            if isinstance(tokens, dict):
                tokens = next((own for name, own in tokens.items() if f".{module.path}".endswith(f".{name}")), None)
            if tokens is None:
                raise module.refuse(
                    "trainable_token_indices does not name its trained tokens; the configuration is incomplete."
                )
            yield from token_places(module, TOKENS, tokens)

    def trained_tokens(self, config: LoraFields) -> set[int]:
        found = config.trainable_token_indices or []
        return {token for tokens in found.values() for token in tokens} if isinstance(found, dict) else {*found}

    def delta(self, module: Module[LoraFields]) -> LowRank | Dense:
        m, n = module.shape
        s = module.config.scaling(module.path)
        kind, ending = ("lora_embedding_", "") if module.has("lora_embedding_A") else ("lora_", ".weight")
        m, n = (n, m) if module.has("lora_embedding_A") else (m, n)
        start, r = module.config.subtracted_initialisation, module.config.rank(module.path)
        if start == "olora" and module.is_conv1d:
            raise module.refuse(
                "OLoRA of a Conv1D is not converted: PEFT factors its weight as it is stored, (in, out), and takes the "
                f"product out of it as if it were (out, in). {MERGE_THERE}"
            )
        a = module.tensor(f"{kind}A{ending}", r, n)
        b = module.tensor(f"{kind}B{ending}", m, r) * s
        if module.config.use_dora and start is not None:
            raise module.refuse(
                f"it has both use_dora and init_lora_weights {start!r}, so its DoRA scales the base weight "
                f"minus the first B A. This is not converted. {MERGE_THERE}"
            )
        if module.config.use_dora:
            if module.is_embedding:
                raise module.refuse("DoRA of an embedding is not converted; train it without use_dora.")
            name = "lora_magnitude_vector" + ("" if module.has("lora_magnitude_vector") else ".weight")
            weight = module.weight()
            adapted = weight + b @ a
            magnitude = module.tensor(name, len(weight))
            return Dense(adapted * (magnitude / adapted.norm(dim=1))[:, None] - weight, float(weight.norm()))
        if start is None:
            return LowRank(b, a)
        if kind != "lora_":
            raise module.refuse(f"init_lora_weights is {start!r}, which embeddings do not have.")
        first = _start(module, start, r, s)
        found = LowRank(torch.cat([b, -first.b], dim=1), torch.cat([a, first.a]), first.rounded + first.apart)
        return determined(module, found, first.apart, product_norm(first.b, first.a), first.reason)


def _check_tokens(adapter: Adapter[LoraFields]) -> None:
    """Refuse a file without the trained tokens that its configuration names, which PEFT does not load either."""
    found, layout = adapter.config.trainable_token_indices or [], adapter.layout
    held = {path for path, tensors in layout.modules.items() if TOKENS in tensors}
    held |= {layout.stored.get(path, path) for path in held}
    if not held.isdisjoint(adapter.base.tied):  # the file holds the tokens of tied modules once
        held |= {*adapter.base.tied}
    any_path = [""] * bool(found)  # of a list, which is for the input embedding, whatever its path
    endings = [name for name, tokens in found.items() if tokens] if isinstance(found, dict) else any_path
    if not all(any(path.endswith(ending) for path in held) for ending in endings):
        raise CheckpointError(
            f"{layout.path / CONFIG_FILE}: trainable_token_indices is {found!r:.80}, and the file of tensors lacks "
            f"{TOKENS} of a module that it names: {LOST}."
        )


class _Start(NamedTuple):
    """Product that PEFT subtracts from the base weight."""

    b: Tensor  # s B_0
    a: Tensor  # A_0
    rounded: float  # norm of what the base's data type rounds away of W - s B_0 A_0
    apart: float  # bound of the norm by which another machine's s B_0 A_0 may differ
    reason: str  # why machines may differ, in words


def _start(module: Module[Any], start: str, r: int, s: float) -> _Start:
    """Return s B_0 and A_0 of an adapter, in PEFT's arithmetic, which is float32."""
    stored = module.stored_weight()
    weight = stored.float()
    if start == "olora":
        q, upper = torch.linalg.qr(weight)
        b0, a0 = q[:, :r], upper[:r]
        norm, reason = float(weight.norm()), f"the first {r} columns of the base weight are almost linearly dependent"
        apart = abs(s) * (2 * basis_error(upper[:r, :r]) * norm + math.sqrt(r) * QR_ROUNDINGS * U32 * norm)
        if not math.isfinite(apart):
            raise module.refuse(
                f"the first {r} columns of the base weight are linearly dependent, so the part that the adapter was "
                f"started from depends on the machine. {MERGE_THERE}"
            )
    elif start == "pissa":
        part = singular_part(weight, r)
        root, apart, reason = torch.sqrt(part.s / s), part.apart, part.reason
        b0, a0 = part.u * root, root[:, None] * part.vt
    else:
        raise module.refuse(
            f"init_lora_weights is {start!r}, whose first A and B cannot be found from the base model alone. Save the "
            "adapter again with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)."
        )
    residual = (weight - s * b0 @ a0).to(stored.dtype).double()
    b0, a0 = b0.double() * s, a0.double()
    return _Start(b0, a0, float((residual - (stored.double() - b0 @ a0)).norm()), apart, reason)
