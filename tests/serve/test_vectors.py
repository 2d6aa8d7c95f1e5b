"""Vectors, classes and scores by HTTP: each planted fault of a server is named, and right ones pass."""

from __future__ import annotations

import gzip
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loraover.client.endpoint import Endpoint
from loraover.common.errors import CheckpointError, EngineError
from loraover_serve import record_adapter, verify_adapter, watch_adapters
from loraover_serve.judge.command import CheckOptions, check_vectors
from loraover_serve.judge.limits import ADAPTER
from loraover_serve.judge.names import CHANGED, LEAKS
from loraover_serve.judge.vectors.asking import VectorAnswer, VectorAsker
from loraover_serve.judge.vectors.reference import VectorReference, read_any_reference
from loraover_serve.judge.vectors.verdict import judge_vectors

from benchmarks.vector_alarms import Kept, Noise
from support.drawn_vectors import answered, drawn_content, encoded, noisy_answers, rows_of
from support.vector_server import BASE, SHOP, Serve, Service, save_encoder, save_vector_adapter, vector_server

BF16 = 2e-3  # relative error of each number

Checked = Callable[..., dict[str, Any]]


class Recorded:
    """A model with an adapter, its reference, and a server that answers for them.

    Args:
        folder: Folder for all of them.
        task: The adapter's task.
        labels: Names of its classes.
        options: Fields of LoraConfig.
    """

    def __init__(self, folder: Path, task: str, labels: tuple[str, ...] = (), decoder: bool = True, **options: Any):
        self.base = save_encoder(folder, task, labels, decoder=decoder)
        self.adapter = save_vector_adapter(self.base, folder / SHOP, task, **options)
        self.report = record_adapter(self.adapter, model=str(self.base), device="cpu")
        self.service = Service(self.base, self.adapter, task)

    @property
    def reference(self) -> VectorReference:
        """The reference that was recorded."""
        found = read_any_reference(self.report.path)
        assert isinstance(found, VectorReference)
        return found

    def checked(self, serve: Serve | None = None, protocol: str = "vllm", **more: Any) -> dict[str, Any]:
        """The result of a check of a server."""
        with vector_server(self.service, serve, protocol) as server:
            asker = VectorAsker.of(self.reference, Endpoint(server.url, repeats=False), SHOP, BASE)
            return check_vectors(asker, CheckOptions(**({"repeats": 1} | more)))


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return Recorded(tmp_path_factory.mktemp("embedder"), "FEATURE_EXTRACTION")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    labels = ("good", "bad", "odd")
    folder = tmp_path_factory.mktemp("classifier")
    return Recorded(folder, "SEQ_CLS", labels, decoder=False, target_modules=["query", "value"])


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return Recorded(tmp_path_factory.mktemp("reranker"), "SEQ_CLS", ("relevant",), target_modules=["q_proj", "v_proj"])


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    folder = tmp_path_factory.mktemp("tagger")
    return Recorded(folder, "TOKEN_CLS", ("name", "other"), decoder=False, target_modules=["query", "value"])


@pytest.mark.parametrize("noise", [0.0, BF16])
@pytest.mark.parametrize("protocol", ["vllm", "infinity", "tei"])
def test_a_right_server_of_vectors_is_as_trained(embedder: Recorded, protocol: str, noise: float) -> None:
    found = embedder.checked(Serve(noise=noise), protocol)
    assert (found["verdict"], found["fault"]) == ("as trained", None), found["reason"]
    assert abs(found["strength"].value - 1) < 0.01
    assert found["vectors"].noise == (None if protocol == "tei" else pytest.approx(noise, rel=0.2, abs=1e-6))


@pytest.mark.parametrize(
    ("of", "protocol", "absent"),
    [(of, protocol, 404) for of in ("embedder", "classifier", "reranker") for protocol in ("vllm", "infinity", "tei")]
    + [("tagger", "vllm", status) for status in (404, 403, 500, 200)],
)
def test_servers_whose_paths_are_below_v1_are_asked_there(
    of: str, protocol: str, absent: int, request: pytest.FixtureRequest
) -> None:
    """A gateway may forbid other paths, fail on them, or answer something else there."""
    recorded: Recorded = request.getfixturevalue(of)
    names = ("good", "bad", "odd") if of == "classifier" else None
    with vector_server(recorded.service, Serve(names=names), protocol, below="/v1", absent=absent) as server:
        asker = VectorAsker.of(recorded.reference, Endpoint(server.url, repeats=False), SHOP, BASE)
        found = check_vectors(asker, CheckOptions(repeats=1))
    assert found["verdict"] == "as trained", found["reason"]
    assert found["vectors"].path.startswith("/v1/")
    assert len(server.requests) <= recorded.reference.most_requests(1)


def test_a_server_that_wants_to_be_asked_later_is_asked_on_one_path_alone(tagger: Recorded) -> None:
    with vector_server(tagger.service, below="/v1", absent=429) as server, pytest.raises(EngineError, match="429"):
        VectorAsker.of(tagger.reference, Endpoint(server.url, repeats=False), SHOP, BASE)
    assert {path for path, _ in server.requests} == {"/pooling"}


OF_VECTORS = {
    "served as base": Serve(arms={BASE: BASE, SHOP: BASE}),
    "adapter in the base model": Serve(arms={BASE: SHOP, SHOP: SHOP}),
    "wrong scaling": Serve(factor=0.5),
    "another pooling": Serve(pooling="mean"),
    "vectors not normalised": Serve(normalised=False),
    "another dimension": Serve(dimensions=16),
    "special tokens of the input missing": Serve(special=False),
    "input cut off": Serve(longest=64),
}


@pytest.mark.parametrize("noise", [0.0, BF16])
@pytest.mark.parametrize("fault", OF_VECTORS)
def test_each_fault_of_a_server_of_vectors_is_named(embedder: Recorded, fault: str, noise: float) -> None:
    found = embedder.checked(replace(OF_VECTORS[fault], noise=noise))
    assert (found["verdict"], found["fault"]) == ("differs", fault), found["reason"]


@pytest.mark.parametrize("longest", [100, 128, 200])
def test_any_length_at_which_inputs_are_cut_is_named(embedder: Recorded, longest: int) -> None:
    found = embedder.checked(Serve(longest=longest, noise=BF16))
    assert found["fault"] == "input cut off", found["reason"]
    assert ("answers to texts of" in found["reason"]) == (longest != 128)  # which is recorded


@pytest.mark.parametrize(("factor", "named"), [(2.0, "2"), (0.6, "0.6"), (3.0, "3")])
def test_another_factor_on_the_adapter_is_told(embedder: Recorded, factor: float, named: str) -> None:
    found = embedder.checked(Serve(factor=factor))
    assert found["fault"] == "wrong scaling"
    assert f"multiplied by {named}" in found["reason"]


def test_the_adapters_strength_is_told_beside_another_pooling(embedder: Recorded) -> None:
    for arm, strength in ((SHOP, 1.0), (BASE, 0.0)):
        found = embedder.checked(Serve(pooling="mean", arms={BASE: BASE, SHOP: arm}))
        assert found["fault"] == "another pooling"
        assert found["strength"].value == pytest.approx(strength, abs=0.01)


def test_another_pooling_is_named_where_there_is_one_model(embedder: Recorded) -> None:
    found = embedder.checked(Serve(pooling="mean"), "tei")
    assert (found["verdict"], found["fault"]) == ("differs", "another pooling"), found["reason"]


def test_unknown_inputs_are_not_as_trained(embedder: Recorded) -> None:
    assert embedder.checked(Serve(prefix="query: "))["verdict"] in ("differs", "inconclusive")


def test_a_quick_check_tells_whether_the_adapter_is_applied(embedder: Recorded) -> None:
    assert embedder.checked(quick=True)["verdict"] == "as trained"
    found = embedder.checked(Serve(arms={BASE: BASE, SHOP: BASE}), quick=True)
    assert (found["verdict"], found["fault"]) == ("differs", "served as base")


def test_vectors_in_base64_have_to_be_the_same(embedder: Recorded) -> None:
    found = embedder.checked(Serve(encoded=lambda row: row[::-1]))
    assert found["fault"] == "numbers in base64 are others"


def test_answers_that_are_wrong_beside_others_are_named(embedder: Recorded) -> None:
    found = embedder.checked(Serve(leaks=True, noise=BF16))
    assert found["fault"] == "adapter leaks into the base model's answers in a mixed batch", found["reason"]
    assert embedder.checked(Serve(leaks=True, noise=BF16), without_mixed=True)["verdict"] == "as trained"


def test_some_answers_of_the_base_model_are_found(embedder: Recorded) -> None:
    reference = embedder.reference
    right = {arm: np.array([reference.answer(row) for row in reference.rows[arm]]) for arm in (BASE, "adapter")}
    mixed = right["adapter"].copy()
    mixed[::4] = right[BASE][::4]
    found = judge_vectors(reference, answered(right[BASE], right["adapter"], mixed))
    assert (found["verdict"], found["fault"]) == ("differs", "some answers are the base model's")


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("protocol", ["vllm", "infinity", "tei"])
def test_a_right_classifier_is_as_trained(classifier: Recorded, protocol: str, raw: bool) -> None:
    found = classifier.checked(Serve(raw=raw, names=("good", "bad", "odd"), noise=1e-4), protocol)
    assert found["verdict"] == "as trained", found["reason"]
    assert found["vectors"].task == "classify"


@pytest.mark.parametrize(
    ("serve", "fault"),
    [
        (Serve(order=(2, 0, 1)), "labels in another order"),
        (Serve(names=("bad", "good", "odd")), "labels in another order"),
        (Serve(arms={BASE: BASE, SHOP: BASE}, raw=False), "served as base"),
        (Serve(factor=2.0), "wrong scaling"),
        (Serve(factor=0.0), "only the head of the adapter applied"),
    ],
)
def test_each_fault_of_a_classifier_is_named(classifier: Recorded, serve: Serve, fault: str) -> None:
    found = classifier.checked(serve)
    assert (found["verdict"], found["fault"]) == ("differs", fault), found["reason"]


@pytest.mark.parametrize(
    ("protocol", "message"),
    [("tei", "names the classes LABEL_0, LABEL_1, LABEL_2, expected good, bad"), ("vllm", "calls it 'LABEL_")],
)
def test_classes_of_other_names_are_named(classifier: Recorded, protocol: str, message: str) -> None:
    found = classifier.checked(Serve(names=("LABEL_0", "LABEL_1", "LABEL_2")), protocol)
    assert found["fault"] == "labels in another order"
    assert message in found["reason"]


@pytest.mark.parametrize("protocol", ["vllm", "tei"])
def test_names_of_classes_cannot_colour_a_terminal(classifier: Recorded, protocol: str) -> None:
    found = classifier.checked(Serve(names=("\x1b[31m", "\x1b[32m", "\x1b[33m")), protocol)
    assert found["fault"] == "labels in another order"
    assert "x1b[3" in found["reason"]
    assert found["reason"].isprintable()


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("protocol", ["vllm", "infinity", "tei"])
def test_scores_of_pairs_are_judged(reranker: Recorded, protocol: str, raw: bool) -> None:
    assert "scores of pairs" in str(reranker.report.vectors)
    found = reranker.checked(Serve(raw=raw), protocol)
    assert found["verdict"] == "as trained", found["reason"]
    found = reranker.checked(Serve(raw=raw, arms={BASE: BASE, SHOP: BASE}), protocol)
    assert found["fault"] == "served as base", found["reason"]


def test_classes_of_tokens_are_judged(tagger: Recorded) -> None:
    assert tagger.checked()["verdict"] == "as trained"
    assert tagger.checked(Serve(raw=False))["verdict"] == "as trained"
    assert tagger.checked(Serve(arms={BASE: BASE, SHOP: BASE}))["fault"] == "served as base"


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0, 1.7])
@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_the_strength_is_that_of_least_squares(strength: float, noise: float) -> None:
    """An oracle in NumPy and float64: the factor by which the adapter's changes fit those of the answers best."""
    content, draw = drawn_content(), np.random.default_rng(3)
    base, adapter = (rows_of(content, arm) for arm in (BASE, "adapter"))
    shown = base + noise * draw.standard_normal(base.shape)
    answers = base + strength * (adapter - base) + noise * draw.standard_normal(base.shape)
    direction = adapter - base
    oracle = float(np.sum((answers - shown) * direction) / np.sum(direction * direction))
    found = judge_vectors(VectorReference(content), answered(shown, answers))["strength"]
    assert found.value == pytest.approx(oracle, abs=1e-6 + noise / 2)
    assert found.low <= strength + 1e-6
    assert found.high >= strength - 1e-6


def test_a_small_effect_beside_noise_is_inconclusive() -> None:
    content = drawn_content()
    base = rows_of(content, BASE)
    near = base + 1e-3 * np.random.default_rng(1).standard_normal(base.shape)
    reference = VectorReference(content | {"rows": content["rows"] | {"adapter": encoded(near)}})
    found = judge_vectors(reference, noisy_answers(reference, np.random.default_rng(2), 4e-3))
    assert found["verdict"] == "inconclusive"


@pytest.mark.statistical
@pytest.mark.parametrize("numbers", [1, 2, 3])
def test_answers_of_few_numbers_are_not_called_wrong_in_a_mixed_batch_by_chance(numbers: int) -> None:
    """An adapter that makes logits 3.4 times as large has twice the noise that its sensitivity of 1.75 explains."""
    content = drawn_content(numbers=numbers, sensitivity=1.75)
    larger = encoded(3.4 * rows_of(content, ADAPTER))
    reference = VectorReference(content | {"rows": content["rows"] | {ADAPTER: larger}})
    draw = np.random.default_rng(0)
    drawn = [noisy_answers(reference, draw, 2.5e-5) for _ in range(300)]
    assert [each for each in drawn if judge_vectors(reference, each)["fault"] in (CHANGED, LEAKS)] == []
    for right in drawn[:20]:
        leaked = {**right.mixed[BASE], **{place: right.mixed[ADAPTER][place] for place in range(0, 32, 4)}}
        found = judge_vectors(reference, replace(right, mixed={**right.mixed, BASE: leaked}))
        assert found["fault"] == LEAKS, found["reason"]


HOSTILE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "NaN": (lambda found: _embedding(found, [float("nan")] * 32), "not finite, or too large"),
    "infinite": (lambda found: _embedding(found, [1e400] * 32), "not finite, or too large"),
    "huge": (lambda found: _embedding(found, [1e30] * 32), "not finite, or too large"),
    "empty": (lambda found: _embedding(found, []), "not finite, or too large"),
    "texts": (lambda found: _embedding(found, ["1"] * 32), "cannot be read"),
    "bool": (lambda found: _embedding(found, [True] * 32), "cannot be read"),
    "two": (lambda found: found | {"data": found["data"] * 2}, "expected one entry"),
    "none": (lambda found: found | {"data": []}, "expected one entry"),
    "null": (lambda found: found | {"data": None}, "expected one entry"),
    "another model": (lambda found: found | {"model": "other"}, "'other' answered"),
    "another index": (lambda found: found | {"data": [found["data"][0] | {"index": 3}]}, "expected the entry 0"),
    "nested": (lambda found: _embedding(found, [[[1.0]]]), "cannot be read"),
    "list": (lambda found: [found], "cannot be read"),
}


def _embedding(found: Any, row: Any) -> Any:
    return found | {"data": [{"index": 0, "embedding": row}]}


@pytest.mark.parametrize("name", HOSTILE)
def test_answers_that_are_no_vectors_are_refused(embedder: Recorded, name: str) -> None:
    change, message = HOSTILE[name]
    with pytest.raises(EngineError, match=message):
        embedder.checked(Serve(change=change))


def test_base64_that_holds_no_numbers_is_refused(embedder: Recorded) -> None:
    def change(found: Any) -> Any:
        return _embedding(found, "abc") if isinstance(found["data"][0]["embedding"], str) else found

    with pytest.raises(EngineError, match="cannot be read"):
        embedder.checked(Serve(change=change))


@pytest.mark.parametrize(("sensitive", "served_format"), [("int8", "bf16"), ("int8", "int8"), ("fp16", "bf16")])
def test_each_number_format_has_its_own_sensitivity(sensitive: str, served_format: str) -> None:
    """Rounding to int8 may move the adapted model three times as far as the base model, where bfloat16 does not.

    Nor is the noise of bfloat16 that of fp16, a finer format.
    """
    content = drawn_content()
    for name, further in (("without", 1.0), ("with", 4.0)):
        content["formats"][sensitive]["sensitivity"] = further
        reference, draw = VectorReference(content), np.random.default_rng(4)
        base, adapter = (rows_of(content, arm) for arm in (BASE, "adapter"))
        noise = [size * draw.standard_normal(base.shape) for size in (6e-3, 18e-3)]
        found = judge_vectors(reference, answered(base + noise[0], adapter + noise[1]), served_format)
        is_known = name == "with" and (sensitive, served_format) == ("int8", "int8")
        assert (found["number_format"], found["verdict"]) == ("bf16", "as trained" if is_known else "differs"), name


def test_recorded_number_formats_have_their_sensitivity(embedder: Recorded) -> None:
    reference = embedder.reference
    assert reference.sensitivities["bf16"] == reference.sensitivity
    assert min(reference.sensitivities.values()) >= 1
    assert len(set(reference.sensitivities.values())) > 2


def test_resamples_are_counted_once_and_planted_faults_are_found(tmp_path: Path) -> None:
    reference = VectorReference(drawn_content())
    none = {arm: np.zeros((32, 24)).tolist() for arm in (BASE, "adapter")}
    for resamples, is_more in ((100, True), (100, False), (200, True)):
        kept = Kept(tmp_path / "kept.jsonl")
        assert (kept.count("right", reference, Noise(none, 1e-4), resamples, "bf16") > 0) == is_more
    lines = list(kept.shown("right"))
    assert lines[0] == "right, right: 0 of 200 false alarms; {'as trained': 200}"
    assert [line.split(";")[0] for line in lines[1:]] == [
        "right, as base: 10 of 10 found",
        "right, leaks: 10 of 10 found",
    ]


@pytest.mark.parametrize("part", ["base", "second round", "mixed"])
@pytest.mark.parametrize("more", [-1, 1])
def test_some_answers_of_another_dimension_are_named(part: str, more: int) -> None:
    content = drawn_content()
    reference = VectorReference(content)
    base, adapter = (rows_of(content, arm) for arm in (BASE, "adapter"))
    right = answered(base, adapter, adapter)
    wrong = VectorAnswer([*adapter[5], 0.0][: len(adapter[5]) + more])
    rounds = [right.rounds[0], {**right.rounds[1], 5: (wrong, {})}]
    changed = {
        "base": replace(right, base={**right.base, 5: wrong}),
        "second round": replace(right, rounds=rounds),
        "mixed": replace(right, mixed={BASE: {}, "adapter": {5: wrong}}),
    }
    found = judge_vectors(reference, changed[part])
    assert (found["verdict"], found["fault"]) == ("differs", "another dimension")
    assert re.search(rf"1 of \d+ answers have {24 + more} numbers, expected 24", found["reason"])


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_sure_classes_are_judged_by_their_probabilities_unless_these_are_0_or_1(activation: str) -> None:
    size = 8.0 if activation == "softmax" else 2.0
    labels = [f"class {i}" for i in range(24)]
    content = drawn_content(task="classify", labels=labels, activation=activation, pooling=None)
    logits = {arm: size * rows_of(content, arm) for arm in (BASE, "adapter")}
    content["rows"] = {arm: encoded(rows) for arm, rows in logits.items()}
    powers = {arm: np.exp(rows) for arm, rows in logits.items()}
    is_softmax = activation == "softmax"
    base, adapter = (each / each.sum(1, keepdims=True) if is_softmax else each / (1 + each) for each in powers.values())
    reference = VectorReference(content)
    assert judge_vectors(reference, answered(base, adapter))["verdict"] == "as trained"
    assert judge_vectors(reference, answered(base, base))["fault"] == "served as base"
    adapter[3, 4] = 0.0 if is_softmax else 1.0
    found = judge_vectors(reference, answered(base, adapter))
    assert found["verdict"] == "inconclusive"
    assert "probabilities of 0 or 1 hide the logits" in found["reason"]


def test_tokens_that_are_missing_are_named(tagger: Recorded) -> None:
    found = tagger.checked(Serve(special=False))
    assert (found["verdict"], found["fault"]) == ("differs", "another dimension")
    assert "the server cuts inputs, or omits special tokens" in found["reason"]


def test_far_too_many_numbers_are_refused(embedder: Recorded) -> None:
    with pytest.raises(EngineError, match="answers with 513 numbers, expected 32"):
        embedder.checked(Serve(change=lambda found: _embedding(found, [0.5] * 513)))


def test_more_numbers_than_recorded_are_named(embedder: Recorded) -> None:
    found = embedder.checked(Serve(change=lambda found: _embedding(found, [0.5] * 64)))
    assert (found["verdict"], found["fault"]) == ("differs", "another dimension")
    assert "64 numbers, expected 32" in found["reason"]


def test_the_command_the_checker_and_the_watch_take_the_reference(embedder: Recorded, tmp_path: Path) -> None:
    checker = tmp_path / "check.pyz"
    record_adapter(embedder.adapter, model=str(embedder.base), output=tmp_path / "again.json.gz", checker=checker)
    with vector_server(embedder.service) as server:
        asked: dict[str, Any] = {"references": (embedder.report.path,), "endpoint": server.url, "base_name": BASE}
        report = verify_adapter(**asked, output=tmp_path / "out")
        words = [str(checker), str(embedder.report.path), server.url, "--base-name", BASE]
        alone = subprocess.run([sys.executable, "-I", *words], capture_output=True, text=True, check=False)
        adapters = [{"reference": str(embedder.report.path)}]
        one = {"name": "one", "url": server.url, "base_name": BASE, "adapters": adapters}
        config = {"history": "history.sqlite", "interval_s": 3600, "servers": [one]}
        (tmp_path / "watch.yaml").write_text(json.dumps(config))
        watched = watch_adapters(tmp_path / "watch.yaml", once=True)
    assert (report.exit_code, report.engines[0].compared) == (0, "vectors")
    assert "100 % of the adapter is applied" in report.engines[0].plainly
    assert (tmp_path / "out" / "verify.html").is_file()
    assert (alone.returncode, alone.stderr) == (0, ""), alone.stdout
    assert alone.stdout.startswith("as trained: 100 % of the adapter is applied (")
    assert "\nnot checked:\n- " in alone.stdout
    assert [check.verdict for check in watched.checks] == ["as trained"]


@pytest.mark.parametrize("option", ["caches", "churn_s", "protocol", "without_template"])
def test_checks_of_generated_text_are_refused(embedder: Recorded, option: str) -> None:
    wanted: dict[str, Any] = {"base_name": BASE, option: {"churn_s": 5, "protocol": "openai"}.get(option, True)}
    with vector_server(embedder.service) as server, pytest.raises(EngineError, match="has vectors; leave it out"):
        verify_adapter(references=(embedder.report.path,), endpoint=server.url, **wanted)
    assert not server.requests


BROKEN: dict[str, dict[str, Any]] = {
    "another version": {"schema_version": 2},
    "no task": {"task": "sing"},
    "labels of a vector": {"labels": ["a"]},
    "too few numbers": {"rows": dict.fromkeys(("base", "adapter"), "A" * 4088)},
    "not finite": {"rows": dict.fromkeys(("base", "adapter"), "AACA" + "/w" * 2046)},
    "no base64": {"rows": dict.fromkeys(("base", "adapter"), "###")},
    "zero": {"rows": dict.fromkeys(("base", "adapter"), "A" * 4096)},
    "a pair": {"questions": [each | {"pair": "b"} for each in drawn_content()["questions"]]},
    "a fault of no questions": {"variants": [{"fault": "a", "detail": "b", "questions": 0, "adapter": {}}]},
    "a fault that does not fit": {
        "variants": [{"fault": "a", "detail": "b", "questions": 2, "adapter": {"scales": "AAAAAA==", "levels": "AA=="}}]
    },
    "no distance": {"formats": {name: {"distance": 0, "strength": 1} for name in drawn_content()["formats"]}},
    "no pooling": {"pooling": None},
    "an unknown pooling": {"pooling": "sum"},
    "a pooling of classes": {"task": "classify", "labels": [f"class {i}" for i in range(24)]},
    "a small sensitivity": {"sensitivity": 0.5},
    "an infinite sensitivity": {"sensitivity": math.inf},
    "an infinite sensitivity of a format": {
        "formats": {name: {**each, "sensitivity": math.inf} for name, each in drawn_content()["formats"].items()}
    },
    "no strength": {"formats": {name: {"distance": 1, "strength": math.nan} for name in drawn_content()["formats"]}},
    "a small sensitivity of a format": {
        "formats": {name: {**each, "sensitivity": 0.5} for name, each in drawn_content()["formats"].items()}
    },
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_damaged_reference_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "reference.json.gz"
    path.write_bytes(gzip.compress(json.dumps(drawn_content() | BROKEN[name]).encode()))
    with pytest.raises(CheckpointError, match="not a reference that can be used"):
        read_any_reference(path)


def test_recorded_differences_keep_their_promise(embedder: Recorded) -> None:
    """A 127th of the largest difference in a row is the most that a component of a fault can be off by."""
    reference = embedder.reference
    mean = next(each for each in reference.settings() if "mean" in each.detail)
    texts = [question.text for question in reference.questions]
    for arm, name in ((BASE, BASE), ("adapter", SHOP)):
        for text, row, right in zip(texts, mean.rows(arm), reference.rows[arm], strict=True):
            exact = embedder.service.answer(name, [text], Serve(pooling="mean", normalised=False))
            limit = np.abs(exact - right).max() / 127
            assert np.abs(exact - row).max() <= 0.51 * limit + 1e-6
