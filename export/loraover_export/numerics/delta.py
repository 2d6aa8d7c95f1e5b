"""What an adapter adds to each module, in float64 and with the bound of its error."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from loraover.checkpoint.checkpoint import Checkpoint
from loraover.checkpoint.error_bounds import gamma, smallest_subnormal, unit_roundoff
from loraover.checkpoint.exact_tensors import Exact, adapter_of, open_exact
from loraover.checkpoint.peft_adapter import KEY_PREFIX, AdapterDir, site_key, site_name
from loraover.common.errors import ExportError

U64 = unit_roundoff(torch.float64)


@dataclass(frozen=True)
class Delta:
    """delta_W = B @ A of one module, with the scaling in B.

    Args:
        module: its path in the base model.
        embedding: whether it is an embedding, whose A has one column for each token.
        a: (r, in_features).
        b: (out_features, r).
    """

    module: str
    embedding: bool
    a: Exact
    b: Exact

    @property
    def rank(self) -> int:
        return self.a.value.shape[0]

    def product(self) -> Exact:
        """delta_W (out_features, in_features), with |dB| (|A| + |dA|) + |B| (|dA| + gamma_r |A|) as its bound."""
        a, b = self.a, self.b
        size = a.value.abs()
        left = torch.cat([b.bound, b.value.abs()], dim=1)
        right = torch.cat([size + a.bound, a.bound + gamma(self.rank, U64) * size])
        return Exact(b.value @ a.value, left @ right, a.site or b.site)


def read_deltas(source: Checkpoint | AdapterDir) -> Iterator[Delta]:
    """Every adapted module of a source, one at a time.

    Raises:
        ExportError: a LoRA with a bias, which is no part of B @ A.
        CheckpointError: files that cannot be trusted.
    """
    adapter = adapter_of(source)
    biases = [key for key in adapter.shapes if key.endswith(".lora_B.bias")]
    if biases:
        raise ExportError(
            f"{adapter.tensors_path}: {biases[0]} is a bias of a LoRA, which no exported format holds; "
            "train with lora_bias=False."
        )
    with open_exact(source) as exact:
        for name in adapter.sites:
            module, _, kind = name.rpartition(".")
            if kind.endswith("A"):
                b = exact.tensor(site_key(f"{module}.{kind[:-1]}B"))
                yield Delta(
                    module,
                    kind.startswith("lora_embedding"),
                    exact.tensor(site_key(name)),
                    scale(b, adapter.config.scaling(module)),
                )


def other_tensors(adapter: AdapterDir) -> list[str]:
    """Names of parameters that the adapter replaces as a whole (`modules_to_save`, biases), in the base model."""
    keys = [key for key in adapter.shapes if site_name(key) is None]
    return [key.removeprefix(KEY_PREFIX).replace(".base_layer.", ".") for key in keys]


def scale(exact: Exact, scaling: float) -> Exact:
    """scaling * M in float64; |error| <= |scaling| bound + gamma_1 |result|, plus half a subnormal for underflow."""
    value = exact.value * scaling
    rounding = gamma(1, U64) * value.abs()
    tiny = 0.0 if scaling in (0.0, 1.0) else smallest_subnormal(torch.float64) / 2
    return Exact(value, abs(scaling) * exact.bound + rounding + tiny, exact.site)
