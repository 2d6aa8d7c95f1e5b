"""Runs of a model that share what they have in common: as rows of one batch, and from known outputs of layers on.

A fault changes some modules of a model, from a first layer on. Below that layer it computes what the right model does,
so that one batch runs many faults: it begins with the right model alone, and each fault joins it at its first layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, cat, nn

Edit = Callable[[nn.Module, Tensor, Tensor], None]
"""Function of a module, its input and its output, which changes the output in place."""


class RowsError(RuntimeError):
    """A module whose input lacks the rows of a batch, so that models have to run one by one."""


@dataclass(frozen=True, eq=False)
class RowModel:
    """A model as a row of a batch.

    Args:
        edits: Changes of modules' outputs, by the module.
        layer: Index of the first layer that may differ from the first model of the batch.
    """

    edits: Mapping[nn.Module, Edit] = field(default_factory=dict)
    layer: int = 0


def at_input(models: Sequence[RowModel]) -> int:
    """Number of models that are in a batch from its input on: the others join it at their layers."""
    return max(1, sum(model.layer == 0 for model in models))


@contextmanager
def as_rows(model: nn.Module, layers: nn.ModuleList, models: Sequence[RowModel]) -> Iterator[None]:
    """Run several models as rows of a batch during a block, or one model as it is.

    The input has a row for each of `at_input`; any other model begins as a copy of the first row, before its layer. The
    first row ends where the last model begins, unless all begin at the input.

    Args:
        model: The model that is run. It gets `input_ids` by name, and nothing else that differs between rows.
        layers: Its layers, each a function of the output of the one before it.
        models: The models in the order of their layers. Of several, the first is right below the layers of the others.

    Raises:
        RowsError: A module that is changed and that gets other inputs than the rows of the batch.
    """
    batch = _Batch(models)
    first = at_input(models)
    joining = [each.layer for each in models[first:]]
    with ExitStack() as hooks:
        if len(models) > 1:
            hooks.enter_context(model.register_forward_pre_hook(batch.begin, with_kwargs=True))
        for layer in dict.fromkeys(joining):
            join = partial(batch.join, joining.count(layer), is_last=layer == joining[-1])
            hooks.enter_context(layers[layer].register_forward_pre_hook(join, with_kwargs=True))
        for module in dict.fromkeys(module for each in models for module in each.edits):
            edit = partial(batch.edit, [each.edits.get(module) for each in models])
            hooks.enter_context(module.register_forward_hook(edit, with_kwargs=True))
        yield


class _Batch:
    """The batch while the model runs: which of the models are in it, and how many tokens each has."""

    def __init__(self, models: Sequence[RowModel]) -> None:
        self._is_one, self._present, self._tokens = len(models) == 1, range(0), 0

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        number, self._tokens = kwargs["input_ids"].shape
        self._present = range(number)

    def join(
        self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, is_last: bool
    ) -> Any:
        hidden, first = _hidden(args, kwargs), int(is_last)
        self._present = range(first, self._present.stop + number)
        more = cat([hidden[first:], *[hidden[:1]] * number])
        return ((more, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": more})

    def edit(
        self,
        edits: Sequence[Edit | None],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        """Change the output of a module; models with one change are changed at once."""
        given, found = _hidden(args, kwargs), output[0] if isinstance(output, tuple) else output
        if self._is_one:
            alike = [(edits[0], slice(None))]
        else:
            present = edits[self._present.start : self._present.stop]
            alike = list(_alike(present, self._size(module, given, found)))
        for change, rows in alike:
            if change is not None:
                change(module, given[rows], found[rows])

    def _size(self, module: nn.Module, given: Tensor, found: Tensor) -> int:
        """Length of each model's part of an input: 1, or its tokens if the module gets them without their rows."""
        size = 1 if given.dim() > 2 or not given.is_floating_point() else self._tokens
        number = len(self._present)
        if not len(given) == len(found) == number * size:
            kind = type(module).__name__
            raise RowsError(f"{kind} gets {tuple(given.shape)} for {number} models of {self._tokens} tokens.")
        return size


def _alike(edits: Sequence[Edit | None], size: int) -> Iterator[tuple[Edit | None, slice]]:
    """Yield the different changes among those of neighbours, and where their parts of an input are."""
    start = 0
    for end in range(1, len(edits) + 1):
        if end == len(edits) or edits[end] is not edits[start]:
            yield edits[start], slice(start * size, end * size)
            start = end


def _hidden(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Input of a module or a layer."""
    found: Tensor = args[0] if args else kwargs["hidden_states"]
    return found


class RightLayers:
    """Outputs of layers that models share, run in the order of their first faulty layer: each starts at that layer.

    Only the outputs of that layer are held, so a fault in layer k costs the layers from k - 1 on.

    Args:
        layers: The layers in order, each a function of the output of the one before it; empty: all layers run.
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        self.layers = layers
        self._shared: object = None
        self._held: tuple[int, list[Any]] = -1, []

    @contextmanager
    def before(self, layer: int, shared: object, *, last: int | None = None) -> Iterator[None]:
        """Run the model in the block without the layers whose outputs are known.

        Args:
            layer: Index of the first layer that may have a fault.
            shared: What blocks must have in common to share outputs, such as the name of the model and the sequences.
            last: Index of the last layer below which the first row of a batch is right; None: the batch has one model,
                which is right below `layer`.
        """
        known, kept = min(layer, len(self.layers)) - 1, min(layer if last is None else last, len(self.layers)) - 1
        if kept < 0:
            yield
            return
        if shared != self._shared or self._held[0] > known:
            self._shared, self._held = shared, (-1, [])
        outputs: list[Any] = []

        def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            outputs.append(output if last is None else _first_row(output))

        with ExitStack() as changes:
            changes.enter_context(self.layers[kept].register_forward_hook(keep))
            changes.enter_context(_giving(self.layers[: self._held[0] + 1], self._held[1]))
            yield
        self._held = (kept, outputs) if outputs else (-1, [])


def _first_row(output: Any) -> Any:
    """A copy of the first row of a layer's output."""
    return (output[0][:1].clone(), *output[1:]) if isinstance(output, tuple) else output[:1].clone()


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
