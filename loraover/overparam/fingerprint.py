"""Fingerprints of matrices: whether something outside the optimizer step has changed them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int32}
"""Integers as which elements are read, by size; 8 bytes are two: high bits would leave too few bits to the weights."""


def fingerprints(matrices: Tensor) -> Tensor:
    """Compute a number for each matrix from the bits of its elements and their places.

    The sum of bits_i * w_i modulo 2^64, with fixed odd weights w_i. A change of a single element always changes it,
    since an odd weight can be divided by. Other changes, such as two swapped elements or two flipped signs, go
    unnoticed with a probability of about 2^-32 over the draw of the weights.
    """
    bits = matrices.flatten(1).contiguous().view(_INTEGER[matrices.element_size()])
    return (bits * _weights(bits.shape[1], matrices.device)).sum(1)


@lru_cache(maxsize=64)
def _weights(count: int, device: torch.device) -> Tensor:
    """Odd int64 numbers, the same in every process."""
    generator = torch.Generator().manual_seed(count)
    return (2 * torch.randint(-(2**62), 2**62, (count,), generator=generator) + 1).to(device)


class _Asked(NamedTuple):
    """A question to a GPU that has not been answered yet."""

    differs: list[Tensor]
    answers: list[Tensor]
    done: list[torch.Event]


class LateAnswer:
    """Whether any of some flags is set, without waiting for a CUDA device that holds them.

    A CPU answers at once. The answer of a CUDA device is copied in the background and read when the next question is
    asked: by then it has long arrived, so nothing waits. Other devices' answers are read then too, but copying waits.
    """

    def __init__(self) -> None:
        self._asked: _Asked | None = None

    @torch.no_grad()
    def ask(self, differs: Sequence[Tensor]) -> list[list[bool]] | None:
        """Return these flags, or those of the question before, if one of them is set; otherwise None."""
        here = [flags for flags in differs if flags.device.type == "cpu"]
        if len(here) == len(differs):
            return _values(differs) if here and bool(torch.cat(here).any()) else None
        by_device: dict[torch.device, list[Tensor]] = {}
        for flags in differs:
            by_device.setdefault(flags.device, []).append(flags)
        answers, done = [], []
        for device, flags_there in by_device.items():
            flag = torch.cat(flags_there).any()
            answer = torch.empty((), dtype=torch.bool, pin_memory=device.type == "cuda")
            answer.copy_(flag, non_blocking=device.type == "cuda")
            answers.append(answer)
            if device.type == "cuda":
                done.append(torch.Event(device))
                done[-1].record(torch.accelerator.current_stream(device))
        before, self._asked = self._asked, _Asked(list(differs), answers, done)
        return None if before is None else _read(before)

    def settle(self) -> list[list[bool]] | None:
        """Wait for the answer that is still on its way, as `ask` returns it."""
        before, self._asked = self._asked, None
        return None if before is None else _read(before)


def _read(asked: _Asked) -> list[list[bool]] | None:
    for event in asked.done:
        event.synchronize()
    return _values(asked.differs) if any(bool(answer) for answer in asked.answers) else None


def _values(differs: Sequence[Tensor]) -> list[list[bool]]:
    return [flags.tolist() for flags in differs]
