"""Adapters of a smaller rank: every error is the tail of NumPy's singular values of the dense delta."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from loraover.common.command_line import run
from loraover_export import combine_adapters, convert_adapter, export_vllm, shrink_adapter
from loraover_export.cli import cli

from support.adapters_on_disk import Array, deltas, save_base, save_lora
from support.make_checkpoint import edit_json, edit_tensors
from support.merge_cases import outputs
from support.refusals import Refused
from support.tiny_llava import llava_of_transformers_4
from tolerances import UNIT

STORED = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SMALLER = {"q_proj": 2, "o_proj": 3}
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model and adapters that tests only read."""
    folder = tmp_path_factory.mktemp("made")
    base = save_base(folder / "base")
    save_lora(base, folder / "plain", 1, r=8)
    save_lora(base, folder / "bf16", 2, torch.bfloat16, r=5)
    save_lora(base, folder / "patterns", 3, r=8, rank_pattern=SMALLER, alpha_pattern={"down_proj": 7})
    save_lora(base, folder / "embedding", 4, r=7, target_modules=["embed_tokens", "v_proj"], use_rslora=True)
    return folder


def tail(matrix: Array, rank: int) -> float:
    return float(np.linalg.norm(np.linalg.svd(matrix, compute_uv=False)[rank:]))


def halves(source: Path, output: Path, base: Path) -> None:
    combine_adapters([source, source], output, weights=[0.25, 0.75])


def whole(source: Path, output: Path, base: Path) -> None:
    """Take half of the rank, of which half is zero."""

    def double(found: dict[str, Tensor]) -> None:
        for key, matrix in found.items():
            found[key] = torch.cat([matrix, torch.zeros_like(matrix)], 0 if "lora_A" in key else 1)

    edit_tensors(source / TENSORS, double)
    edit_json(source / CONFIG, lambda config: config.update(r=8, lora_alpha=2 * config["lora_alpha"]))
    shrink_adapter(source, output, rank=4)


def for_vllm(source: Path, output: Path, base: Path) -> None:
    assert export_vllm(source, output, model=base, dtype="fp32").passed


def converted(source: Path, output: Path, base: Path) -> None:
    assert convert_adapter(source, output, model=base).certificate.passed


BOTH, TEXT = ("q_proj", "down_proj"), r".*language_model.*\.(q_proj|down_proj)"


@pytest.mark.parametrize(
    ("verb", "targets"),
    [(halves, BOTH), (whole, BOTH), (whole, TEXT), (for_vllm, TEXT), (converted, BOTH), (converted, TEXT)],
)
def test_peft_reads_modules_that_an_earlier_transformers_named(
    verb: Callable[[Path, Path, Path], None], targets: Any, tmp_path: Path
) -> None:
    """PEFT renames the keys of LLaVA's adapters, and finds no module by an old path in target_modules."""
    source, base = llava_of_transformers_4(tmp_path, targets), tmp_path / "base"

    def logits(adapter: Path) -> Tensor:
        return outputs(PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(base), adapter))

    expected = logits(source)
    verb(source, tmp_path / "out", base)
    allowed = 64 * UNIT[torch.float32] * float(expected.abs().max())
    assert float((logits(tmp_path / "out") - expected).abs().max()) <= allowed
    before = outputs(LlavaForConditionalGeneration.from_pretrained(base))
    assert float((before - expected).abs().max()) > 100 * allowed


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("plain", "fp32"), ("plain", "bf16"), ("bf16", "fp32"), ("patterns", "fp16"), ("embedding", "bf16")],
)
@pytest.mark.parametrize("rank", [1, 3])
def test_every_error_is_the_tail(rank: int, name: str, dtype: str, made: Path, tmp_path: Path) -> None:
    certificate = shrink_adapter(made / name, tmp_path / "out", rank=rank, dtype=dtype)
    before, after = deltas(made / name), deltas(tmp_path / "out")
    assert before.keys() == after.keys()
    assert certificate.rank == rank
    for module in certificate.modules:
        exact, written = before[module.module], after[module.module]
        own = SMALLER.get(module.module.rpartition(".")[2], 9) if name == "patterns" else 9
        allowed = module.arithmetic_bound + 1e-13 * module.norm
        assert abs(module.truncation_error - tail(exact, rank)) <= allowed
        assert abs(np.linalg.norm(exact - written) - module.truncation_error) <= module.storage_error + allowed
        if own <= rank:  # nothing else than rounding A and B
            assert module.storage_error == pytest.approx(float(np.linalg.norm(exact - written)), rel=1e-6)
        assert module.norm == pytest.approx(float(np.linalg.norm(exact)), rel=1e-12)
        assert module.arithmetic_bound <= 1e-11 * module.norm
        assert module.storage_error <= 16 * UNIT[STORED[dtype]] * module.norm
        assert module.rank == min(rank, own)
        assert (module.truncation_error == 0) == (own <= rank)


@pytest.mark.parametrize(("name", "energy"), [("plain", 0.5), ("embedding", 0.9)])
def test_every_module_keeps_its_energy_with_the_smallest_rank(
    name: str, energy: float, made: Path, tmp_path: Path
) -> None:
    certificate = shrink_adapter(made / name, tmp_path / "out", energy=energy)
    shares = {}
    for module, delta in deltas(made / name).items():
        squares = np.linalg.svd(delta, compute_uv=False) ** 2
        shares[module] = np.cumsum(squares) / squares.sum()
    assert certificate.rank == max(int((share < energy).sum()) + 1 for share in shares.values())
    for found in certificate.modules:
        assert 1 - (found.truncation_error / found.norm) ** 2 >= energy
        assert found.rank == certificate.rank


def zero_b(found: dict[str, Any]) -> None:
    found.update({key: 0 * tensor for key, tensor in found.items() if "lora_B" in key})


REFUSED: dict[str, tuple[Any, list[str], str]] = {
    "nothing asked": (None, [], "give either --rank or --energy"),
    "energy 1": (None, ["--energy", "1"], "--energy is 1.0, expected a share between 0 and 1"),
    "energy NaN": (None, ["--energy", "nan"], "expected a share between 0 and 1"),
    "not smaller": (None, ["--rank", "8"], "its rank is 8, so there is nothing to shrink to 8"),
    "needs all": (None, ["--energy", "0.9999999"], "needs all of its rank, 8, to keep 0.9999999 of its squared norm"),
    "untrained": (zero_b, ["--rank", "2"], "every delta_W is zero"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input(case: str, made: Path, tmp_path: Path, refused: Refused) -> None:
    change, options, message = REFUSED[case]
    source = shutil.copytree(made / "plain", tmp_path / "source")
    if change is not None:
        edit_tensors(source / TENSORS, change)
    refused("shrink", source, *options, named=(message,))


@pytest.mark.parametrize("field", [{"use_dora": True}, {"peft_type": "LOHA"}], ids=str)
def test_other_adapters_are_refused(field: dict[str, Any], made: Path, tmp_path: Path, refused: Refused) -> None:
    source = shutil.copytree(made / "plain", tmp_path / "source")
    edit_json(source / CONFIG, lambda config: config.update(field))
    refused("shrink", source, "--rank", 2, named=tuple(field))


def test_the_command_shows_what_each_module_loses(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert run(cli, ["shrink", str(made / "plain"), "-o", str(tmp_path / "out"), "--rank", "2", "--json"]) == 0
    out, err = capsys.readouterr()
    modules = json.loads(out)["modules"]
    assert len(modules) == 14
    worst = max(modules, key=lambda module: module["truncation_error"] / module["norm"])
    row = next(line for line in err.splitlines() if worst["module"] in line)
    assert f"{worst['truncation_error'] / worst['norm']:.2%}" in row
    assert "…" not in err
    assert json.loads((tmp_path / "out" / "lora_certificate.json").read_text()) == json.loads(out)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"loraover export shrink {made / 'plain'} -o {tmp_path / 'out'} --rank 2\n" in card
