"""What all methods have in common: a file that answers for them, and what they refuse."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

import loraover
from loraover.common.errors import ConfigError
from loraover.overparam.decompositions import DECOMPOSITIONS
from loraover.training.method_table import METHODS, make_method
from loraover.training.recipe import load_recipe

from support.tiny_hub import write_recipe

PACKAGE = Path(loraover.__file__).parent


@pytest.mark.parametrize(
    ("home", "names", "others"),
    [
        ("the lab, elsewhere", METHODS, {"training/run_result.py"}),  # of which every run file holds the privacy
        ("overparam/decompositions", [kind.__name__ for kind in DECOMPOSITIONS.values()], set()),
    ],
)
def test_no_module_names_what_is_in_another_folder(home: str, names: Iterable[str], others: set[str]) -> None:
    word = re.compile(rf"\b(?:{'|'.join(names)})\b")
    paths = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}
    naming = {name for name, path in paths.items() if word.search(path.read_text(encoding="utf-8"))}
    assert {name for name in naming if not name.startswith(home)} == others


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora.use_dora": True}, "chooses its first A and B itself"),
        ({"lora.init_lora_weights": "pissa"}, "chooses its first A and B itself"),
        ({"lora.target_parameters": ["experts.down_proj"]}, "adapts modules only: leave out lora.target_parameters"),
        ({"training.optim": "soap"}, "soap works only with method lora"),
    ],
)
def test_keys_that_no_method_takes_are_refused(method: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe("demo", {"method": method, **changes})


@pytest.mark.parametrize("method", METHODS)
def test_settings_of_another_method_are_refused(method: str) -> None:
    setting, default = next(iter(load_recipe("demo", {"method": method}).settings))
    for other in {"lora", "lora-over", "full", *METHODS} - {method}:
        with pytest.raises(ConfigError, match=f"{method} is only for method {method}, and this .* method is {other}"):
            load_recipe("demo", {"method": other, f"{method}.{setting}": (default or 0) + 1})


@pytest.mark.parametrize("method", [name for name, kind in METHODS.items() if not kind.trains_seq2seq])
def test_an_encoder_decoder_is_refused(method: str) -> None:
    with pytest.raises(ConfigError, match=f"{method}, which trains causal models only.*lorasc, tensorguide"):
        make_method(load_recipe("demo", {"method": method}), is_seq2seq=True)


SETTINGS: dict[str, dict[str, Any]] = {
    "soma": {"frozen_blocks": 1},
    "lorasc": {"stages": 3},
    "tensorguide": {"tt_rank": 2},
    "federated": {"clients": 2},
}
REFUSED: dict[str, dict[str, tuple[dict[str, Any], str]]] = {
    "soma": {
        "all blocks": ({"soma.frozen_blocks": 2}, "frozen_blocks is 2, and .* has 2 blocks; freeze at most 1"),
        "a rank beyond the weights": ({"lora.r": 33}, "has 16 singular values|has 32 singular values"),
        "an embedding": ({"lora.target_modules": ["embed_tokens"], "soma.frozen_blocks": 0}, "has type Embedding"),
        "two weight decays": ({"training.weight_decay": 0.1}, "soma.weight_decay in place of"),
    },
    "lorasc": {
        "more stages than steps": ({"lorasc.stages": 6}, "stages is 6, and the run has 5 optimizer steps"),
        "a rank beyond that of the sum": ({"lorasc.rank": 12}, "the sum of the stages has rank 12; leave it out"),
    },
    "tensorguide": {
        "a rank that has too few factors": (
            {"lora.r": 1, "tensorguide.cores": 7},
            "64 numbers, which have 6 prime",
        ),
        "a train that compresses nothing": (
            {"tensorguide.tt_rank": 4},
            r"q_proj are 4 x \(32 \+ 32\) = 256 .* have 320, .* change tensorguide.cores or lora.r, or leave",
        ),
        "an embedding": ({"lora.target_modules": ["embed_tokens"]}, "embed_tokens has type Embedding"),
        "a decay": ({"training.weight_decay": 0.1}, "training.weight_decay"),
        "fp16": ({"training.fp16": True}, "takes neither training.fp16"),
        "an optimizer of matrices": (
            {"training.optim": "adafactor"},
            "tensorguide takes training.optim adamw_torch_fused",
        ),
        "LoRA+": ({"training.loraplus_lr_ratio": 4.0}, "without LoRA"),
    },
    "federated": {
        "clients without rows": ({"federated.clients": 21}, "clients is 21, and there are 20 training examples"),
        "a budget without noise": (
            {"federated.noise_multiplier": 0, "federated.epsilon": 1},
            "spend inf .* No step would",
        ),
        "a guarantee that allows everything": (
            {"federated.delta": 0.05},
            "delta is 0.05, and there are 20 training examples",
        ),
        "half precision": ({"training.bf16": True}, "computes in float32"),
        "another optimizer": (
            {"training.optim": "adafactor"},
            "takes training.optim adamw_torch_fused, adamw_torch, sgd",
        ),
        "clipping of the mean": ({"training.max_grad_norm": 0.5}, "does not use training.max_grad_norm; leave it out"),
        "checkpoints": ({"training.save_total_limit": 1}, "does not use training.save_total_limit; leave it out"),
        "TensorBoard": ({"training.report_to": "tensorboard"}, "does not use training.report_to; leave it out"),
        "an embedding": ({"lora.target_modules": ["embed_tokens"]}, "is an embedding, whose B federated cannot train"),
    },
}


@pytest.mark.process
@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(("method", "case"), [(method, case) for method, cases in REFUSED.items() for case in cases])
def test_what_a_method_cannot_train_is_refused(method: str, case: str, base: Path, tmp_path: Path) -> None:
    if method == "federated":
        pytest.importorskip("opacus", reason="the extra private is not installed")
    changes, message = REFUSED[method][case]
    parts = {"method": method, method: SETTINGS[method], "training": {"max_steps": 5}}
    recipe = write_recipe(tmp_path / "r.yaml", base, **parts)
    with pytest.raises(ConfigError, match=message):
        loraover.train(recipe, tmp_path / "out", overrides=changes)
    assert not (tmp_path / "out").exists()
