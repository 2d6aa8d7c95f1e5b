"""Held-out data of a study: one example of each conversation at most."""

from __future__ import annotations

from loraover.common.errors import DataError
from loraover.data.sources import BUILT_IN
from loraover.data.turns import later_turn
from loraover.training.examples import load_held_out
from loraover.training.recipe import Recipe


def check_held_out(recipe: Recipe) -> None:
    """Check that no held-out example continues the one before it.

    A study chooses rates on one half of the examples and judges on the other half, and its intervals take examples to
    be independent. Turns of one conversation would lie in both halves.

    Args:
        recipe: The recipe of a run.

    Raises:
        DataError: An example continues the one before it, or see `load_held_out`.
    """
    if recipe.data.train == BUILT_IN and recipe.data.test is None:
        return
    held_out = load_held_out(recipe)
    later = None if held_out is None else later_turn(held_out.rows)
    if later is not None:
        raise DataError(
            f"{recipe.data.test or recipe.data.name}: held-out example {later + 1} is a later turn of the "
            f"conversation of example {later}. A study chooses rates on one half of the examples and judges on "
            "the other, so its held-out conversations may have only one turn of the assistant."
        )
