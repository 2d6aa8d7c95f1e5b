"""Base models whose rows have whole blocks of each quantised format, and what readers of such weights put into them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from loraover.models.load import load_model, resolve_model
from loraover_serve.comparison.served_weights import open_served_weights

from support.verified import save_base


def save_wide(folder: Path, **options: Any) -> Path:
    """A tiny Llama whose rows have whole blocks of each format."""
    return save_base(folder, hidden_size=64, intermediate_size=128, **options)


def change_config(folder: Path, **values: Any) -> None:
    """Change fields of a model's `config.json`."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def parameters(where: Path, base: Path) -> dict[str, Tensor]:
    """Parameters of a base model into which served weights were put."""
    model = load_model(resolve_model(str(base)))
    with open_served_weights(where) as weights:
        weights.put_into(model)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}
