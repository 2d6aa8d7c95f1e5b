"""A checkpoint that cannot be trusted is refused by its readers, with one message that names what is wrong with it."""

from __future__ import annotations

import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loraover import LoraOverConfig, read_checkpoint, write_checkpoint
from loraover.checkpoint.files import CORES_FILE, META_FILE
from loraover.common.errors import CheckpointError, LoraOverError, OutputError
from loraover.common.strict_json import MAX_JSON_BYTES

from support.checkpoint_damage import (
    CONFIG,
    CORES,
    FILES,
    META,
    Q_A,
    TENSORS,
    WRONG_BYTES,
    WRONG_CONFIG,
    WRONG_META,
    WRONG_TENSORS,
    replaced,
)
from support.make_checkpoint import Made, digest, edit_json, make_checkpoint, reseal, train, tree


def read_whole(source: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, by the readers of a fold."""
    checkpoint = read_checkpoint(source)
    checkpoint.check_keeps_base()
    with checkpoint.open() as exact:
        return {key: exact.tensor(key).value for key in checkpoint.shapes}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Tests copy it before they damage it."""
    return make_checkpoint(tmp_path_factory.mktemp("made"))


@pytest.fixture
def source(made: Made, tmp_path: Path) -> Path:
    return shutil.copytree(made.path, tmp_path / "input")


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """Reads a checkpoint, and checks all that a refusal promises; `named` must be in the message."""

    def check(source: Path, *, named: tuple[str, ...] = ()) -> str:
        before = tree(tmp_path)
        with pytest.raises(LoraOverError) as caught:
            read_whole(source)
        assert tree(tmp_path) == before
        message = str(caught.value)
        assert len(message) < 2000
        for text in named:
            assert text in message
        return message

    return check


# Files that are missing, cut off or not what they should be


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_named(file: str, source: Path, refused: Callable[..., str]) -> None:
    (source / file).unlink()
    refused(source, named=(str(source / file), "no such file"))


@pytest.mark.parametrize("file", [name for name in FILES if name != META])  # without it, a folder is a plain LoRA
def test_the_folder_below_that_holds_a_missing_file_is_named(
    file: str, source: Path, refused: Callable[..., str]
) -> None:
    (source / "b").mkdir()
    (source / file).rename(source / "b" / file)
    (source / "c").mkdir()
    refused(source, named=("no such file", f"Is {source / 'b'} meant?"))


@pytest.mark.parametrize("file", FILES)
def test_a_folder_in_a_files_place_is_named(file: str, source: Path, refused: Callable[..., str]) -> None:
    (source / file).unlink()
    (source / file).mkdir()
    refused(source, named=(str(source / file),))


def test_a_plain_adapter_is_no_checkpoint(source: Path, refused: Callable[..., str]) -> None:
    (source / META).unlink()
    (source / CORES).unlink()
    refused(source, named=(str(source / META), "holds a plain LoRA without the cores", "output_dir"))


@pytest.mark.parametrize("kept", [0, 8, 9, 0.3, -1])
@pytest.mark.parametrize("file", FILES)
def test_a_truncated_file_is_named(file: str, kept: float, source: Path, refused: Callable[..., str]) -> None:
    content = (source / file).read_bytes()
    (source / file).write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    refused(source, named=(str(source / file),))


@pytest.mark.parametrize("file", FILES)
def test_flipped_bytes_are_refused_or_change_nothing(file: str, source: Path) -> None:
    expected = read_whole(source)
    content = (source / file).read_bytes()
    draw = random.Random(file)
    positions = [*range(12), *draw.sample(range(12, len(content)), 60)]
    refusals = []
    for position in positions:
        flipped = bytearray(content)
        flipped[position] ^= draw.randrange(1, 256)
        (source / file).write_bytes(flipped)
        try:
            found = read_whole(source)
        except LoraOverError as error:
            refusals.append(str(error))
        else:
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], expected[key]) for key in found), position
    assert all(str(source) in message for message in refusals)
    assert len(refusals) > 0.95 * len(positions)


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", ["adapter_model.bin", "weights.pth"])
@pytest.mark.parametrize("without", [[TENSORS], [TENSORS, META, CORES]], ids=len)
def test_a_pickle_is_refused_and_never_unpickled(
    without: list[str], name: str, source: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (source / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    for file in without:
        (source / file).unlink()
    refused(source, named=(str(source / TENSORS), name, "never read"))


# Tensors that are not the checkpoint's; every checksum is made right again, so that the check itself is met


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_wrong_tensors_are_named(case: str, source: Path, refused: Callable[..., str]) -> None:
    damage, named = WRONG_TENSORS[case]
    damage(source)
    reseal(source)
    refused(source, named=(str(source), *named))


# JSON that is hostile or plainly wrong


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
    if case not in ("schema huge", "checksums missing", "duplicate key", "not an object"):
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


def test_cores_that_training_could_not_have_written_in_float64(tmp_path: Path, refused: Callable[..., str]) -> None:
    """An error of 1e-10 is far above what a float64 training rounds."""
    made = make_checkpoint(tmp_path, dtype=torch.float64, config=LoraOverConfig(decomposition="chain", seed=5))
    replaced(TENSORS, Q_A, lambda a: a * (1 + 1e-10))(made.path)
    reseal(made.path)
    refused(made.path, named=(Q_A, "contradicts its cores"))


# The seal


@pytest.mark.parametrize("name", [CORES_FILE, META_FILE])
def test_a_save_that_is_cut_off_leaves_no_checkpoint(name: str, tmp_path: Path) -> None:
    """By a folder in the place of its first file, or of its last."""
    made = make_checkpoint(tmp_path, steps=0)
    fresh = tmp_path / "fresh"
    made.model.save_pretrained(fresh)
    (fresh / name).mkdir()
    with pytest.raises(OutputError, match=f"cannot write .*{name}: Is a directory"):
        write_checkpoint(fresh, made.over, step=0)
    (fresh / name).rmdir()
    assert ((fresh / CORES_FILE).exists(), (fresh / META_FILE).exists()) == (name == META_FILE, False)
    with pytest.raises(CheckpointError, match="the saving of a checkpoint was interrupted"):
        read_checkpoint(fresh)


def test_a_newer_adapter_beside_older_cores_is_refused(tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path)
    train(made.model, made.optimizer, range(2, 3))
    made.model.save_pretrained(made.path)
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: its SHA-256 differs"):
        read_checkpoint(made.path)
    write_checkpoint(made.path, made.over, step=3)
    assert read_checkpoint(made.path).meta.step == 3


@pytest.mark.parametrize("lacking", ["digest", "checksum"])
def test_a_checkpoint_that_lacks_a_seal_is_refused(lacking: str, tmp_path: Path) -> None:
    """An edit is found whether it empties the digest or leaves it."""
    made = make_checkpoint(tmp_path, steps=0)

    def take_away(meta: dict[str, Any]) -> None:
        if lacking == "checksum":
            del meta["sha256"][CORES_FILE]
        meta["digest"] = "" if lacking == "digest" else digest(meta)

    edit_json(made.path / META_FILE, take_away)
    place = META_FILE if lacking == "digest" else CORES_FILE
    with pytest.raises(CheckpointError, match=rf"{place}: its (digest|SHA-256)"):
        read_checkpoint(made.path)
