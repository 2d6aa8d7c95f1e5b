"""The studies that the Makefile plans: what they compare, and the runs that one of them takes from the other."""

from __future__ import annotations

import shutil

import pytest
from transformers import TrainingArguments

from loraover.study.outcome import digest
from loraover.training.hf_trainer import _optimizer

from support.planned import planned
from support.tiny_models import tiny_llama, with_lora

STUDIES = [
    "study",
    "study-gauge",
    "study-papers",
    "study-ranks",
    *(f"study-gauge-{kind}" for kind in ("arms", "options", "steps", "long", "rates")),
]

pytestmark = [pytest.mark.process, pytest.mark.skipif(shutil.which("make") is None, reason="needs make")]


def test_the_study_of_other_methods_takes_the_runs_of_the_gauges_as_they_are() -> None:
    (gauge, tuning, _), (papers, same, _) = (planned(name) for name in ("study-gauge", "study-papers"))
    assert (tuning, same) == (1, 1)  # or the further seeds would be trained at other rates
    known = {one.folder: digest(one.recipe) for one in gauge}
    shared = [one for one in papers if one.folder in known]
    assert all(digest(one.recipe) == known[one.folder] for one in shared)
    methods = {one.method: one.recipe.method for one in papers}
    taken = {one.method for one in shared}
    assert [methods[method] for method in methods if method in taken] == ["lora", "lora", "lora-over"]
    others = [methods[method] for method in methods if method not in taken]
    assert others == ["lora-over", "tensorguide", "soma", "lorasc", "federated"]
    rates = {method: len({one.rate for one in papers if one.method == method}) for method in methods}
    federated = next(name for name in methods if methods[name] == "federated")
    grown = [rates.pop(name) for name in ("lora-over", "tensorguide", "soma", federated)]
    assert grown == [4, 4, 4, 5]  # the largest of 3 was best, and federated's largest of 4 too
    assert set(rates.values()) == {3}
    assert len(shared) == 3 * 3 * 3


@pytest.mark.parametrize(
    ("target", "shared", "new"),
    [
        ("study-gauge-arms", 3 * 3 + 4, 7 * 3 + 1),
        ("study-gauge-options", 2, 8),
        ("study-gauge-steps", 4 * 2 * 3 + 8, 4 * 3 + 1),
        ("study-gauge-long", 0, 3),
        ("study-gauge-rates", 3 * 3, 3 * 2),
    ],
)
def test_a_further_study_of_the_gauge_takes_the_runs_that_are_the_same(target: str, shared: int, new: int) -> None:
    (gauge, tuning, _), (papers, *_), (further, same, _) = (
        planned(name) for name in ("study-gauge", "study-papers", target)
    )
    known = {(one.folder, digest(one.recipe)) for one in (*gauge, *papers)}
    sweep = [(one.folder, digest(one.recipe)) in known for one in further if one.seed == 0]
    assert (tuning, same) == (1, 1)
    assert (sum(sweep), len(sweep)) == (shared, shared + new)


@pytest.mark.parametrize("target", STUDIES)
def test_every_method_has_an_optimizer_that_takes_its_settings(target: str) -> None:
    for recipe in {run.method: run.recipe for run in planned(target)[0]}.values():
        if recipe.training.optim == "soap":
            pytest.importorskip("pytorch_optimizer", reason="pip install 'loraover[soap]'")
        if (make := _optimizer(recipe, TrainingArguments())) is not None:
            make(with_lora(tiny_llama()))


def test_federated_keeps_to_its_budget_and_to_the_rows_of_the_others() -> None:
    federated = pytest.importorskip("loraover.training.methods.federated", reason="pip install 'loraover[private]'")
    pytest.importorskip("opacus", reason="pip install 'loraover[private]'")
    runs, *_ = planned("study-papers")
    one = next(one.recipe for one in runs if one.recipe.method == "federated")
    batch, plain = one.training.per_device_train_batch_size, runs[0].recipe.training
    assert batch * one.federated.clients == plain.per_device_train_batch_size
    federated.Federated(one).check(plain.max_steps, 1979)
    assert one.federated.epsilon == 8.0
