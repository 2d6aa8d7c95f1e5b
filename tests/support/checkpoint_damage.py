"""Ways to damage a checkpoint, and what the message of the refusal must name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from support.make_checkpoint import edit_json, edit_tensors
from support.vllm_damage import config

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
META, CORES = "loraover.json", "loraover.safetensors"
FILES = [CONFIG, TENSORS, META, CORES]
MODULE = "model.layers.0.self_attn.q_proj"
Q_A, Q_B = (f"base_model.model.{MODULE}.lora_{kind}.weight" for kind in "AB")
CORE = f"{MODULE}.lora_A.core.1"

Damage = Callable[[Path], object]


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


Z_A, Z_B = "base_model.model.z.q_proj.lora_A.weight", "base_model.model.z.q_proj.lora_B.weight"


def added_pair(in_features: int, dtype: torch.dtype = torch.float32) -> Damage:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[Z_A] = torch.ones(4, in_features).to(dtype)
        tensors[Z_B] = torch.ones(3, 4).to(dtype)

    return changed(TENSORS, change)


ODD_DTYPES = (torch.int64, torch.complex64, torch.float8_e4m3fn)
WRONG_TENSORS: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "core transposed": (replaced(CORES, CORE, lambda core: core.T), (CORES, CORE)),
    "core nan": (replaced(CORES, CORE, element(float("nan"))), (CORES, CORE, "NaN")),
    "A nan": (replaced(TENSORS, Q_A, element(float("nan"))), (TENSORS, Q_A, "NaN")),
    "B inf": (replaced(TENSORS, Q_B, element(float("inf"))), (TENSORS, Q_B, "infinity")),
    "B scaled": (replaced(TENSORS, Q_B, lambda b: b * 0.999), (TENSORS, Q_B, "contradicts its cores: element (")),
    "A element": (replaced(TENSORS, Q_A, element(0.5)), (TENSORS, Q_A, "element (1, 2) is 0.5, the cores give")),
    "A missing": (changed(TENSORS, lambda tensors: tensors.pop(Q_A)), (TENSORS, Q_B, "no A beside it")),
    "B missing": (changed(TENSORS, lambda tensors: tensors.pop(Q_B)), (TENSORS, Q_A, "no B beside it")),
    "A three-dimensional": (replaced(TENSORS, Q_A, lambda a: a[None]), (TENSORS, Q_A, "expected a matrix")),
    "B of another rank": (replaced(TENSORS, Q_B, lambda b: b[:, :3]), (TENSORS, Q_B, "rank 3")),
    "no LoRA layers": (
        changed(
            TENSORS, lambda tensors: [tensors.pop(key) for key in list(tensors)] and tensors.update(a=torch.ones(2))
        ),
        (TENSORS, "no LoRA layers"),
    ),
    "saved module nan": (
        changed(TENSORS, lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.ones(2, 2) / 0})),
        (TENSORS, "lm_head", "infinity"),
    ),
    **{f"A {dtype}": (retyped(TENSORS, Q_A, dtype), (TENSORS, Q_A)) for dtype in ODD_DTYPES},
    **{f"core {dtype}": (retyped(CORES, CORE, dtype), (CORES, CORE)) for dtype in ODD_DTYPES},
    **{f"pair {dtype}": (added_pair(3, dtype), (TENSORS, "base_model.model.z.q_proj.lora_")) for dtype in ODD_DTYPES},
    "core of another float": (retyped(CORES, CORE, torch.float64), (CORES, CORE, "float64")),
    "saved module float8": (
        added("base_model.model.lm_head.weight", 2, 2, dtype=torch.float8_e4m3fn),
        (TENSORS, "lm_head"),
    ),
    "empty pair": (added_pair(0), (TENSORS, Z_A)),
}


def raw(file: str, old: str, new: str) -> Damage:
    """Replaces text, for JSON that Python's `json` would not write."""

    def change(folder: Path) -> None:
        text = (folder / file).read_text()
        assert old in text
        (folder / file).write_text(text.replace(old, new, 1))

    return change


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


NAN = float("nan")
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
    "r huge": (raw(CONFIG, '"r": 4', f'"r": {HUGE}'), ()),
    "alpha 1e999": (raw(CONFIG, '"lora_alpha": 8', '"lora_alpha": 1e999'), ()),
    "use_rslora text": (config(use_rslora="off"), ("use_rslora: ",)),
    "a task that PEFT lacks": (config(task_type="GUESSING"), ("task_type: ", "'CAUSAL_LM'", "'GUESSING'")),
    "rank_pattern zero": (config(rank_pattern={"q_proj": 0}), ("rank",)),
    "rank_pattern inline flags": (config(rank_pattern={"(?i)q": 4}), ("rank_pattern", "'(?i)q' is not a regular exp")),
    "alpha_pattern no pattern": (config(alpha_pattern={"[": 4.0}), ("alpha_pattern",)),
    "base edited": (config(base_model_name_or_path="x/y"), ("base_model_name_or_path is 'x/y'",)),
    "another field NaN": (config(loftq_config={"a": NAN}), ()),
    "another field deep": (raw(CONFIG, '"bias"', f'"a": {DEEP}, "bias"'), ()),
    "another field a lone surrogate": (raw(CONFIG, '"bias"', '"a": "\\ud800", "bias"'), ()),
    "duplicate key": (raw(CONFIG, '"r": 4', '"r": 8, "r": 4'), ("r",)),
}

WRONG_META: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "schema 2": (meta(schema_version=2), ("schema_version is 2", "reads 3")),
    "no rounds": (lambda folder: edit_json(folder / META, lambda c: c.pop("rounds")), ("rounds: ",)),
    "schema huge": (raw(META, '"schema_version": 3', f'"schema_version": {HUGE}'), ()),
    "no schema": (lambda folder: edit_json(folder / META, lambda c: c.pop("schema_version")), ("schema_version: ",)),
    "another format": (meta(format="other"), ("format: ",)),
    "unknown key": (meta(surprise=1), ("surprise: ",)),
    "unknown config key": (over(surprise=1), ("config.surprise: ",)),
    "no sites": (meta(sites=[]), ("sites: ",)),
    "site twice": (lambda f: edit_json(f / META, lambda c: c["sites"].append(c["sites"][0])), ("sites: ",)),
    "site of no matrix": (site(name="model.layers.9.lora_A"), ("model.layers.9.lora_A",)),
    "site m": (site(m=5), (Q_A, "(5, 32)")),
    "site state NaN": (site(state={"a": NAN}), ("NaN is not a finite number",)),
    "core_dtype": (meta(core_dtype="float16"), ("core_dtype: ",)),
    "core_dtype of other cores": (meta(core_dtype="float64"), (CORES, "float32")),
    "checksums missing": (meta(sha256={}), ()),
    "decomposition unknown": (over(decomposition="tucker"), ("'tucker'", "mpo")),
    "another decomposition": (over(decomposition="svd"), (CORES, "core.0")),
    "options unknown": (mpo(surprise=1), ("mpo: 'surprise' is not an option",)),
    "seed negative": (over(seed=-1), ("config.seed: ",)),
    "step text": (meta(step="2"), ("step: ",)),
    "num_cores huge": (mpo(num_cores=10**12), ("num_cores",)),
    "modes text": (mpo(modes={"4": ["2", 2, 1]}), ("modes[4][0] is '2'",)),
    "other modes": (mpo(modes={"4": [4, 1, 1]}), ("core.",)),
    "bonds narrow": (mpo(bonds=[1, 1]), ("bond 1 is 1",)),
    "depth huge": (chain(depth=10**12), ("depth",)),
    "duplicate key": (raw(META, '"step": 2,', '"step": 7, "step": 2,'), ("step",)),
    "not an object": (written(META, b"[]"), ()),
}

WRONG_BYTES: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"step: 3",
    "half": b'{"format": "loraover-checkpoint", "schema_version": 1',
    "deep": b"[" * 100_000,
    "UTF-8 garbage": b'{"peft_type": "\xff\xfe\xc3("}',
    "a huge number": HUGE.encode(),
}
