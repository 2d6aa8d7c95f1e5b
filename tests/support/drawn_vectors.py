"""A reference of drawn vectors, whose right answers are known, and answers to it with noise: no model, no server."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraover_serve.judge.limits import ADAPTER, BASE
from loraover_serve.judge.vectors.asking import VectorAnswer, VectorAnswers
from loraover_serve.judge.vectors.reference import VectorReference

TEXTS, NUMBERS, EFFECT = 32, 24, 0.1
DISTANCES = {"fp16": 3e-4, "bf16": 4e-3, "int8": 1e-2, "fp8": 2e-2, "int4": 0.1}
Numbers = NDArray[np.float64]


def encoded(rows: Numbers) -> str:
    """Rows in float32 and base64."""
    return base64.b64encode(rows.astype("<f4").tobytes()).decode()


def drawn_content(seed: int = 0, numbers: int = NUMBERS, **changes: Any) -> dict[str, Any]:
    """Contents of a reference of vectors that are not normalised; `changes` replace fields."""
    draw = np.random.default_rng(seed)
    base = draw.standard_normal((TEXTS, numbers))
    adapter = base + EFFECT * draw.standard_normal((TEXTS, numbers))
    questions = [{"text": f"text {i}", "pair": None, "tokens": 4 + i, "numbers": numbers} for i in range(TEXTS)]
    return {
        "schema_version": 1,
        "kind": "vectors",
        "adapter": "shop",
        "base_model": "base",
        "task": "embed",
        "labels": [],
        "activation": None,
        "normalised": False,
        "pooling": "last",
        "prefix": "",
        "questions": questions,
        "rows": {"base": encoded(base), "adapter": encoded(adapter)},
        "sensitivity": 1.0,
        "formats": {name: {"distance": each, "strength": 1.0} for name, each in DISTANCES.items()},
        "settings": [],
        "variants": [],
        "made": {"device": "cpu"},
    } | changes


def rows_of(content: Mapping[str, Any], arm: str) -> Numbers:
    """Recorded rows of an arm, (texts, numbers)."""
    return np.frombuffer(base64.b64decode(content["rows"][arm]), "<f4").astype(np.float64).reshape(TEXTS, -1)


def answered(base: Numbers | None, *adapter: Numbers) -> VectorAnswers:
    """Answers of a server in one round or several; without a base model there is one model under both names."""
    alone = {} if base is None else {place: VectorAnswer(row.tolist()) for place, row in enumerate(base)}
    rounds: list[Any] = [
        {place: (VectorAnswer(row.tolist()), {}) for place, row in enumerate(rows)} for rows in adapter
    ]
    return VectorAnswers("/v1/embeddings", alone, rounds, is_one_model=base is None)


def noisy_answers(reference: VectorReference, draw: np.random.Generator, noise: float) -> VectorAnswers:
    """Answers of a right server with a relative error of each number, alone and mixed with those of the other model."""

    def rows(arm: str) -> Numbers:
        exact = np.array(reference.rows[arm])
        return np.asarray(exact + noise * np.sqrt(np.mean(np.square(exact))) * draw.standard_normal(exact.shape))

    mixed = {arm: {at: VectorAnswer(row.tolist()) for at, row in enumerate(rows(arm))} for arm in (BASE, ADAPTER)}
    return replace(answered(rows(BASE), rows(ADAPTER)), mixed=mixed)
