"""Layers that compute in a faulty model what they compute in the right one, and so need not run again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn


class RightLayers:
    """Models whose faults lie in ever later layers: each runs only from the last layer that the one before has right.

    Only the outputs of that layer are held, so a fault in layer k costs the layers from k - 1 on.

    Args:
        layers: The layers in order, each a function of the output of the one before it; empty: all layers run.
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        self._layers = layers
        self._shared: object = None
        self._held: tuple[int, list[Any]] = -1, []

    @contextmanager
    def before(self, layer: int, shared: object) -> Iterator[None]:
        """Run the model in the block without the layers whose outputs are known.

        Args:
            layer: Index of the first layer that may have a fault.
            shared: What blocks must have in common to share outputs, such as the name of the model and the sequences.
        """
        last = min(layer, len(self._layers)) - 1
        if last < 0:
            yield
            return
        if shared != self._shared or self._held[0] > last:
            self._shared, self._held = shared, (-1, [])
        outputs: list[Any] = []
        with ExitStack() as changes:
            keep = self._layers[last].register_forward_hook(lambda module, args, output: outputs.append(output))
            changes.enter_context(keep)
            changes.enter_context(_giving(self._layers[: self._held[0] + 1], self._held[1]))
            yield
        self._held = (last, outputs) if outputs else (-1, [])


@contextmanager
def _giving(layers: nn.ModuleList, outputs: Sequence[Any]) -> Iterator[None]:
    """Let layers return the outputs, one for each run of the model, instead of computing them."""
    own = [vars(layer).get("forward") for layer in layers]
    coming = iter(outputs)
    given: Any = None

    def forward(*args: Any, is_first: bool, **kwargs: Any) -> Any:
        nonlocal given
        given = next(coming) if is_first else given
        return given

    for index, layer in enumerate(layers):
        layer.forward = partial(forward, is_first=index == 0)
    try:
        yield
    finally:
        for layer, before in zip(layers, own, strict=True):
            if before is None:
                del layer.forward
            else:
                layer.forward = before
