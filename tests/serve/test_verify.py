"""Verification on a tiny model: verdicts, planted faults that are found and named, and the judge's rule."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from loraover.common.errors import EngineError
from loraover_serve.comparison.rounding import FORMATS
from loraover_serve.engines import torch as torch_engines
from loraover_serve.engines import vllm
from loraover_serve.engines.base import LogitEngine, Setting
from loraover_serve.engines.torch import model_logits
from loraover_serve.judge.case import allowed_distance, sure_errors
from loraover_serve.judge.limits import ADAPTER, FLOOR, SURE
from loraover_serve.judge.models import Answers, Greedy
from loraover_serve.judge.names import ENDS_EARLY
from loraover_serve.judge.remedies import REMEDIES
from loraover_serve.judge.results import LogprobDistance
from loraover_serve.verify.by_pytorch import verify_engine
from loraover_serve.verify.faults import permuted
from loraover_serve.verify.pytorch import KEPT
from loraover_serve.verify.report import EngineResult
from loraover_serve.verify.request import VerifyRequest
from loraover_serve.verify.show import show_report, to_page, verdict_of

from support.make_checkpoint import Made
from support.plain_adapter import tiny_decoder
from support.reports import SCALED, WHOLE, engine_result, three_engines, verification
from support.verified import FAULTS, Case, Planted, judged, make_case, plant, save_adapter, save_base


def as_pytorch(case: Case, *, length: int | None = None) -> Answers:
    """PyTorch's own answers, of which the greedy ones may be cut to a length."""
    base, adapter = (dict(enumerate(model.rows)) for model in (case.models.base, case.models.adapter))
    tokens = [question.answer[:length] for question in case.models.questions]
    return Answers(base, adapter, [Greedy(index, each, len(each), {}) for index, each in enumerate(tokens)])


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_and_named(name: str, case: Case, tmp_path: Path) -> None:
    planted: Planted = FAULTS[name]
    wrong = plant(planted, case.adapter, tmp_path / "wrong")
    found = verify_engine("torch", case.setting(tmp_path, adapter=wrong), case.models)
    assert (found.verdict, found.fault) == ("differs", planted.fault)
    assert found.suspects[0].detail.startswith(planted.words)
    assert found.suspects[0].rms < found.suspects[1].rms
    assert planted.words in found.reason


def test_the_right_adapter_is_as_trained(case: Case, tmp_path: Path) -> None:
    found = verify_engine("torch", case.setting(tmp_path), case.models)
    assert (found.verdict, found.number_format, found.fault, found.suspects) == ("as trained", "fp32", None, [])
    assert found.greedy is not None
    assert found.greedy.equal == 1


def test_a_large_vocabulary_is_compared_at_its_likeliest_tokens(tmp_path: Path) -> None:
    """PyTorch's logprobs of a token that is none of them, but that an engine answers, are known as well."""
    base = save_base(tmp_path / "base", vocab_size=600)
    case = make_case(base, save_adapter(tmp_path / "adapter", base))
    assert KEPT <= min(map(len, case.models.base.rows)) <= 2 * KEPT < 600
    wrong = plant(FAULTS["MLP missing"], case.adapter, tmp_path / "wrong")
    for adapter, expected in ((case.adapter, ("as trained", None)), (wrong, ("differs", FAULTS["MLP missing"].fault))):
        found = verify_engine("torch", case.setting(tmp_path, adapter=adapter), case.models)
        assert (found.verdict, found.fault, found.compared) == (*expected, "top tokens"), found.reason
    first = case.models.first(0)
    logprobs = case.models.expected[ADAPTER].at(*case.models.position(first))
    token = next(token for token in np.argsort(logprobs).tolist() if token not in case.models.kept(first))
    beside = case.models.beside(replace(as_pytorch(case), greedy=[Greedy(0, (token,), 1, {})]))
    assert beside.adapter.rows[first][token] == logprobs[token]


def test_vllm_is_started_on_a_port_of_its_own(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ports: list[int | None] = []

    def serve(*_: object, port: int | None = None, **__: object) -> Any:
        ports.append(port)
        raise EngineError("not started")

    monkeypatch.setattr(vllm, "serve_vllm", serve)
    with pytest.raises(EngineError, match="not started"):
        verify_engine("vllm", case.setting(tmp_path), case.models)
    assert ports == [None], "any free port, and not vLLM's own default, which another server may take meanwhile"


def test_a_checkpoint_is_compared_with_its_unfolded_model(made: Made, tmp_path: Path) -> None:
    case = make_case(made.base, made.path)
    assert case.models.name == "the unfolded checkpoint"
    found = verify_engine("torch", case.setting(tmp_path), case.models)
    assert (found.verdict, found.compared) == ("as trained", "all tokens")
    assert found.adapter is not None
    assert 0 < found.adapter.rms < 1e-5, "another computation than the reference's"


@pytest.mark.parametrize("name", FORMATS)
def test_a_coarser_base_model_is_noise_that_has_a_name(name: str, case: Case, tmp_path: Path) -> None:
    coarse = case.setting(tmp_path, base=save_base(tmp_path / "coarse", change=FORMATS[name].weights))
    found = verify_engine("torch", coarse, case.models)
    assert found.verdict in ("as trained", "inconclusive")
    assert found.number_format in ("fp32", name)
    assert (found.number_format == "fp32") == (found.base is not None and found.base.rms <= 10 * FLOOR)


def scaled_case(case: Case, factor: float, tmp_path: Path) -> tuple[Case, Setting]:
    """A case with a weaker adapter, and an engine whose base model is rounded to int4."""
    weak = Planted("", "", {}, lambda tensors: {k: factor * t if "lora_B" in k else t for k, t in tensors.items()})
    mine = make_case(case.base, plant(weak, case.adapter, tmp_path / "weak"))
    coarse = save_base(tmp_path / "coarse", change=FORMATS["int4"].weights)
    return mine, mine.setting(tmp_path, base=coarse)


def test_an_adapter_below_the_noise_is_inconclusive(case: Case, tmp_path: Path) -> None:
    mine, setting = scaled_case(case, 1e-6, tmp_path)
    found = verify_engine("torch", setting, mine.models)
    assert found.verdict == "inconclusive"
    assert "a wrong adapter would pass as well" in found.reason


def test_other_tokens_than_the_logprobs_say_differ(case: Case) -> None:
    expected, questions = case.models.expected[ADAPTER], enumerate(case.models.questions)
    worst = [int(np.argmin(expected.at(index, question.answered[0]))) for index, question in questions]
    greedy = [Greedy(index, (token,), 1, {}) for index, token in enumerate(worst)]
    found = judged(replace(as_pytorch(case), greedy=greedy), case.models)
    assert (found.verdict, found.fault) == ("differs", None)
    assert "generates tokens that its own logprobs make unlikely" in found.reason


def test_answers_that_stop_early_are_not_the_same_text(case: Case) -> None:
    answers, short, questions = as_pytorch(case), as_pytorch(case, length=1), case.models.questions

    def verdict(ends: set[int], answers: Answers) -> tuple[str, str | None]:
        found = judged(answers, replace(case.models, ends=frozenset(ends)))
        return found.verdict, found.fault

    right = ("as trained", None)
    assert (verdict(set(), answers), verdict(set(), short)) == (right, ("differs", ENDS_EARLY))
    assert verdict({question.answer[0] for question in questions}, short) == right, "the end of the text"
    assert verdict({question.answer[1] for question in questions}, short) == right, "an end that is left out"


def test_rows_that_are_not_heads_times_even_are_not_permuted(case: Case) -> None:
    subject = case.models.subject
    rows = len(next(delta.b for module, delta in subject.deltas.items() if module.endswith("q_proj")))
    assert len(list(permuted(subject))) == 2
    assert list(permuted(replace(subject, heads={"q_proj": rows + 1, "k_proj": rows}))) == []


class Changed(LogitEngine):
    """PyTorch's logits with a change."""

    name = "an engine"

    def __init__(self, case: Case, change: Callable[[Any], Any]) -> None:
        self._models, self._change = case.models, change

    @classmethod
    def start(cls, setting: Setting) -> Any:
        raise NotImplementedError

    def logits(self, arm: str, sequences: Iterable[Sequence[int]]) -> Iterator[Any]:
        for index, question in enumerate(self._models.questions):
            rows = [self._models.expected[arm].at(index, position) for position in question.window]
            yield self._change(np.stack(rows))

    def generate(self, arm: str, prompts: Sequence[Sequence[int]], tokens: int) -> list[tuple[int, ...]]:
        return [question.answer for question in self._models.questions]


def test_answers_that_are_not_finite_or_of_another_vocabulary_are_errors(case: Case) -> None:
    assert judged(Changed(case, lambda logits: logits).answers(case.models), case.models).verdict == "as trained"
    with pytest.raises(EngineError, match="not a finite number"):
        Changed(case, lambda logits: logits * np.nan).answers(case.models)
    with pytest.raises(EngineError, match="71 tokens or more, and the base model has 72"):
        Changed(case, lambda logits: logits[:, :-1]).answers(case.models)


def test_the_allowed_distance_follows_the_noise() -> None:
    noise = LogprobDistance(rms=0.1, error=0.01, largest=1.0, positions=10**6, prompts=10**6)
    assert allowed_distance(noise, 1.5) == pytest.approx(1.5 * 0.1 * (1 + 5 * 2**0.5 * 0.1) + FLOOR, rel=1e-5)
    assert allowed_distance(LogprobDistance(rms=0.0, error=0.0, largest=0.0, positions=64, prompts=64), 1.5) == FLOOR
    assert sure_errors(64) == SURE
    assert sure_errors(2) > 10**3


@pytest.mark.parametrize("last", [None, 1, 4])
@pytest.mark.parametrize("lengths", [[5], [3, 7, 5, 1, 6], [2, 2, 2, 2]])
def test_questions_that_are_run_together_get_the_logits_of_those_run_alone(
    lengths: list[int], last: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_decoder("Llama").eval()
    monkeypatch.setattr(torch_engines, "LOGITS_AT_ONCE", 15 * model.config.vocab_size)
    asked = [[(7 * k + i) % 60 for i in range(length)] for k, length in enumerate(lengths)]
    calls: list[torch.Size] = []
    model.register_forward_pre_hook(lambda *each: calls.append(each[2]["input_ids"].shape), with_kwargs=True)
    with torch.inference_mode():
        together = list(model_logits(model, asked, last=last))
        batches = [shape.numel() for shape in calls]
        alone = [model(input_ids=torch.tensor([ids])).logits[0].numpy()[-(last or 0) :] for ids in asked]
    assert len(batches) < len(asked) or len(asked) == 1
    assert max(batches) <= 15
    for one, other in zip(together, alone, strict=True):
        assert one.shape == other.shape
        assert np.abs(one - other).max() <= 1e-5


def test_a_recording_computes_no_logits_before_the_answers() -> None:
    model = tiny_decoder("Llama").eval()
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, output: rows.append(output.shape[1]))
    with torch.inference_mode():
        found = list(model_logits(model, [range(20), range(24)], last=4))
    assert rows == [8], "the shorter question ends four tokens before the longer one"
    assert [len(each) for each in found] == [4, 4]


LOST = engine_result("vllm", "differs", "a: b; c", fault="wrong scaling", suspects=[SCALED], not_checked=["d; e"])


@pytest.mark.parametrize(
    ("result", "tone", "expected"),
    [
        (engine_result("onnx", "as trained", WHOLE), "good", f"onnx: as trained. {WHOLE}."),
        (LOST, "bad", f"vllm: differs. A: b. C.\nWhat to do: {REMEDIES[SCALED.fault]}."),
        (engine_result("torch", "inconclusive", "a (b; c); d"), "open", "torch: inconclusive. A (b; c). D."),
        (
            EngineResult(engine="vllm", verdict="failed", reason="the server ended with code 1.", seconds=2),
            "bad",
            "vllm: failed. The server ended with code 1.",
        ),
    ],
)
def test_each_engine_has_a_plain_line(result: EngineResult, tone: str, expected: str) -> None:
    verdict = verdict_of(verification(result))
    assert (verdict.tone, verdict.word, verdict.sentence) == (tone, result.verdict, expected)


def test_several_engines_begin_with_the_worst() -> None:
    found = verdict_of(three_engines())
    assert found.word == "differs"
    assert [line.partition(".")[0] for line in found.sentence.split("\n")] == [
        "vllm: differs",
        f"What to do: {REMEDIES[SCALED.fault]}".partition(".")[0],
        "llamacpp: failed",
        "onnx: as trained",
    ]


def test_the_page_and_the_terminal_list_what_was_not_checked() -> None:
    report, shown = verification(LOST), io.StringIO()
    assert "<h2>Not checked: vllm</h2>\n<ul>\n<li>d; e</li>\n</ul>" in to_page(report).html
    show_report(report, VerifyRequest(Path("shop"), engines=["torch"]), Console(file=shown, width=200))
    remedy = f"  what to do: {REMEDIES[SCALED.fault]}"
    assert f"\nvllm: differs. A: b. C.\n{remedy}\n  not checked:\n  - d; e\n" in shown.getvalue()
