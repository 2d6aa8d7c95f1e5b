"""`fold --check-error`: which folds it accepts, on which prompts it runs them, and in how much memory."""

from __future__ import annotations

import math
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from loraover import LoraOverConfig, OverParameterization
from loraover.adapters import prompts as prompts_module
from loraover.adapters.prompts import logits_of
from loraover.adapters.verdict import ELEMENTS_AT_ONCE, RunningDeviation, verdict_on
from loraover_export.fold import check_outputs as check_outputs_module

from support.faults import Fold
from support.fold_cases import Q_B, certificate, load_base
from support.make_checkpoint import LINEAR, Made, edit_tensors, make_checkpoint, oracle_matrices, reseal, save
from support.refusals import fold
from support.tiny_models import VOCABULARY, tiny_llama, with_lora

pytestmark = pytest.mark.process


@pytest.mark.parametrize(
    ("training", "dtype"), [(torch.float32, "bf16"), (torch.float32, "fp16"), (torch.bfloat16, "fp32")]
)
def test_check_error_accepts_every_type(training: torch.dtype, dtype: str, tmp_path: Path) -> None:
    """`test_fold.py` has every kind of LoRA and every decomposition in fp32."""
    made = make_checkpoint(tmp_path, dtype=training, target_modules=LINEAR)
    assert fold(made.path, tmp_path / "out", "--check-error", "--dtype", dtype) == 0
    outputs = certificate(tmp_path / "out").outputs
    assert outputs is not None
    assert outputs.adapter_effect > 5 * outputs.bound


def test_check_error_accepts_a_deep_chain(tmp_path: Path) -> None:
    """The reference applies eight cores, the folded adapter two matrices; their difference is not an error of the fold.

    Between the cores, bonds are stretched in some directions and shrunk again, which changes no matrix, and multiplies
    what a reference in float32 would round away.
    """
    config = LoraOverConfig(decomposition="chain", options={"depth": 8}, seed=0)
    made = make_checkpoint(tmp_path, config=config, target_modules=LINEAR, tokenizer=True)
    rng = np.random.default_rng(0)

    def turn(found: dict[str, Tensor]) -> None:
        for site in dict.fromkeys(key.rpartition(".core.")[0] for key in found if ".core." in key):
            for k in range(7):
                left, right = f"{site}.core.{k}", f"{site}.core.{k + 1}"
                p, q = (np.linalg.qr(rng.standard_normal((found[left].shape[1],) * 2))[0] for _ in range(2))
                gauge = torch.from_numpy(p * 2.0 ** rng.integers(-3, 4, len(p)) @ q)
                found[left] = (found[left].double() @ gauge).float()
                found[right] = torch.linalg.solve(gauge, found[right].double()).float()

    edit_tensors(made.path / "loraover.safetensors", turn)
    matrices = {key: torch.from_numpy(matrix).float() for key, matrix in oracle_matrices(made.path).items()}
    edit_tensors(made.path / "adapter_model.safetensors", lambda found: found.update(matrices))
    reseal(made.path)
    assert fold(made.path, tmp_path / "out", "--check-error") == 0


def test_check_error_is_inconclusive_of_an_adapter_too_weak_for_it(
    tmp_path: Path, wrong_fold: Fold, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its change of the logits is less than rounding's, so that its loss would pass. The fold is left in place."""
    made = make_checkpoint(tmp_path / "made", lora_alpha=1e-6, tokenizer=True)
    wrong_fold(lambda folder: edit_tensors(folder / "adapter_model.safetensors", lambda found: found[Q_B].zero_()))
    assert fold(made.path, tmp_path / "out", "--check-error", "--dtype", "bf16") == 3
    out = capsys.readouterr().out
    assert "fold inconclusive" in out
    assert f"wrote {tmp_path / 'out'}" in out
    found = certificate(tmp_path / "out")
    assert found.verdict == "inconclusive"
    assert found.outputs is not None
    assert 0 < found.outputs.adapter_effect < 2 * found.outputs.bound


@pytest.mark.parametrize(
    ("error", "bound", "effect", "verdict"),
    [
        (1.0, 1.0, 2.0, "passed"),
        (1.0, 1.0, 1.99, "inconclusive"),
        (1.0, 1.0, math.nan, "inconclusive"),
        (1.01, 1.0, 9.0, "failed"),
        (1.01, 1.0, 0.0, "failed"),
        (0.0, 0.0, 1e-9, "passed"),
        (0.0, 0.0, 0.0, "inconclusive"),
    ],
)
def test_a_verdict_is_conclusive_if_the_adapters_loss_would_be_noticed(
    error: float, bound: float, effect: float, verdict: str
) -> None:
    assert verdict_on(error, bound, effect) == verdict


def test_logits_that_are_no_numbers_fail() -> None:
    assert verdict_on(float("nan"), 1.0, 9.0) == "failed"
    found = torch.ones(3, 5)
    running = RunningDeviation()
    for other in (found, found.index_fill(1, torch.tensor(2), float("nan")), found):
        running.add(found, other)
    assert math.isnan(running.result().max_logit)


def test_logits_that_are_compared_in_pieces_have_the_same_deviation() -> None:
    """As many as are compared at once, and half as many again."""
    rows, draw = ELEMENTS_AT_ONCE // 512, torch.Generator().manual_seed(0)
    one, other = (torch.randn(3 * rows // 2, 512, generator=draw) for _ in range(2))
    whole, pieces = RunningDeviation(), RunningDeviation()
    whole.add(one, other)
    for k in range(0, len(one), rows // 4):
        pieces.add(one[k : k + rows // 4], other[k : k + rows // 4])
    assert pieces.result().model_dump() == pytest.approx(whole.result().model_dump(), rel=1e-12)
    assert whole.result().max_logit == float((one.double() - other.double()).abs().max())


def test_check_error_needs_room_for_noise(made: Made, tmp_path: Path) -> None:
    """The verdict is the measured noise's, not a constant: with less of it, the same outputs fail."""
    assert fold(made.path, tmp_path / "out", "--check-error") == 0
    outputs = certificate(tmp_path / "out").outputs
    assert outputs is not None
    less = outputs.noise.model_copy(update={"max_logit": 1e-3 * outputs.noise.max_logit})
    assert outputs.model_copy(update={"noise": less}).verdict == "failed"


def test_prompts_are_read_one_a_line(made: Made, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the train leaves at nine\n\n   \na farmer has 17 sheep\nred\n")
    assert fold(made.path, tmp_path / "out", "--check-error", "--prompts", str(prompts)) == 0
    outputs = certificate(tmp_path / "out").outputs
    assert outputs is not None
    assert (outputs.prompts, outputs.tokens) == (3, 5 + 5 + 1)
    assert outputs.prompt_source == "3 of the prompts of prompts.txt"


@pytest.fixture
def live_logits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Elements of all logits that are held whenever a model has been run."""
    seen: list[int] = []
    held: dict[int, int] = {}
    run_model = logits_of

    def counted(*arguments: Any) -> Tensor:
        found = run_model(*arguments)
        held[id(found)] = found.numel()
        weakref.finalize(found, held.pop, id(found))
        seen.append(sum(held.values()))
        return found

    monkeypatch.setattr(check_outputs_module, "logits_of", counted)
    return seen


@pytest.mark.parametrize(("count", "batches"), [(2, 1), (30, 8)])
def test_memory_does_not_grow_with_the_prompts(
    count: int, batches: int, made: Made, tmp_path: Path, live_logits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most the three twins' logits of as many prompts as run at once, four here."""
    monkeypatch.setitem(prompts_module.LOGITS_AT_ONCE, "cpu", 20 * VOCABULARY)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the train leaves at nine\n" * count)
    assert fold(made.path, tmp_path / "out", "--check-error", "--prompts", str(prompts), "--device", "cpu") == 0
    assert len(live_logits) == 6 * batches
    assert max(live_logits) == 3 * min(4, count) * 5 * VOCABULARY
    outputs = certificate(tmp_path / "out").outputs
    assert outputs is not None
    assert (outputs.prompts, outputs.tokens, outputs.compared_tokens) == (count, 5 * count, 5 * count)


def test_memory_does_not_grow_with_a_long_prompt(
    made: Made, tmp_path: Path, live_logits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces give the same figures as one pass, but for the rounding of other sums."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the train leaves at nine and a farmer has 17 sheep red blue " * 3)
    options = ("--check-error", "--prompts", str(prompts), "--dtype", "bf16", "--device", "cpu")
    assert fold(made.path, tmp_path / "whole", *options) == 0
    assert max(live_logits) == 3 * 39 * VOCABULARY
    live_logits.clear()
    monkeypatch.setitem(prompts_module.LOGITS_AT_ONCE, "cpu", 5 * VOCABULARY)
    assert fold(made.path, tmp_path / "pieces", *options) == 0
    assert max(live_logits) == 3 * 5 * VOCABULARY
    assert len(live_logits) == 6 * 8
    whole, pieces = (certificate(tmp_path / name).outputs for name in ("whole", "pieces"))
    assert whole is not None
    assert pieces is not None
    assert (pieces.prompts, pieces.tokens) == (1, 39)
    for one, other in ((whole.error, pieces.error), (whole.noise, pieces.noise)):
        assert one.model_dump() == pytest.approx(other.model_dump(), rel=1e-2)
    assert pieces.adapter_effect == pytest.approx(whole.adapter_effect, rel=1e-5)


def test_the_base_model_is_left_as_it_was_by_an_adapter_with_biases(tmp_path: Path) -> None:
    """PEFT loads them into the base model, on whose weights the unfolded model and the plain one run too."""
    made = make_checkpoint(tmp_path, bias="all", base_options={"attention_bias": True}, tokenizer=True)
    key = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias"
    edit_tensors(made.path / "adapter_model.safetensors", lambda found: found.update({key: found[key] + 1.0}))
    reseal(made.path)
    assert fold(made.path, tmp_path / "out", "--check-error") == 0
    outputs = certificate(tmp_path / "out").outputs
    assert outputs is not None
    model = PeftModel.from_pretrained(load_base(made), made.path).eval()
    ids = torch.tensor([[4, 5, 6]])
    with torch.no_grad():
        effect = float((model(input_ids=ids).logits - load_base(made)(input_ids=ids).logits).abs().max())
    assert outputs.adapter_effect > 0.1 * effect > 10 * outputs.bound


def test_check_error_of_a_classifier_takes_the_number_of_labels_from_the_adapter(tmp_path: Path) -> None:
    """The base model has no classification head and no padding token; the adapter brings a head of three labels."""
    tiny_llama(pad_token_id=None).save_pretrained(tmp_path / "base")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    adapted = with_lora(model, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")
    save(tmp_path / "made", adapted, OverParameterization(adapted, LoraOverConfig(seed=5)), step=0)
    assert fold(tmp_path / "made", tmp_path / "out", "--check-error") == 0
    outputs = certificate(tmp_path / "out").outputs
    assert outputs is not None
    assert outputs.error.max_logit <= outputs.bound < outputs.adapter_effect / 5
