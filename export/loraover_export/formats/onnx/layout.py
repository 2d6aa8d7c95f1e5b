"""The LoRA inputs of swappable graphs: the contents of `swappable.json`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from loraover.common.errors import CheckpointError
from loraover.common.strict_json import StrictModel, read_json

LAYOUT_FILE = "swappable.json"


class AdapterInput(StrictModel):
    """Input of a graph that takes one A, as (in_features, r), or B, as (r, out_features)."""

    graph: str = Field(description="File name of the graph")
    input: str = Field(description="Name of the input")
    features: int = Field(ge=1, description="in_features of A, or out_features of B")


class SwappableLayout(StrictModel):
    """Contents of `swappable.json`: the LoRA inputs of exported graphs."""

    schema_version: Literal[1] = 1
    base_model: str = Field(description="Folder or hub name of the base model")
    dtype: Literal["fp32", "fp16"] = Field(description="Data type of the LoRA inputs")
    web: bool = Field(default=False, description="Whether the LoRA inputs are required, as onnxruntime-web needs them")
    places: dict[str, AdapterInput] = Field(
        min_length=1, description='Input of each A and B, by its name, such as "model.layers.0.mlp.up_proj.lora_A"'
    )


def read_layout(folder: Path, graphs: Sequence[str]) -> SwappableLayout:
    """Read the LoRA inputs of exported graphs.

    Args:
        folder: Folder of the export.
        graphs: File names of its graphs.

    Raises:
        CheckpointError: No swappable graphs in the folder, or inputs of other graphs.
    """
    layout = read_json(folder / LAYOUT_FILE, SwappableLayout)
    for site, place in layout.places.items():
        if place.graph not in graphs:
            raise CheckpointError(
                f"{folder / LAYOUT_FILE}: places.{site}.graph is {place.graph!r}, expected {' or '.join(graphs)}."
            )
    return layout
