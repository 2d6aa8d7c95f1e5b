"""What judgements on answers rest on: thresholds, and how well a root mean square is known."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SURE = 5
"""Standard errors by which an estimate may be off."""

APPLIED = 3
"""Multiple of the noise by which an applied adapter changes logprobs at least."""


def root_mean(squares: Sequence[float] | NDArray[np.float64]) -> tuple[float, float]:
    """Root of a mean of squares, and its standard error.

    The root divides the standard error of the mean by 2 rms. A single square does not show its error: the root itself
    is taken for it.

    Args:
        squares: At least one square.
    """
    rms = math.sqrt(np.mean(squares))
    spread = float(np.std(squares, ddof=1)) if len(squares) > 1 else 2 * rms**2
    return rms, spread / math.sqrt(len(squares)) / (2 * rms) if rms else 0.0
