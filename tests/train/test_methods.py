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
from loraover.training.methods import METHODS, make_method
from loraover.training.recipe import load_recipe

PACKAGE = Path(loraover.__file__).parent


@pytest.mark.parametrize(
    ("home", "names", "others"),
    [
        ("training/methods", METHODS, {"training/run_result.py"}),  # of which every run file holds the privacy
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
