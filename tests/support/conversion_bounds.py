"""The module of a conversion whose bound a test looks at, and its exact delta."""

from __future__ import annotations

from fractions import Fraction
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loraover.adapters.convert.methods.base import Dense, LowRank
from loraover.adapters.uniform.certificate import ModuleCertificate
from loraover_export import convert_adapter

from support.conversions import Source, make_base, make_source, places_of
from support.make_checkpoint import edit_tensors

PATH = "model.layers.1.self_attn.q_proj"
KEY = f"base_model.model.{PATH}"
WEIGHTS, TENSORS = "model.safetensors", "adapter_model.safetensors"


def made(folder: Path, source: Source, weight: Tensor, dtype: torch.dtype = torch.float32) -> Path:
    """An adapter on a base model that has a given weight."""
    base = make_base(folder / "base", source.base)
    edit_tensors(base / WEIGHTS, lambda found: found.update({f"{PATH}.weight": weight}))
    edit_tensors(base / WEIGHTS, lambda found: found.update({key: t.to(dtype) for key, t in found.items()}))
    return make_source(base, folder / "adapter", source)


def delta_of(adapter: Path) -> LowRank | Dense:
    with places_of(adapter) as places:
        return next(place for place in places if place.path == PATH).delta()


def low_rank_of(adapter: Path) -> LowRank:
    found = delta_of(adapter)
    assert isinstance(found, LowRank)
    return found


def converted(adapter: Path, output: Path, **options: Any) -> ModuleCertificate:
    """What the certificate of a conversion says of the module."""
    report = convert_adapter(adapter, output, **options)
    return next(module for module in report.certificate.modules if module.module == PATH)


def exact(matrix: Tensor) -> Any:
    return np.vectorize(Fraction, otypes=[object])(matrix.double().numpy())


def exact_norm(matrix: Any) -> float:
    return sqrt(sum(element * element for element in matrix.ravel()))
