"""Numbers that are not finite are found in every type, and finite ones never taken for them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from threading import Event

import pytest
import torch

from loraover.checkpoint.tensor_file import HASHED_AT_ONCE, is_finite, sha256_of

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("place", [0, 77, 999])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_number_that_is_not_finite_is_found(dtype: torch.dtype, place: int, value: float) -> None:
    numbers = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert is_finite(numbers)
    numbers[place] = value
    assert not is_finite(numbers)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_two_infinities_do_not_cancel(dtype: torch.dtype) -> None:
    assert not is_finite(torch.tensor([1.0, float("inf"), -float("inf")], dtype=dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_large_numbers_are_finite_even_if_their_sum_is_not(dtype: torch.dtype) -> None:
    assert is_finite(torch.full((1000,), torch.finfo(dtype).max, dtype=dtype))


def test_integers_and_no_numbers_are_finite() -> None:
    assert is_finite(torch.arange(3))
    assert is_finite(torch.tensor([True]))
    assert is_finite(torch.empty(0))


def test_hashing_stops_when_it_should(tmp_path: Path) -> None:
    content = bytes(3 * HASHED_AT_ONCE + 1)
    (tmp_path / "file").write_bytes(content)
    ending = Event()
    assert sha256_of(tmp_path / "file", ending) == sha256_of(tmp_path / "file") == hashlib.sha256(content).hexdigest()
    ending.set()
    assert sha256_of(tmp_path / "file", ending) != sha256_of(tmp_path / "file")
