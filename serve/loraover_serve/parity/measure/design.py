"""In which order the arms run: blocks in which every arm runs twice, forth and back."""

from __future__ import annotations

import random
from collections.abc import Sequence


def block_orders(arms: Sequence[str], blocks: int, seed: int) -> list[list[str]]:
    """For each block the arms in a random order, followed by the same order reversed (ABBA).

    A drift that is linear within a block adds the same to every arm's mean, and so nothing to their ratios.

    Returns:
        `blocks` lists of 2 x len(arms) names.
    """
    draw = random.Random(seed)
    orders = []
    for _ in range(blocks):
        forth = draw.sample(list(arms), len(arms))
        orders.append(forth + forth[::-1])
    return orders
