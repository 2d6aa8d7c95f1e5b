"""Trained tokens: k rows of an embedding that are replaced, which are an embedding LoRA of rank k.

The new rows E' stand in the file, so delta_W^T = S (E' - E) with S (tokens, k) a column of the identity for each
trained token, and E the base model's rows. PEFT replaces them in all modules that share the input embedding's weight,
so each of them gets the same LoRA: the output head, transposed, and the embeddings of an encoder and a decoder.

Source: set_additional_trainable_modules in peft/utils/other.py and TrainableTokensModel of PEFT 0.21.2.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, final

from loraover.adapters.base_weights import is_embedding
from loraover.adapters.convert.methods.base import ConversionMethod, LowRank, Place
from loraover.adapters.convert.source import Adapter, MethodConfig, Module
from loraover.checkpoint.files import CONFIG_FILE
from loraover.common.errors import ExportError
from loraover.common.later import torch

NAME = "trainable_tokens_delta"
HEADED = ("SEQ_CLS", "TOKEN_CLS")
"""Tasks for which PEFT trains a head beside a LoRA."""


class TokenFields(MethodConfig):
    """Fields of TrainableTokensConfig that change the delta."""

    token_indices: list[int]


@final
class TrainableTokens(ConversionMethod[TokenFields]):
    """New rows of an embedding."""

    config = TokenFields
    tensors = (NAME,)
    rank = "number of trained tokens"
    needs_weights = True
    embeddings = True

    def named(self, adapter: Adapter[TokenFields]) -> list[str]:
        """Return the embeddings: PEFT adds the modules that share the input embedding's weight."""
        return [path for path in adapter.layout.modules if path not in adapter.base.tied[1:]]

    def places(self, adapter: Adapter[TokenFields]) -> Iterator[Place]:
        task = adapter.config.task_type
        if task in HEADED:
            raise ExportError(
                f"{adapter.layout.path / CONFIG_FILE}: task_type is {task!r}, for which PEFT loads a LoRA only if its "
                "file holds a classification head, and an adapter of trained tokens holds none. Write null there."
            )
        for path in adapter.layout.modules:
            outer = path.removesuffix(".base_layer")
            if outer != path and outer in adapter.layout.modules:
                raise adapter.module(outer).refuse(
                    "it has trained tokens twice, since it shares its weight with the embedding, and both are targets; "
                    "train with the embedding alone in target_modules."
                )
            yield from token_places(adapter.module(path), NAME, adapter.config.token_indices)

    def trained_tokens(self, config: TokenFields) -> set[int]:
        return {*config.token_indices}

    def delta(self, module: Module[TokenFields]) -> LowRank:
        return _rows(module, NAME, module.config.token_indices)


def token_places(module: Module[Any], name: str, indices: Sequence[int]) -> Iterator[Place]:
    """Yield the embedding, or a head with its own weight, and the modules that share its weight and have no tokens."""
    base = module.adapter.base
    find = partial(_rows, module, name, indices)
    yield Place(module.path, module.is_embedding, find)
    if [module.path] != base.tied[:1]:
        return
    for path in base.tied[1:]:
        other = module.adapter.layout.modules.get(path)
        if other is None:
            other_is_embedding = is_embedding(base.modules[path])
            yield Place(path, other_is_embedding, find if other_is_embedding else lambda: find().transposed())
        elif name not in other:
            raise module.refuse(
                f"it has trained tokens, and {path}, which shares its weight, has a LoRA; train with one of them."
            )


def _rows(module: Module[Any], name: str, indices: Sequence[int]) -> LowRank:
    """Return the change of some rows: (dimension, tokens) for an embedding, else (tokens, dimension)."""
    tokens, dimension = module.shape
    new = module.tensor(name, len(indices), dimension)
    twice = [token for token, count in Counter(indices).items() if count > 1]
    outside = [token for token in indices if not 0 <= token < tokens]
    if twice or outside:
        found = f"token {twice[0]} is trained twice" if twice else f"token {outside[0]} is not among {tokens} tokens"
        raise module.refuse(f"{found}; the configuration is of another model, or damaged.")
    places = torch.zeros(len(indices), tokens, dtype=torch.float64)
    places[torch.arange(len(indices)), torch.tensor(indices, dtype=torch.long)] = 1
    change = new - module.stored_weight()[list(indices)].double()
    found_rows = LowRank(change.mT.contiguous(), places)
    return found_rows if module.is_embedding else found_rows.transposed()
