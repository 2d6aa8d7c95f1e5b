"""Training needs neither the lab nor the packages that only the lab uses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import loraover
import loraover_lab
from loraover.common.extras import INSTALL

from support.tiny_hub import save_llama, write_recipe

pytestmark = pytest.mark.process

WITHOUT = """
import sys

LACKING = ("loraover_lab", "lm_eval", "opacus", "pytorch_optimizer")

class Lacking:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in LACKING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Lacking())
import loraover
from loraover.common.errors import ConfigError
from loraover.training.recipe import load_recipe
"""

TRAINED = """
loraover.train(sys.argv[1], sys.argv[2])
assert "scipy.stats" not in sys.modules
"""

REFUSED = """
for changes in ({"method": "soma"}, {"soma.weight_decay": 0.1}):
    try:
        load_recipe("demo", changes)
    except ConfigError as error:
        print(error)
"""


def run(*words: object) -> str:
    done = subprocess.run([sys.executable, "-c", *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_run_needs_no_package_of_the_lab(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "words.yaml", save_llama(tmp_path / "llama"))
    run(WITHOUT + TRAINED, recipe, tmp_path / "run")
    assert (tmp_path / "run" / "run.json").is_file()


def test_a_recipe_that_names_a_method_of_the_lab_says_what_to_install() -> None:
    method, settings = run(WITHOUT + REFUSED).splitlines()
    assert f"method: method soma is not installed: {INSTALL.format('lab')}" in method
    assert f"soma: the method of these settings is not installed: {INSTALL.format('lab')}" in settings


def test_names_of_the_lab_are_found_where_they_are_now() -> None:
    for name in loraover_lab.__all__:
        assert getattr(loraover_lab, name).__module__.startswith("loraover_lab.")
        with pytest.raises(AttributeError, match=f"{name}.*import it from loraover_lab"):
            getattr(loraover, name)
