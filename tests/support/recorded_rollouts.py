"""Loops of SmolLM2 with real logprobs, as `benchmarks.rollout_noise` recorded them, with a fault planted in each.

The tokens are those that the right engine sampled. An engine with a fault has PyTorch's logprobs with that fault, and
the noise that sampling had: with a cache, and with other rows in a batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraover_serve import scale_faults

Floats = NDArray[np.float64]
FOLDER = Path(__file__).parents[1] / "serve" / "rollouts"
SCALING = 4.0
COMPUTED = ("attention", "mlp", "layers", "another", "template", "kept")
"""Models that the trainer computes as candidates, beside earlier adapters and the scale."""
PLANTED = {
    "base": "served as base",
    "stale by 1": "stale by 1",
    "stale by 2": "stale by 2",
    "times 0.25": "scale 1 in place of alpha / r",
    "times 0.5": "half the scale",
    "times 2": "counted twice",
    "times 4": "alpha / r twice, or a sum over 4 ranks",
    "attention": "attention layers only",
    "mlp": "MLP layers only",
    "layers": "the upper half of the layers missing",
    "another": "another adapter of this size",
    "right, temperature": "logprobs at temperature 0.9, trainer raw",
    "raw": "raw logprobs, trainer at temperature 0.9",
    "right, top-p": "logprobs after top-p 0.9",
    "template": "another system prompt",
    "kept": "prompt cached 4 versions before",
    "half base": "half of the rows from the base model",
    "half stale by 1": "half of the rows stale by 1",
    "a quarter stale by 2": "one of four replicas stale by 2",
}
"""Faults that can be planted, in words."""


def recorded(number_format: str) -> dict[str, Floats]:
    """The recorded loop in a number format, bf16 or fp32: arrays of shape (steps, rows, tokens)."""
    with np.load(FOLDER / f"smollm2-{number_format}.npz") as file:
        return {name: file[name].astype(np.float64) for name in file.files}


def planted(kept: dict[str, Floats], fault: str = "", since: int = 0, scales: bool = False) -> list[dict[str, Any]]:
    """Arguments of the judge at each step of a recorded loop, with a fault from a step on.

    Args:
        kept: The loop.
        fault: Name of the fault in `PLANTED`; none means a right engine.
        since: The first step that has it.
        scales: Whether the trainer has computed the logprobs of the scales, too, in its number format.
    """
    found = []
    for step in range(len(kept["sampled"])):
        mine = {name: values[step] for name, values in kept.items()}
        e, a, b = _engine(mine, fault if step >= since else ""), mine["right"], mine["base"]
        candidates: dict[str, Floats] = {name: mine[name] for name in COMPUTED}
        if scales:
            candidates |= {name: mine[model] for name, model in SCALES.items()}
        if fault == "raw":
            a, b, candidates = mine["right, temperature"], mine["base, temperature"], {"raw logprobs": mine["right"]}
        else:
            candidates |= {name: mine[f"right, {name}"] for name in ("temperature", "top-p")}
        earlier = [] if fault == "raw" else [mine[f"stale by {k}"] for k in (1, 2)]
        rows, positions = np.nonzero(np.isfinite(e))
        found.append(
            {
                "e": np.minimum(e, 0)[rows, positions].tolist(),
                "a": a[rows, positions].tolist(),
                "b": b[rows, positions].tolist(),
                "prompt_ids": (rows + step * len(e)).tolist(),
                "rows": rows.tolist(),
                "positions": positions.tolist(),
                "earlier": [each[rows, positions].tolist() for each in earlier],
                "faults": scale_faults(SCALING, 4)
                | {n: _computed(each[rows, positions]) for n, each in candidates.items()},
            }
        )
    return found


SCALES = {
    "half the scale": "times 0.5",
    "twice the scale": "times 2",
    "scale 1 in place of the adapter's": "times 0.25",
    "the adapter's scale twice": "times 4",
}
"""Arrays of the factors that the judge knows by name."""


def _computed(values: Floats) -> list[float | None]:
    """Logprobs of a candidate, with None for a token that it would not have sampled."""
    return [None if np.isnan(value) else float(value) for value in values]


def _engine(mine: dict[str, Floats], fault: str) -> Floats:
    """The engine's logprobs at a step; NaN for a token that it would not have sampled."""
    share, _, model = fault.rpartition("half ") if fault.startswith("half ") else fault.rpartition("a quarter ")
    noise = mine["sampled"] - mine["right"]
    if fault in ("", "raw") or (fault == "kept" and not (mine["right"] != mine["base"]).any()):
        return mine["sampled"]
    served = mine[model].copy()
    if share or fault != model:
        first = len(served) // (2 if fault.startswith("half ") else 4)
        served[first:] = mine["right"][first:]
    return np.asarray(served + noise)
