"""What an export does with an output that is there already."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from loraover.common.command_line import run
from loraover_export.cli import cli
from loraover_export.publishing import PRODUCTS

from support.make_checkpoint import SERVABLE, make_checkpoint
from support.refusals import Refused

WRITTEN = {
    "convert": "certified adapters",
    "combine": "certified adapters",
    "shrink --rank 1": "certified adapters",
    **{verb: f"{product.name}s" for verb, product in PRODUCTS.items() if verb != "onnx"},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("made"), base_options=SERVABLE).path


@pytest.mark.parametrize("verb", WRITTEN)
def test_force_replaces_an_output_whole_if_it_is_one_of_ours(
    verb: str, checkpoint: Path, tmp_path: Path, refused: Refused
) -> None:
    """Another folder may be the base model, or a checkpoint of a training."""
    out, words = tmp_path / "out", [*verb.split(), str(checkpoint)]
    assert run(cli, [*words, "-o", str(out)]) == 0
    files = {path.name for path in out.iterdir()}
    (out / "stray").write_text("of the older one")
    refused(*words, named=(str(out), "exists already and is a folder"))
    assert run(cli, [*words, "-o", str(out), "--force"]) == 0
    assert {path.name for path in out.iterdir()} == files
    assert list(tmp_path.iterdir()) == [out]
    other = shutil.copytree(checkpoint, tmp_path / "other")
    refused(*words, "--force", output=other, named=(str(other), f"--force replaces {WRITTEN[verb]} only"))


@pytest.mark.parametrize("verb", WRITTEN)
def test_an_output_around_or_inside_the_input_is_refused(
    verb: str, checkpoint: Path, tmp_path: Path, refused: Refused
) -> None:
    source = shutil.copytree(checkpoint, tmp_path / "deep" / "in")
    for place in ("deep/in/out", "deep", "deep/in"):
        refused(*verb.split(), source, "--force", output=tmp_path / place, named=(str(source),))
