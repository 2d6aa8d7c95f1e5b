"""What a fold says of itself: its certificate, against the oracles, and its card."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from loraover import LoraOverConfig
from loraover.checkpoint.peft_adapter import site_key
from loraover.overparam.decompositions import DECOMPOSITIONS
from loraover_export.fold.certificate import FoldCertificate

from oracles.contraction import Array
from support.fold_cases import HALF, certificate, tensors
from support.make_checkpoint import LINEAR, Made, make_checkpoint, numpy64, oracle_matrices
from support.refusals import fold

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """An MPO checkpoint in fp32 on q_proj and v_proj; tests read it only."""
    return make_checkpoint(tmp_path_factory.mktemp("made"), tokenizer=True)


@pytest.mark.parametrize(
    ("decomposition", "dtype"), [*((name, "bf16") for name in DECOMPOSITIONS), ("mpo", "fp32"), ("mpo", "fp16")]
)
def test_the_certificate_states_the_true_error_below_a_true_bound(
    dtype: str, decomposition: str, tmp_path: Path
) -> None:
    config = LoraOverConfig(decomposition=decomposition, sites=["*.lora_A", "*.q_proj.lora_B"], seed=5)
    made = make_checkpoint(tmp_path, config=config, target_modules=LINEAR)
    assert fold(made.path, tmp_path / "out", "--dtype", dtype) == 0
    found, exact, written = certificate(tmp_path / "out"), oracle_matrices(made.path), tensors(tmp_path / "out")
    assert found.verdict == "passed"
    assert (found.dtype, found.decomposition, found.step, found.seed) == (dtype, decomposition, 2, 5)
    assert found.base_model == str(made.base)
    assert found.outputs is None
    stored = tensors(made.path)
    assert [site_key(m.name) for m in found.matrices] == list(stored)
    for matrix in found.matrices:
        key = site_key(matrix.name)
        assert matrix.over_parameterised == (key in exact)
        assert matrix.shape == tuple(stored[key].shape)
        reference: Array = exact.get(key, numpy64(stored[key]))
        error = np.linalg.norm(numpy64(written[key]) - reference) / np.linalg.norm(reference)
        assert matrix.relative_error == pytest.approx(error, rel=1e-5, abs=1e-13)
        assert matrix.relative_error <= matrix.relative_bound
        assert 0 <= matrix.worst_to_bound <= 1
        # one rounding to nearest is at most u |M|, and fp16 loses up to half a subnormal
        u, tiny = HALF[dtype], {"fp32": 2.0**-150, "bf16": 2.0**-134, "fp16": 2.0**-25}[dtype]
        assert matrix.relative_bound < 1.001 * np.linalg.norm(u * abs(reference) + tiny) / np.linalg.norm(reference)


def test_an_unknown_field_is_no_certificate(made: Made, tmp_path: Path) -> None:
    assert fold(made.path, tmp_path / "out") == 0
    text = (tmp_path / "out" / "fold_certificate.json").read_text()
    with pytest.raises(ValidationError):
        FoldCertificate.model_validate({**json.loads(text), "extra": 1})


def test_the_card_names_the_base_its_licence_the_command_and_the_figures(tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path)
    (made.base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert fold(made.path, tmp_path / "out", "--dtype", "bf16") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'license: "apache-2.0"' in card
    assert f'base_model: "{made.base}"' in card
    assert f"loraover export fold {made.path} -o {tmp_path / 'out'} --dtype bf16" in card
    assert "8 of 8 within their bounds" in card
