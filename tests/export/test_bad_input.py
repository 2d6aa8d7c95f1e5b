"""A fold that cannot be done ends in one message and exit code 2, with the input untouched and no output."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

from loraover import LoraOverConfig
from loraover.common.command_line import INTERRUPTED, run
from loraover.common.strict_json import MAX_JSON_BYTES
from loraover_export.cli import cli

from support.children import Child, become_nobody, limit_file_size
from support.make_checkpoint import Made, edit_json, edit_tensors, make_checkpoint, reseal, tree
from support.tiny_models import tiny_gpt2, tiny_llama

pytestmark = pytest.mark.process

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
META, CORES = "loraover.json", "loraover.safetensors"
FILES = [CONFIG, TENSORS, META, CORES]
WHOLE = {CONFIG, TENSORS, "fold_certificate.json", "README.md"}
MODULE = "model.layers.0.self_attn.q_proj"
Q_A, Q_B = (f"base_model.model.{MODULE}.lora_{kind}.weight" for kind in "AB")
CORE = f"{MODULE}.lora_A.core.1"

Damage = Callable[[Path], object]


def fold(source: Path, output: Path, *options: str) -> int:
    return run(cli, ["fold", str(source), "-o", str(output), *options])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Tests copy it before they damage it."""
    return make_checkpoint(tmp_path_factory.mktemp("made"), tokenizer=True)


@pytest.fixture
def source(made: Made, tmp_path: Path) -> Path:
    return shutil.copytree(made.path, tmp_path / "input")


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Folds, and checks all that a refusal promises; `named` must be in the message."""

    def check(source: Path, *options: str, named: tuple[str, ...] = (), output: Path | None = None) -> str:
        before = tree(tmp_path)
        capsys.readouterr()
        code = fold(source, tmp_path / "out" if output is None else output, *options)
        out, err = capsys.readouterr()
        assert code == 2, out + err
        assert tree(tmp_path) == before
        message = one_message(err)
        for text in named:
            assert text in message
        return message

    return check


def one_message(err: str) -> str:
    """The only line of an error stream, without the "error: " in front."""
    assert "Traceback" not in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert len(err) < 2000
    return err.removeprefix("error: ").strip()


def only_error(err: str) -> str:
    """The first line of our one error; transformers' own words may stand around it."""
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


# Files that are missing, cut off or not what they should be


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_named(file: str, source: Path, refused: Callable[..., str]) -> None:
    (source / file).unlink()
    refused(source, named=(str(source / file), "no such file"))


@pytest.mark.parametrize("file", FILES)
def test_a_folder_in_a_files_place_is_named(file: str, source: Path, refused: Callable[..., str]) -> None:
    (source / file).unlink()
    (source / file).mkdir()
    refused(source, named=(str(source / file),))


def test_a_missing_folder_is_named(tmp_path: Path, refused: Callable[..., str]) -> None:
    refused(tmp_path / "absent", named=(f"{tmp_path / 'absent'}: no such folder",))


def test_a_file_is_no_checkpoint(source: Path, refused: Callable[..., str]) -> None:
    refused(source / TENSORS, named=(f"{source / TENSORS}: no such folder",))


def test_a_plain_adapter_is_no_checkpoint(source: Path, refused: Callable[..., str]) -> None:
    (source / META).unlink()
    (source / CORES).unlink()
    refused(source, named=(str(source / META), "holds a plain LoRA without the cores", "output_dir"))


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 100, 0.3, 0.9, -1])
@pytest.mark.parametrize("file", FILES)
def test_a_truncated_file_is_named(file: str, kept: float, source: Path, refused: Callable[..., str]) -> None:
    content = (source / file).read_bytes()
    (source / file).write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    refused(source, named=(str(source / file),))


@pytest.mark.parametrize("file", FILES)
def test_a_longer_file_is_named(file: str, source: Path, refused: Callable[..., str]) -> None:
    with (source / file).open("ab") as appended:
        appended.write(b"\0" * 3)
    refused(source, named=(str(source / file),))


@pytest.mark.parametrize("file", FILES)
def test_flipped_bytes_are_refused_or_change_nothing(
    file: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fold(source, tmp_path / "out") == 0  # the card names the output
    expected = tree((tmp_path / "out").rename(tmp_path / "expected"))
    content = (source / file).read_bytes()
    draw = random.Random(file)
    positions = [*range(12), *draw.sample(range(12, len(content)), 150)]
    refusals = 0
    for position in positions:
        flipped = bytearray(content)
        flipped[position] ^= draw.randrange(1, 256)
        (source / file).write_bytes(flipped)
        capsys.readouterr()
        if fold(source, tmp_path / "out") == 0:
            assert tree(tmp_path / "out") == expected, position
            shutil.rmtree(tmp_path / "out")
            continue
        refusals += 1
        message = one_message(capsys.readouterr().err)
        assert str(source) in message, position
        assert set(tree(tmp_path)) & {"out"} == set()
    assert refusals > 0.95 * len(positions)


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "weights.pth", "adapter_model.pkl"])
@pytest.mark.parametrize("without", [[TENSORS], [TENSORS, META, CORES]], ids=len)
def test_a_pickle_is_refused_and_never_unpickled(
    without: list[str], name: str, source: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (source / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    for file in without:
        (source / file).unlink()
    refused(source, named=(str(source / TENSORS), name, "never read"))


@pytest.mark.parametrize("file", [TENSORS, CORES])
def test_a_pickle_under_a_safetensors_name_is_refused(
    file: str, source: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    torch.save({"a": torch.ones(2), "b": Bomb(tmp_path / "exploded")}, source / file)
    refused(source, named=(str(source / file), "safetensors"))


def test_a_base_model_that_is_a_pickle_is_refused(
    made: Made, source: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    base = shutil.copytree(made.base, tmp_path / "base")
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    refused(source, "--check-error", "--base", str(base), named=(str(base),))


# Tensors that are not the checkpoint's; every checksum is made right again, so that the check itself is met


def changed(file: str, change: Callable[[dict[str, Tensor]], object]) -> Damage:
    return lambda folder: edit_tensors(folder / file, change)


def replaced(file: str, key: str, change: Callable[[Tensor], Tensor]) -> Damage:
    return changed(file, lambda tensors: tensors.update({key: change(tensors[key])}))


def element(value: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(value, dtype=tensor.dtype))


def added(key: str, *shape: int, dtype: torch.dtype = torch.float32) -> Damage:
    return changed(TENSORS, lambda tensors: tensors.update({key: torch.ones(shape).to(dtype)}))


def retyped(file: str, key: str, dtype: torch.dtype) -> Damage:
    return replaced(file, key, lambda tensor: tensor.to(dtype))


Z_A, Z_B = "base_model.model.z.lora_A.weight", "base_model.model.z.lora_B.weight"


def added_pair(in_features: int, dtype: torch.dtype = torch.float32) -> Damage:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[Z_A] = torch.ones(4, in_features).to(dtype)
        tensors[Z_B] = torch.ones(3, 4).to(dtype)

    return changed(TENSORS, change)


ODD_DTYPES = (torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn)
WRONG_TENSORS: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "core transposed": (replaced(CORES, CORE, lambda core: core.T), (CORES, CORE)),
    "core widened": (replaced(CORES, CORE, lambda core: torch.cat([core, core])), (CORES, CORE)),
    "core a vector": (replaced(CORES, CORE, lambda core: core[0]), (CORES, CORE)),
    "core missing": (changed(CORES, lambda tensors: tensors.pop(CORE)), (CORES, CORE)),
    "core nan": (replaced(CORES, CORE, element(float("nan"))), (CORES, CORE, "NaN")),
    "core inf": (replaced(CORES, CORE, element(float("inf"))), (CORES, CORE, "infinity")),
    "core -inf": (replaced(CORES, CORE, element(float("-inf"))), (CORES, CORE, "infinity")),
    "core doubled": (replaced(CORES, CORE, lambda core: core * 2), (TENSORS, Q_A, "contradicts its cores")),
    "core element": (replaced(CORES, CORE, lambda core: element(-float(core[1, 2]))(core)), (TENSORS, Q_A)),
    "core zero": (replaced(CORES, CORE, torch.zeros_like), (TENSORS, Q_A, "contradicts")),
    "A nan": (replaced(TENSORS, Q_A, element(float("nan"))), (TENSORS, Q_A, "NaN")),
    "B inf": (replaced(TENSORS, Q_B, element(float("inf"))), (TENSORS, Q_B, "infinity")),
    "A scaled": (replaced(TENSORS, Q_A, lambda a: a * 1.001), (TENSORS, Q_A, "contradicts its cores: element (")),
    "B scaled": (replaced(TENSORS, Q_B, lambda b: b * 0.999), (TENSORS, Q_B, "contradicts its cores: element (")),
    "A element": (replaced(TENSORS, Q_A, element(0.5)), (TENSORS, Q_A, "element (1, 2) is 0.5, the cores give")),
    "B zero": (replaced(TENSORS, Q_B, torch.zeros_like), (TENSORS, Q_B, "contradicts")),
    "A permuted": (replaced(TENSORS, Q_A, lambda a: a[[1, 0, 2, 3]]), (TENSORS, Q_A, "contradicts")),
    "A missing": (changed(TENSORS, lambda tensors: tensors.pop(Q_A)), (TENSORS, Q_B, "no A beside it")),
    "B missing": (changed(TENSORS, lambda tensors: tensors.pop(Q_B)), (TENSORS, Q_A, "no B beside it")),
    "A transposed": (replaced(TENSORS, Q_A, lambda a: a.T), (TENSORS, Q_A)),
    "A narrower": (replaced(TENSORS, Q_A, lambda a: a[:, :16]), (TENSORS, Q_A)),
    "A three-dimensional": (replaced(TENSORS, Q_A, lambda a: a[None]), (TENSORS, Q_A, "expected a matrix")),
    "B of another rank": (replaced(TENSORS, Q_B, lambda b: b[:, :3]), (TENSORS, Q_B, "rank 3")),
    "no LoRA layers": (
        changed(
            TENSORS, lambda tensors: [tensors.pop(key) for key in list(tensors)] and tensors.update(a=torch.ones(2))
        ),
        (TENSORS, "no LoRA layers"),
    ),
    "no tensors": (changed(TENSORS, dict.clear), (TENSORS, "no LoRA layers")),
    "saved module nan": (
        changed(TENSORS, lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.ones(2, 2) / 0})),
        (TENSORS, "lm_head", "infinity"),
    ),
    **{f"A {dtype}": (retyped(TENSORS, Q_A, dtype), (TENSORS, Q_A)) for dtype in ODD_DTYPES},
    **{f"core {dtype}": (retyped(CORES, CORE, dtype), (CORES, CORE)) for dtype in ODD_DTYPES},
    **{f"pair {dtype}": (added_pair(3, dtype), (TENSORS, "base_model.model.z.lora_")) for dtype in ODD_DTYPES},
    "core of another float": (retyped(CORES, CORE, torch.float64), (CORES, CORE, "float64")),
    "saved module float8": (
        added("base_model.model.lm_head.weight", 2, 2, dtype=torch.float8_e4m3fn),
        (TENSORS, "lm_head"),
    ),
    "empty pair": (added_pair(0), (TENSORS, Z_A)),
}


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_wrong_tensors_are_named(case: str, source: Path, refused: Callable[..., str]) -> None:
    damage, named = WRONG_TENSORS[case]
    damage(source)
    reseal(source)
    refused(source, named=(str(source), *named))


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_wrong_tensors_are_damage_when_the_checksums_say_so(
    case: str, source: Path, refused: Callable[..., str]
) -> None:
    damage, _ = WRONG_TENSORS[case]
    damage(source)
    refused(source, named=(str(source),))


# JSON that is hostile or plainly wrong


def raw(file: str, old: str, new: str) -> Damage:
    """Replaces text, for JSON that Python's `json` would not write."""

    def change(folder: Path) -> None:
        text = (folder / file).read_text()
        assert old in text
        (folder / file).write_text(text.replace(old, new, 1))

    return change


def config(**values: Any) -> Damage:
    return lambda folder: edit_json(folder / CONFIG, lambda content: content.update(values))


def meta(**values: Any) -> Damage:
    return lambda folder: edit_json(folder / META, lambda content: content.update(values))


def over(**values: Any) -> Damage:
    return lambda folder: edit_json(folder / META, lambda content: content["config"].update(values))


def mpo(**options: Any) -> Damage:
    return over(options=options)


def chain(**options: Any) -> Damage:
    return over(decomposition="chain", options=options)


def site(**values: Any) -> Damage:
    return lambda folder: edit_json(folder / META, lambda content: content["sites"][0].update(values))


def written(file: str, content: bytes) -> Damage:
    return lambda folder: (folder / file).write_bytes(content)


NAN, INFINITY = float("nan"), float("inf")
DEEP = "[" * 10_000 + "]" * 10_000
HUGE = "9" * 5001

WRONG_CONFIG: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "DoRA": (config(use_dora=True), ("use_dora is true",)),
    "PiSSA": (config(init_lora_weights="pissa"), ("init_lora_weights is 'pissa'", "path_initial_model")),
    "IA3": (config(peft_type="IA3"), ("'IA3'", "'LORA'")),
    "no peft_type": (
        lambda folder: edit_json(folder / CONFIG, lambda content: content.pop("peft_type")),
        ("peft_type",),
    ),
    "another rank": (config(r=3), ("rank 3", Q_A)),
    "r negative": (config(r=-4), ("r: ",)),
    "r zero": (config(r=0), ("r: ",)),
    "r a list": (config(r=[4]), ("r: ",)),
    "r null": (config(r=None), ("r: ",)),
    "r a fraction": (config(r=4.5), ("r: ",)),
    "r text": (config(r="4"), ("r: ",)),
    "r true": (config(r=True), ("r",)),
    "r large": (raw(CONFIG, '"r": 4', f'"r": {"9" * 40}'), ("rank",)),
    "r huge": (raw(CONFIG, '"r": 4', f'"r": {HUGE}'), ()),
    "alpha text": (config(lora_alpha="8"), ("lora_alpha: ",)),
    "alpha true": (config(lora_alpha=True), ("lora_alpha: ",)),
    "alpha null": (config(lora_alpha=None), ("lora_alpha: ",)),
    "alpha NaN": (config(lora_alpha=NAN), ()),
    "alpha Infinity": (config(lora_alpha=INFINITY), ()),
    "alpha 1e999": (raw(CONFIG, '"lora_alpha": 8', '"lora_alpha": 1e999'), ()),
    "use_rslora text": (config(use_rslora="off"), ("use_rslora: ",)),
    "use_rslora number": (config(use_rslora=1), ("use_rslora: ",)),
    "use_dora text": (config(use_dora="off"), ("use_dora: ",)),
    "rank_pattern list": (config(rank_pattern=[4]), ("rank_pattern: ",)),
    "rank_pattern text": (config(rank_pattern={"q_proj": "x"}), ("rank_pattern.q_proj: ",)),
    "rank_pattern zero": (config(rank_pattern={"q_proj": 0}), ("rank",)),
    "rank_pattern no pattern": (config(rank_pattern={"(": 4}), ("rank_pattern",)),
    "alpha_pattern no pattern": (config(alpha_pattern={"[": 4.0}), ("alpha_pattern",)),
    "alpha_pattern NaN": (config(alpha_pattern={"q_proj": NAN}), ()),
    "base a number": (config(base_model_name_or_path=4), ("base_model_name_or_path: ",)),
    "base edited": (config(base_model_name_or_path="x/y"), ("base_model_name_or_path is 'x/y'",)),
    "base removed": (config(base_model_name_or_path=None), ("base_model_name_or_path is None",)),
    "another field NaN": (config(loftq_config={"a": NAN}), ()),
    "another field huge": (raw(CONFIG, '"bias"', f'"a": {HUGE}, "bias"'), ()),
    "another field 1e999": (raw(CONFIG, '"bias"', '"a": 1e999, "bias"'), ()),
    "another field deep": (raw(CONFIG, '"bias"', f'"a": {DEEP}, "bias"'), ()),
    "another field a lone surrogate": (raw(CONFIG, '"bias"', '"a": "\\ud800", "bias"'), ()),
    "duplicate key": (raw(CONFIG, '"r": 4', '"r": 8, "r": 4'), ("r",)),
    "duplicate key elsewhere": (raw(CONFIG, '"bias"', '"a": {"b": 1, "b": 2}, "bias"'), ("b",)),
}

WRONG_META: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "schema 1": (meta(schema_version=1), ("schema_version is 1", "reads 2")),
    "schema 3": (meta(schema_version=3), ("schema_version is 3", "reads 2")),
    "no rounds": (lambda folder: edit_json(folder / META, lambda c: c.pop("rounds")), ("rounds: ",)),
    "schema large": (raw(META, '"schema_version": 2', f'"schema_version": {"9" * 40}'), ("schema_version",)),
    "schema huge": (raw(META, '"schema_version": 2', f'"schema_version": {HUGE}'), ()),
    "schema null": (meta(schema_version=None), ("schema_version: ",)),
    "schema text": (meta(schema_version="one"), ("schema_version: ",)),
    "no schema": (lambda folder: edit_json(folder / META, lambda c: c.pop("schema_version")), ("schema_version: ",)),
    "another format": (meta(format="other"), ("format: ",)),
    "unknown key": (meta(surprise=1), ("surprise: ",)),
    "unknown site key": (site(surprise=1), ("sites.0.surprise: ",)),
    "unknown config key": (over(surprise=1), ("config.surprise: ",)),
    "step a fraction": (meta(step=2.5), ("step: ",)),
    "step negative": (meta(step=-1), ("step: ",)),
    "step text": (meta(step="2"), ()),
    "step true": (meta(step=True), ()),
    "no sites": (meta(sites=[]), ("sites: ",)),
    "sites null": (meta(sites=None), ("sites: ",)),
    "site twice": (lambda f: edit_json(f / META, lambda c: c["sites"].append(c["sites"][0])), ("sites: ",)),
    "site of no matrix": (site(name="model.layers.9.lora_A"), ("model.layers.9.lora_A",)),
    "site outside": (site(name="../../etc/passwd"), ("../../etc/passwd",)),
    "site empty": (site(name=""), ()),
    "site null": (site(name=None), ("sites.0.name: ",)),
    "site m": (site(m=5), (Q_A, "(5, 32)")),
    "site m zero": (site(m=0), ("sites.0.m: ",)),
    "site m large": (site(m=10**30), (Q_A,)),
    "site step": (site(step=-1), ("sites.0.step: ",)),
    "site state": (site(state={"a": [1]}), ("sites.0.state.a",)),
    "site state NaN": (site(state={"a": NAN}), ("NaN is not a finite number",)),
    "core_dtype": (meta(core_dtype="float16"), ("core_dtype: ",)),
    "core_dtype of other cores": (meta(core_dtype="float64"), (CORES, "float32")),
    "checksums missing": (meta(sha256={}), ()),
    "decomposition unknown": (over(decomposition="tucker"), ("'tucker'", "mpo")),
    "decomposition a list": (over(decomposition=["mpo"]), ("config.decomposition: ",)),
    "another decomposition": (over(decomposition="svd"), (CORES, "core.0")),
    "options null": (over(options=None), ("config.options: ",)),
    "options unknown": (mpo(surprise=1), ("mpo: 'surprise' is no option",)),
    "options name another decomposition": (mpo(name="svd"), ("mpo: 'name' is no option",)),
    "aux_lr_scale NaN": (over(aux_lr_scale=NAN), ("NaN is not a finite number",)),
    "seed negative": (over(seed=-1), ("config.seed: ",)),
    "seed huge": (over(seed=2**63), ("config.seed: ",)),
    "num_cores 2": (mpo(num_cores=2), ("core.",)),
    "num_cores 0": (mpo(num_cores=0), ("num_cores is 0",)),
    "num_cores a fraction": (mpo(num_cores=1.5), ("num_cores",)),
    "num_cores a float": (mpo(num_cores=3.0), ("num_cores",)),
    "num_cores text": (mpo(num_cores="3"), ("num_cores is '3'",)),
    "num_cores true": (mpo(num_cores=True), ("num_cores is True",)),
    "num_cores huge": (mpo(num_cores=10**12), ("num_cores",)),
    "modes a number": (mpo(modes=5), ("modes is 5",)),
    "modes null": (mpo(modes={"4": None}), ("modes[4] is None",)),
    "modes text": (mpo(modes={"4": ["2", 2, 1]}), ("modes[4][0] is '2'",)),
    "modes no size": (mpo(modes={"x": [1, 1, 1]}), ("modes[x]",)),
    "modes floats": (mpo(modes={"4": [2.0, 2.0, 1.0]}), ("modes",)),
    "modes negative": (mpo(modes={"4": [-2, -2, 1]}), ("modes[4]",)),
    "other modes": (mpo(modes={"4": [4, 1, 1]}), ("core.",)),
    "bonds text": (mpo(bonds=["a", "b"]), ("bonds[0] is 'a'",)),
    "bonds narrow": (mpo(bonds=[1, 1]), ("bond 1 is 1",)),
    "bonds floats": (mpo(bonds=[16.0, 16.0]), ("bonds[0] is 16.0",)),
    "bonds huge": (mpo(bonds=[10**30, 10**30]), ("core.",)),
    "expansion NaN": (mpo(expansion=NAN), ("NaN is not a finite number",)),
    "expansion text": (mpo(expansion="2"), ("expansion is '2'",)),
    "expansion true": (mpo(expansion=True), ("expansion is True",)),
    "expansion 1000": (mpo(expansion=1000), ("core.",)),
    "depth huge": (chain(depth=10**12), ("depth",)),
    "depth a fraction": (chain(depth=2.5), ("depth",)),
    "depth a float": (chain(depth=2.0), ("depth",)),
    "chain expansion": (chain(expansion=INFINITY), ("Infinity is not a finite number",)),
    "duplicate key": (raw(META, '"step": 2,', '"step": 7, "step": 2,'), ("step",)),
    "not an object": (written(META, b"[]"), ()),
}

WRONG_BYTES: dict[str, bytes] = {
    "nothing": b"",
    "blank": b" \n",
    "no JSON": b"step: 3",
    "a number": b"4",
    "null": b"null",
    "NaN": b"NaN",
    "half": b'{"format": "loraover-checkpoint", "schema_version": 1',
    "two objects": b"{} {}",
    "trailing comma": b'{"schema_version": 1,}',
    "deep": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "UTF-8 garbage": b'{"peft_type": "\xff\xfe\xc3("}',
    "UTF-16": '{"peft_type": "LORA"}'.encode("utf-16"),
    "zeros": bytes(100),
    "a huge number": HUGE.encode(),
}


@pytest.mark.parametrize("case", WRONG_CONFIG)
def test_a_wrong_adapter_config_is_named(case: str, source: Path, refused: Callable[..., str]) -> None:
    damage, named = WRONG_CONFIG[case]
    damage(source)
    reseal(source)
    refused(source, named=(str(source), CONFIG, *named))


@pytest.mark.parametrize("case", WRONG_META)
def test_wrong_metadata_is_named(case: str, source: Path, refused: Callable[..., str]) -> None:
    damage, named = WRONG_META[case]
    damage(source)
    if case not in ("schema large", "schema huge", "checksums missing", "duplicate key", "not an object"):
        reseal(source)
    message = refused(source, named=(str(source), *named))
    assert any(file in message for file in FILES)


@pytest.mark.parametrize("case", WRONG_BYTES)
@pytest.mark.parametrize("file", [CONFIG, META])
def test_bytes_that_are_no_such_json_are_named(file: str, case: str, source: Path, refused: Callable[..., str]) -> None:
    (source / file).write_bytes(WRONG_BYTES[case])
    if file == CONFIG:
        reseal(source)
    refused(source, named=(str(source / file),))


@pytest.mark.parametrize("file", [CONFIG, META])
def test_a_huge_json_file_is_not_read(file: str, source: Path, refused: Callable[..., str]) -> None:
    with (source / file).open("r+b") as grown:
        grown.truncate(MAX_JSON_BYTES + 1)
    refused(source, named=(str(source / file), str(MAX_JSON_BYTES)))


def test_a_large_json_file_is_refused_soon(source: Path, refused: Callable[..., str]) -> None:
    """100 MB of valid JSON."""
    (source / META).write_text('{"a": "' + "x" * 100_000_000 + '"}')
    before = time.process_time()
    refused(source, named=(str(source / META),))
    assert time.process_time() - before < 5


def test_control_characters_of_a_file_do_not_reach_the_terminal(source: Path, refused: Callable[..., str]) -> None:
    site(name="\x1b[31mred\r\n")(source)
    reseal(source)
    assert re.search(r"[\x00-\x08\x0b-\x1f\x7f]", refused(source)) is None


# Base models and prompts that do not fit


BASES: dict[str, Callable[[], Any]] = {
    "narrower": lambda: tiny_llama(hidden_size=16),
    "fewer heads": lambda: tiny_llama(num_key_value_heads=1),
    "fewer layers": lambda: tiny_llama(num_hidden_layers=1),
    "another architecture": tiny_gpt2,
}


@pytest.mark.parametrize("case", BASES)
def test_another_base_model_is_named(
    case: str, made: Made, source: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    BASES[case]().save_pretrained(tmp_path / "base")
    options = ("--check-error", "--base", str(tmp_path / "base"))
    refused(source, *options, named=(str(source), "self_attn", str(made.base), "--base"))


def unloadable(folder: Path, case: str) -> None:
    weights = folder / "model.safetensors"
    match case:
        case "no config":
            (folder / "config.json").unlink()
        case "no weights":
            weights.unlink()
        case "config is no JSON":
            (folder / "config.json").write_text("{")
        case "config of other dimensions":
            edit_json(folder / "config.json", lambda content: content.update(hidden_size=64))
        case "unknown architecture":
            edit_json(folder / "config.json", lambda content: content.update(model_type="unheard-of"))
        case "weights cut off":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "weights empty":
            weights.write_bytes(b"")


@pytest.mark.parametrize(
    "case",
    [
        "no config",
        "no weights",
        "config is no JSON",
        "config of other dimensions",
        "unknown architecture",
        "weights cut off",
        "weights empty",
    ],
)
def test_a_base_model_that_does_not_load_is_named(
    case: str, made: Made, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = shutil.copytree(made.base, tmp_path / "base")
    unloadable(base, case)
    before = tree(tmp_path)
    assert fold(source, tmp_path / "out", "--check-error", "--base", str(base)) == 2
    assert str(base) in only_error(capsys.readouterr().err)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["/absent/model", "./absent", "absent", "a/b/c", "~/absent"])
def test_a_base_model_that_is_nowhere_is_named(name: str, source: Path, refused: Callable[..., str]) -> None:
    refused(source, "--check-error", "--base", name, named=(repr(name),))


def test_a_checkpoint_without_a_base_model_asks_for_one(source: Path, refused: Callable[..., str]) -> None:
    config(base_model_name_or_path=None)(source)
    meta(base_model=None)(source)
    reseal(source)
    refused(source, "--check-error", named=(str(source), "--base"))


@pytest.mark.parametrize("content", [None, b"", b" \n\n", b"\xff\xfe\x00"], ids=str)
def test_prompts_that_cannot_be_used_are_named(
    content: bytes | None, source: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    if content is not None:
        prompts.write_bytes(content)
    refused(source, "--check-error", "--prompts", str(prompts), named=(str(prompts),))


def test_a_folder_of_prompts_is_refused(source: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    refused(source, "--check-error", "--prompts", str(tmp_path), named=(str(tmp_path),))


def test_prompts_need_a_tokenizer(made: Made, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = shutil.copytree(made.base, tmp_path / "base", ignore=shutil.ignore_patterns("tokenizer*"))
    (tmp_path / "prompts.txt").write_text("the train\n")
    options = ("--check-error", "--base", str(base), "--prompts", str(tmp_path / "prompts.txt"))
    assert fold(source, tmp_path / "out", *options) == 2
    message = only_error(capsys.readouterr().err)
    assert "no tokenizer" in message
    assert str(base) in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--base", "--prompts"])
def test_options_of_the_check_need_the_check(option: str, source: Path, refused: Callable[..., str]) -> None:
    refused(source, option, "x", named=("--check-error",))


@pytest.mark.parametrize("arguments", [[], ["--dtype", "int8"], ["--surprise"], ["extra"]], ids=str)
def test_unusable_arguments_exit_with_2(
    arguments: list[str], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["-o", str(tmp_path / "out")] if arguments else []
    assert run(cli, ["fold", str(source), *output, *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("Error: ")) == ("", 1)
    assert not (tmp_path / "out").exists()


# Outputs that cannot be


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "link", "dangling link"])
def test_an_existing_output_is_refused_untouched(
    kind: str, source: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    target = tmp_path / "out"
    match kind:
        case "folder":
            (target / "mine").mkdir(parents=True)
        case "empty folder":
            target.mkdir()
        case "file":
            target.write_text("mine")
        case "link":
            target.symlink_to(source)
        case _:
            target.symlink_to(tmp_path / "nowhere")
    refused(source, named=(str(target), "exists already"))


@pytest.mark.parametrize("where", ["out", "deep/er/out", "../input/out"])
def test_an_output_inside_the_input_is_refused(where: str, source: Path, refused: Callable[..., str]) -> None:
    refused(source, output=source / where, named=("inside the input", str(source)))


def test_an_output_inside_the_input_through_a_link_is_refused(
    source: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "link").symlink_to(source)
    refused(source, output=tmp_path / "link" / "out", named=("inside the input",))


@pytest.mark.parametrize("where", ["file/out", "file/deep/out", "n" * 300], ids=lambda where: where[:15])
def test_an_impossible_output_is_named(where: str, source: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "file").write_text("mine")
    refused(source, output=tmp_path / where, named=(str(tmp_path / where),))


def test_a_refused_fold_makes_no_parents(source: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    replaced(TENSORS, Q_A, lambda a: a * 2)(source)
    reseal(source)
    refused(source, output=tmp_path / "new" / "parents" / "out")


# A process of its own: permissions, full disks, signals


def fold_in_child(source: Path, output: Path, *options: str, prepare: Callable[[], object] = lambda: None) -> Child:
    return Child(lambda: fold(source, output, *options), prepare=prepare)


def assert_nothing_left(folder: Path, before: dict[str, str]) -> None:
    assert tree(folder) == before


@pytest.fixture
def public(made: Made) -> Iterator[Path]:
    """A folder that every user can enter, with a checkpoint in it that every user can read."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    shutil.copytree(made.path, folder / "input")
    for path in (folder / "input").rglob("*"):
        path.chmod(0o644)
    yield folder
    for path in folder.iterdir():
        path.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.parametrize("mode", [0o555, 0o000], ids=oct)
@pytest.mark.parametrize("deep", ["", "deep/"])
def test_a_folder_without_permission_is_named(mode: int, deep: str, public: Path, tmp_path: Path) -> None:
    assert fold(public / "input", tmp_path / "warm") == 0
    target = public / "closed" / f"{deep}out"
    (public / "closed").mkdir()
    (public / "closed").chmod(mode)
    ended = fold_in_child(public / "input", target, prepare=become_nobody).end()
    assert ended.code == 2, ended.output
    message = one_message(ended.output)
    assert str(target) in message
    assert "Permission denied" in message
    (public / "closed").chmod(0o755)
    assert list((public / "closed").iterdir()) == []


@pytest.mark.parametrize("file", FILES)
def test_a_file_without_permission_is_named(file: str, public: Path, tmp_path: Path) -> None:
    assert fold(public / "input", tmp_path / "warm") == 0
    (public / "writable").mkdir()
    (public / "writable").chmod(0o777)
    (public / "input" / file).chmod(0o000)
    ended = fold_in_child(public / "input", public / "writable" / "out", prepare=become_nobody).end()
    assert ended.code == 2, ended.output
    message = one_message(ended.output)
    assert str(public / "input" / file) in message
    assert "ermission denied" in message
    assert list((public / "writable").iterdir()) == []


def test_a_file_size_limit_leaves_nothing(source: Path, tmp_path: Path) -> None:
    """Every size at which a file of the output may break, from none to more than enough."""
    before = tree(tmp_path)
    codes = []
    for size in (0, 1, 100, 1000, 1500, 2000, 3000, 4096, 6000, 8000, 12_000, 100_000):
        ended = fold_in_child(source, tmp_path / "out", prepare=lambda size=size: limit_file_size(size)).end()  # type: ignore[misc]
        codes.append(ended.code)
        if ended.code == 0:
            assert {path.name for path in (tmp_path / "out").iterdir()} == WHOLE
            shutil.rmtree(tmp_path / "out")
        else:
            message = one_message(ended.output)
            assert "File too large" in message
            assert str(tmp_path / "out") in message
        assert_nothing_left(tmp_path, before)
    assert codes == sorted(codes, reverse=True)
    assert set(codes) == {0, 2}


@pytest.fixture
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True) if shutil.which("mount") else None
    if done is None or done.returncode:
        pytest.skip(f"no permission to mount a small file system: {done.stderr if done else 'no mount command'}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_nothing(source: Path, tmp_path: Path, small_disk: Path) -> None:
    """From a disk with no page free to one with enough."""
    codes = []
    for free in range(0, 64, 4):
        filler = small_disk / "filler"
        filler.write_bytes(bytes((64 - free) * 1024))
        ended = fold_in_child(source, small_disk / "out").end()
        codes.append(ended.code)
        filler.unlink()
        if ended.code == 0:
            assert {path.name for path in (small_disk / "out").iterdir()} == WHOLE
            shutil.rmtree(small_disk / "out")
        else:
            message = one_message(ended.output)
            assert "No space left" in message
            assert str(small_disk / "out") in message
        assert list(small_disk.iterdir()) == []
    assert codes == sorted(codes, reverse=True)
    assert set(codes) == {0, 2}


def duration_s(source: Path, output: Path, *options: str) -> float:
    before = time.monotonic()
    assert fold_in_child(source, output, *options).end().code == 0
    return time.monotonic() - before


def assert_whole(output: Path, expected: Path) -> None:
    """All files are there, and the adapter is bit for bit what an undisturbed fold writes."""
    assert {path.name for path in output.iterdir()} == WHOLE
    json.loads((output / "fold_certificate.json").read_text())
    for name in (CONFIG, TENSORS):
        assert (output / name).read_bytes() == (expected / name).read_bytes()


DISTURBANCES = [pytest.param((), 30, id="fold"), pytest.param(("--check-error",), 8, id="check")]


@pytest.mark.parametrize(("options", "times"), DISTURBANCES)
def test_an_interrupted_fold_leaves_nothing(options: tuple[str, ...], times: int, source: Path, tmp_path: Path) -> None:
    expected, target = tmp_path / "expected", tmp_path / "out"
    longest = duration_s(source, expected, *options)
    before = tree(tmp_path)
    draw = random.Random(1)
    codes = set()
    for _ in range(times):
        child = fold_in_child(source, target, *options)
        time.sleep(draw.uniform(0.1, 1.1) * longest)
        os.kill(child.pid, signal.SIGINT)
        ended = child.end()
        codes.add(ended.code)
        assert ended.code in (0, 130), ended.output
        assert "Traceback" not in ended.output
        if target.exists():
            assert_whole(target, expected)
            shutil.rmtree(target)
        else:
            assert ended.code == 130
            assert "interrupted" in ended.output
        assert_nothing_left(tmp_path, before)
    assert 130 in codes


@pytest.mark.parametrize(("options", "times"), DISTURBANCES)
def test_a_killed_fold_leaves_nothing_or_all(
    options: tuple[str, ...], times: int, source: Path, tmp_path: Path
) -> None:
    """What lies beside the destination after a kill is hidden, and in nobody's way."""
    expected, target = tmp_path / "expected", tmp_path / "out"
    longest = duration_s(source, expected, *options)
    before = tree(source)
    draw = random.Random(2)
    killed = 0
    for _ in range(times):
        child = fold_in_child(source, target, *options)
        time.sleep(draw.uniform(0.1, 1.1) * longest)
        os.kill(child.pid, signal.SIGKILL)
        ended = child.end()
        assert ended.code in (0, -signal.SIGKILL), ended.output
        killed += ended.code != 0
        if target.exists():
            assert_whole(target, expected)
            shutil.rmtree(target)
        assert tree(source) == before
        left = {path.name for path in tmp_path.iterdir()} - {"input", "expected"}
        assert all(name.startswith(".out.") and name.endswith(".tmp") for name in left)
        assert len(left) <= 1, "the next run removes what a kill left"
    assert killed > 0
    assert fold(source, target) == 0
    assert_whole(target, expected)
    assert {path.name for path in tmp_path.iterdir()} == {"input", "expected", "out"}


def test_an_interrupt_at_any_line_leaves_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C between any two lines of ours, where a signal would have to hit by luck."""
    ours = tuple(
        str(Path(module.__file__ or "").parent) for module in (sys.modules["loraover"], sys.modules["loraover_export"])
    )
    count, stop, place = 0, -1, [""]

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(ours) or frame.f_code.co_filename.endswith("command.py"):
            return None
        if event == "line":
            count += 1
            if count == stop:
                place[0] = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    def interrupted(at: int) -> int:
        nonlocal count, stop
        count, stop = 0, at
        sys.settrace(trace)
        try:
            return fold(source, tmp_path / "out")
        finally:
            sys.settrace(None)

    assert fold(source, tmp_path / "warm") == 0  # imports have lines too, once
    assert interrupted(-1) == 0
    (tmp_path / "out").rename(tmp_path / "expected")
    before, lines = tree(tmp_path), count
    assert lines > 500
    draw = random.Random(3)
    faults = []
    for at in [*draw.sample(range(1, lines - 200), 60), *range(lines - 200, lines, 4)]:
        code = interrupted(at)
        said = capsys.readouterr().err.splitlines()[-1:]
        published = (tmp_path / "out").exists()
        if published:
            assert_whole(tmp_path / "out", tmp_path / "expected")
            shutil.rmtree(tmp_path / "out")
        left = sorted(tree(tmp_path).keys() - before.keys())
        for path in tmp_path.glob(".out.*"):
            shutil.rmtree(path)
        if code not in (0, 130) or (code == 130 and said != [INTERRUPTED]) or left:
            faults.append(f"{place[0]}: exit code {code}, published: {published}, {said=}, {left=}")
    assert faults == []
    assert tree(tmp_path) == before


def test_an_interrupt_while_libraries_load_is_one_line(source: Path, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("loraover-export")), "fold", str(source), "-o", str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        mapped = Path(f"/proc/{process.pid}/maps")
        while "libtorch" not in mapped.read_text() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert out == ""
    assert err.splitlines()[-1] == INTERRUPTED
    assert not (tmp_path / "out").exists()


def test_the_input_may_be_read_only(public: Path, tmp_path: Path) -> None:
    assert fold(public / "input", tmp_path / "warm") == 0
    (public / "writable").mkdir()
    (public / "writable").chmod(0o777)
    (public / "input").chmod(0o555)
    ended = fold_in_child(public / "input", public / "writable" / "out", prepare=become_nobody).end()
    assert ended.code == 0, ended.output
    assert_whole(public / "writable" / "out", tmp_path / "warm")
    assert stat.S_IMODE((public / "input").stat().st_mode) == 0o555


def test_cores_that_training_could_not_have_written_in_float64(tmp_path: Path, refused: Callable[..., str]) -> None:
    """An error of 1e-10 is far above what a float64 training rounds."""
    made = make_checkpoint(tmp_path, dtype=torch.float64, config=LoraOverConfig(decomposition="chain", seed=5))
    replaced(TENSORS, Q_A, lambda a: a * (1 + 1e-10))(made.path)
    reseal(made.path)
    refused(made.path, named=(Q_A, "contradicts its cores"))
