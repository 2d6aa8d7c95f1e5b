"""How many examples a property is tried on, at each speed of the suite (`pytest --hypothesis-profile NAME`)."""

from __future__ import annotations

from typing import Any

from hypothesis import settings

PROFILES = {"quick": 0.2, "full": 1.0, "deep": 20.0}
"""Profile and the factor by which it multiplies the number of examples: `make check`, `make test`, and by hand."""
FEWEST = 5


def scaled(number: int, profile: str) -> int:
    """Examples in a profile, of a property that has that many in "full"."""
    return max(min(FEWEST, number), round(number * PROFILES[profile]))


def simulations(number: int) -> int:
    """Experiments of a simulation that has that many in "full", in the profile of this run."""
    return scaled(number, settings.get_current_profile_name())


def examples(number: int, **options: Any) -> settings:
    """Settings of a property that `make test` tries on that many examples; deadlines are off, as clocks are noisy."""
    return settings(max_examples=simulations(number), deadline=None, **options)
