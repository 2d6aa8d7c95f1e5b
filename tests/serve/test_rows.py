"""Models that run as rows of one batch answer as each does alone, and a record of them is the same file."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from loraover_serve.engines.torch import tree_rows
from loraover_serve.judge.reference import ALPHABET
from loraover_serve.verify import variants
from loraover_serve.verify.layers import RightLayers, RowModel, RowsError, as_rows, at_input

from support.plain_adapter import tiny_decoder
from support.recorded import record
from support.tiny_hub import tiny_tokenizer
from support.verified import save_adapter

LAYERS, WIDTH, TOKENS = 4, 6, 3


class Chain(nn.Module):
    """Layers of whole numbers, so that no order of sums rounds, which count how many rows they get."""

    def __init__(self) -> None:
        super().__init__()
        drawn = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False)) for _ in range(LAYERS))
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        for parameter in self.parameters():
            parameter.data = torch.randint(-2, 3, parameter.shape, generator=drawn).float()
        self.rows: list[int] = []

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden: Tensor = self.embedding(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
            self.rows.append(len(hidden))
        return hidden


def adding(number: int) -> Callable[[nn.Module, Tensor, Tensor], None]:
    def add(module: nn.Module, given: Tensor, output: Tensor) -> None:
        output += number * given.roll(1, -1)

    return add


@torch.inference_mode()
def answers(chain: Chain, models: list[RowModel]) -> list[Tensor]:
    ids = torch.arange(TOKENS)[None].repeat(at_input(models), 1)
    with as_rows(chain, chain.layers, models):
        return list(chain(input_ids=ids))


FAULTS = st.lists(st.tuples(st.integers(0, LAYERS - 1), st.integers(0, LAYERS - 1), st.integers(1, 5)), min_size=1)


@given(faults=FAULTS, data=st.data())
def test_rows_answer_as_each_model_alone(faults: list[tuple[int, int, int]], data: st.DataObject) -> None:
    """Each fault has a first layer, a last one, and a change of both; layers between them are those of the right."""
    chain, right = Chain(), adding(1)
    linears = [layer.get_submodule("0") for layer in chain.layers]
    start = dict.fromkeys(linears, right)
    models = [RowModel(start)]
    for first, more, number in sorted(faults):
        changed = adding(number)
        own = {linears[min(at, LAYERS - 1)]: changed for at in (first, first + more)}
        models.append(RowModel(start | own, first))
    alone = [answers(chain, [RowModel(model.edits)])[0] for model in models]
    together = answers(chain, models)
    expected = alone if models[-1].layer == 0 else alone[1:]
    assert all(map(torch.equal, together, expected))
    batches = data.draw(st.integers(1, len(models)))
    known, found = RightLayers(chain.layers), []
    for at in range(1, len(models), batches):
        batch = models[at : at + batches]
        last = batch[-1].layer
        with known.before(batch[0].layer, "right", last=last):
            found += answers(chain, [models[0], *batch])[-len(batch) :]
    assert all(map(torch.equal, found, alone[1:])), "the right layers are known from the batch before"


def test_a_model_joins_at_its_layer() -> None:
    chain = Chain()
    answers(chain, [RowModel(), RowModel(layer=1), RowModel(layer=1), RowModel(layer=3)])
    assert chain.rows == [1, 3, 3, 3], "the first row ends where the last one begins"


def test_a_module_without_rows_is_refused() -> None:
    """A mixture of experts gives some of the tokens to a module, and nothing says of which row they are."""

    class Mixture(Chain):
        def forward(self, input_ids: Tensor) -> Tensor:
            hidden = self.embedding(input_ids).flatten(0, 1)
            found: Tensor = self.layers[0](hidden[: -1 if self.takes_some else None])
            return found.reshape(len(input_ids), -1, WIDTH) if not self.takes_some else found

        takes_some = False

    chain = Mixture()
    models = [RowModel({chain.layers[0].get_submodule("0"): adding(number)}) for number in (1, 2, 3)]
    alone = [answers(chain, [model])[0] for model in models]
    assert all(map(torch.equal, answers(chain, models), alone)), "all tokens of all rows"
    chain.takes_some = True
    with pytest.raises(RowsError, match="Linear gets"):
        answers(chain, models)


def save_family(folder: Path, family: str) -> tuple[Path, Path]:
    """A base model of four layers with a chat template, and its adapter; Gemma's neighbours are of different kinds."""
    base, options = folder / "base", dict[str, Any](num_hidden_layers=LAYERS)
    if family == "Gemma3":
        options["layer_types"] = ["sliding_attention", "full_attention"] * (LAYERS // 2)
    tiny_decoder(family, **options).save_pretrained(base)
    tiny_tokenizer(chat=True).save_pretrained(base)
    return base, save_adapter(folder / "adapter", base)


def numbers(content: Any) -> Iterator[float | str | None]:
    """Everything in a file, in one order; recorded differences are numbers."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield key
            yield from map(ALPHABET.index, value) if key == "levels" else numbers(value)
    elif isinstance(content, list):
        for each in content:
            yield from numbers(each)
    else:
        yield content


@pytest.mark.parametrize("family", ["Llama", "Gemma3"])
def test_a_record_is_that_of_models_that_run_alone(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = save_family(tmp_path, family)
    runs: list[int] = []

    def counted(model: Any, sequences: Any, lasts: Any, rows: int = 1) -> Any:
        runs.append(rows)
        return tree_rows(model, sequences, lasts, rows)

    monkeypatch.setattr(variants, "tree_rows", counted)

    def recorded(at_once: int) -> tuple[dict[str, Any], int]:
        runs.clear()
        monkeypatch.setattr(variants, "TOKENS_AT_ONCE", at_once)
        content = json.loads(gzip.decompress(record(base, adapter, tmp_path, force=True).read_bytes()))
        return content | {"made": None}, len(runs)

    together, few = recorded(2048)
    monkeypatch.setattr(variants, "chain_of", lambda model: nn.ModuleList())
    alone, many = recorded(0)
    assert few < many / 2
    pairs = list(zip(numbers(together), numbers(alone), strict=True))
    assert len(pairs) > 10_000
    for one, other in pairs:
        if one != other:
            assert isinstance(one, int | float)
            assert isinstance(other, int | float)
            assert abs(one - other) <= (1 if isinstance(one, int) else 1e-3 * abs(one) + 1e-6), (one, other)
