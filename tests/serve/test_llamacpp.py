"""llama.cpp in this process: its logits, its errors, and files that must not reach it."""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loraover.common.errors import EngineError
from loraover_export.formats.gguf.header import read_header
from loraover_export.formats.gguf.llamacpp import LlamaCppModel

from support.gguf_export import IDS, GgufMade, apart, export, make_gguf, rewrite
from support.speed import examples

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> GgufMade:
    """Tests read it only."""
    made = make_gguf(tmp_path_factory.mktemp("llama"), "Llama")
    assert export(made.adapter, adapter(made)) == 0
    return made


def adapter(made: GgufMade) -> Path:
    return made.folder / "adapter.gguf"


def test_logits_have_a_row_for_each_token(made: GgufMade) -> None:
    with LlamaCppModel(made.base_gguf, adapter(made), threads=2) as engine:
        assert engine.vocabulary == 64
        found = engine.logits(IDS[0].tolist())
        assert found.dtype == np.float32
        assert found.shape == (IDS.shape[1], 64)
        assert apart(torch.from_numpy(found), made.logits()) <= 1e-4
        again = engine.logits(IDS[0].tolist())
        assert np.array_equal(found, again), "a prompt leaves nothing behind"
        short = engine.logits(IDS[0, :3].tolist())
        assert np.abs(short - found[:3]).max() <= 1e-5


def test_a_long_prompt_is_cut_into_pieces(made: GgufMade) -> None:
    """More tokens than one step takes: the last row depends on all of them."""
    ids = torch.randint(3, 64, (1, 700), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), made.model.disable_adapter():
        expected = made.model(input_ids=ids).logits[0]
    with LlamaCppModel(made.base_gguf, threads=1) as engine:
        assert apart(torch.from_numpy(engine.logits(ids[0].tolist())), expected) <= 1e-3


@pytest.mark.parametrize(("tokens", "found"), [([], "no token"), ([1, 64], "token 64"), ([-1], "token -1")])
def test_tokens_outside_of_the_vocabulary(tokens: list[int], found: str, made: GgufMade) -> None:
    with (
        LlamaCppModel(made.base_gguf) as engine,
        pytest.raises(EngineError, match=f"found {found}, expected .* 0 to 63"),
    ):
        engine.logits(tokens)


Edit = Callable[[dict[str, Any], dict[str, Tensor]], object]
Q_A, Q_B = "blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b"


def field(**changes: Any) -> Edit:
    return lambda fields, tensors: fields.update({key.replace("__", "."): value for key, value in changes.items()})


def tensor(name: str, value: Tensor) -> Edit:
    return lambda fields, tensors: tensors.update({name: value})


WRONG_ADAPTERS: dict[str, tuple[Edit, str]] = {
    "another architecture": (field(general__architecture="qwen2"), "architecture 'qwen2', but .* is of 'llama'"),
    "a control vector": (field(adapter__type="cvec"), "holds no LoRA adapter"),
    "a model": (field(general__type="model"), "holds no LoRA adapter"),
    "no B": (lambda fields, tensors: tensors.pop(Q_B), "is not one of a pair"),
    "a norm": (tensor("blk.0.attn_norm.weight", torch.ones(64)), "is not one of a pair"),
    "another layer": (
        lambda fields, tensors: tensors.update({name.replace("k.0", "k.7"): tensors[name] for name in (Q_A, Q_B)}),
        "adapts blk.7.attn_q.weight, which .* does not have",
    ),
    "another width": (tensor(Q_A, torch.ones(6, 32)), r"A \(6, 32\) and B \(64, 6\), which do not fit \(64, 64\)"),
    "another rank": (tensor(Q_A, torch.ones(5, 64)), "do not fit"),
    "one dimension": (tensor(Q_A, torch.ones(64)), "do not fit"),
}


@pytest.mark.parametrize("fault", WRONG_ADAPTERS)
def test_an_adapter_of_something_else_is_refused(fault: str, made: GgufMade, tmp_path: Path) -> None:
    edit, named = WRONG_ADAPTERS[fault]
    wrong = rewrite(adapter(made), tmp_path / "wrong.gguf", edit)
    with pytest.raises(EngineError, match=named):
        LlamaCppModel(made.base_gguf, wrong)


def test_an_embedding_of_a_tied_head_never_reaches_llama_cpp(tmp_path: Path) -> None:
    """It would end this process."""
    made = make_gguf(tmp_path, "Llama", changes={"tie_word_embeddings": True})
    assert export(made.adapter, adapter(made)) == 0

    def add(fields: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors |= {"token_embd.weight.lora_a": torch.ones(64, 6), "token_embd.weight.lora_b": torch.ones(64, 6)}

    wrong = rewrite(adapter(made), tmp_path / "wrong.gguf", add)
    with pytest.raises(EngineError, match=r"token_embd.weight, which is also the head"):
        LlamaCppModel(made.base_gguf, wrong)


WRONG_BASES: dict[str, tuple[Edit, str]] = {
    "no architecture": (field(general__architecture=""), "holds no model"),
    "an unknown architecture": (field(general__architecture="novel"), "cannot load the model: .*novel"),
    "a missing tensor": (lambda fields, tensors: tensors.pop("blk.1.ffn_up.weight"), "cannot load .*blk.1.ffn_up"),
    "a missing field": (lambda fields, tensors: fields.pop("llama.block_count"), "cannot load .*block_count"),
    "another shape": (tensor("output_norm.weight", torch.ones(32)), "cannot load .*output_norm"),
    "a part": (field(split__count=3), "one of 3 parts"),
}


@pytest.mark.parametrize("fault", WRONG_BASES)
def test_libllamas_reason_is_in_the_error(fault: str, made: GgufMade, tmp_path: Path) -> None:
    edit, named = WRONG_BASES[fault]
    wrong = rewrite(made.base_gguf, tmp_path / "wrong.gguf", edit)
    with pytest.raises(EngineError, match=named):
        LlamaCppModel(wrong)


# Headers


def test_every_truncation_is_noticed(made: GgufMade, tmp_path: Path) -> None:
    content = adapter(made).read_bytes()
    short = tmp_path / "short.gguf"
    for size in [*range(0, 3000, 7), len(content) - 4097, len(content) - 1]:
        short.write_bytes(content[:size])
        with pytest.raises(EngineError, match=r"short\.gguf: not a GGUF file, or not a complete one"):
            read_header(short)


@examples(300)
@given(st.data())
def test_a_damaged_header_is_an_error_or_a_header(made: GgufMade, data: st.DataObject) -> None:
    """No other exception, and no endless loop, whatever eight bytes are overwritten."""
    content = bytearray(adapter(made).read_bytes())
    at = data.draw(st.integers(0, 3000))
    content[at : at + 8] = data.draw(st.one_of(st.binary(min_size=8, max_size=8), st.just(struct.pack("<Q", 2**62))))
    damaged = made.folder / "damaged.gguf"
    damaged.write_bytes(content)
    with suppress(EngineError):
        read_header(damaged)
