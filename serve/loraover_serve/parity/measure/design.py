"""The order of the arms: blocks in which every arm runs twice, in a random order and then in the reverse of it."""

from __future__ import annotations

import random
from collections.abc import Sequence


def block_orders(arms: Sequence[str], blocks: int, seed: int) -> list[list[str]]:
    """Order of the arms in each block: a random order, followed by the same order reversed (ABBA).

    A drift that is linear within a block changes every arm's mean alike, so their ratios stay the same.

    Args:
        arms: Names of the arms.
        blocks: Number of blocks.
        seed: Seed of the random orders.

    Returns:
        `blocks` lists of 2 x len(arms) names.
    """
    draw = random.Random(seed)
    orders = []
    for _ in range(blocks):
        forth = draw.sample(list(arms), len(arms))
        orders.append(forth + forth[::-1])
    return orders
