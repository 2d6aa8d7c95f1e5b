"""Rows with images: how they are read, how long they are, and a model that learns from them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageColumn
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from loraover.common.errors import ConfigError, DataError
from loraover.data.formats import PAIRS, RowForm
from loraover.data.sources import Rows, load_rows
from loraover.training.plan import make_plan
from loraover.training.recipe import load_recipe
from loraover.training.rows.lengths import ROOM, count_tokens
from loraover.training.run.measure import example_losses, token_loss
from loraover.training.run.train import train
from loraover.training.run.trainer import to_dataset
from loraover.training.run_result import read_run
from loraover_export import fold_checkpoint

from support.processes import TORCHRUN, launched
from support.tiny_hub import write_recipe
from support.tiny_llava import COLOURS, FIRST_PART, save_llava, save_pictures, sizing_processor, tiny_processor
from support.train_command import data_file
from support.trained_run import loss, losses

FORM = RowForm((*PAIRS, frozenset({"messages"})), chat=True, pictures=True)
IMAGE = {"type": "image"}
ASKED = {"role": "user", "content": [IMAGE, {"type": "text", "text": "colour?"}]}
ANSWER = {"role": "assistant", "content": "red"}
MORE = {"role": "user", "content": [{"type": "text", "text": "and"}, IMAGE, {"type": "text", "text": "?"}]}


def said(text: str, role: str = "assistant") -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def load(path: Path, form: RowForm = FORM) -> Rows:
    return load_rows(str(path), split="train", subset=None, revision=None, limit=None, format="auto", form=form)


@pytest.fixture
def write(tmp_path: Path) -> Any:
    names = save_pictures(tmp_path, [(16, 16), (20, 16)])

    def write_rows(*rows: dict[str, Any]) -> Path:
        return data_file(tmp_path / "train.jsonl", *rows)

    write_rows.names = names  # type: ignore[attr-defined]
    return write_rows


@pytest.mark.parametrize(
    "row",
    [
        {"image": "0.png", "prompt": "colour?", "completion": "red"},
        {
            "images": ["0.png"],
            "messages": [{"role": "user", "content": "colour?"}, {"role": "assistant", "content": "red"}],
        },
        {"images": [{"path": "0.png", "bytes": None}], "messages": [ASKED, said("red")]},
        {
            "image": "0.png",
            "conversations": [{"from": "human", "value": "<image>\ncolour?"}, {"from": "gpt", "value": "red"}],
        },
    ],
    ids=["pair", "text", "parts", "llava"],
)
def test_every_spelling_is_one_example(row: dict[str, Any], write: Any, tmp_path: Path) -> None:
    (found,) = load(write(row)).rows
    assert found == {
        "prompt": [ASKED],
        "completion": [said("red")],
        "images": [{"bytes": None, "path": str(tmp_path / "0.png")}],
    }


def test_a_turn_has_the_images_before_it(write: Any) -> None:
    first, second = load(write({"images": write.names, "messages": [ASKED, said("red"), MORE, said("green")]})).rows
    assert [Path(one["path"]).name for one in first["images"]] == ["0.png"]
    assert [Path(one["path"]).name for one in second["images"]] == write.names
    assert second["prompt"] == [ASKED, said("red"), MORE]


def test_images_of_parquet_stay_files(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    picture = {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}
    row = {"images": [picture], "prompt": "colour?", "completion": "red"}
    features = Features({"images": List(ImageColumn()), "prompt": Value("string"), "completion": Value("string")})
    Dataset.from_list([row], features=features).to_parquet(tmp_path / "train.parquet")
    (found,) = load(tmp_path / "train.parquet").rows
    assert found["images"] == [picture]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"images": ["2.png"], "messages": [ASKED, said("red")]}, "there is no image file"),
        ({"image": "data:image/png;base64,AAAA", "messages": [ASKED, said("red")]}, "URLs are not fetched"),
        ({"images": [5], "messages": [ASKED, said("red")]}, "an image is 5"),
        ({"image": "0.png", "images": ["0.png"], "messages": [ASKED, said("red")]}, "a list of images"),
        ({"images": ["0.png", "1.png"], "messages": [ASKED, said("red")]}, "holds 2 image"),
        (
            {"images": ["0.png"], "messages": [ASKED, said("red"), MORE, said("a")]},
            r"1 image\(s\), and its messages have 2",
        ),
        ({"images": ["0.png"], "messages": [said("red")]}, "needs chat messages"),
        ({"messages": [ASKED, said("red")]}, r"0 image\(s\), and its messages have 1"),
        (
            {"images": ["0.png"], "messages": [said("a", "user"), ASKED | {"role": "assistant"}]},
            "message of the assistant",
        ),
        ({"video": "a.mp4", "prompt": "a", "completion": "b"}, "other media"),
        ({"messages": [{"role": "user", "content": [IMAGE | {"url": "0.png"}]}, said("red")]}, "other media"),
        ({"images": ["0.png"], "text": "red"}, "has fields"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}, said("red")]}, "other media"),
    ],
)
def test_a_row_that_cannot_be_shown_is_numbered(row: dict[str, Any], message: str, write: Any) -> None:
    with pytest.raises(DataError, match=f"row 2.*{message}"):
        load(write({"prompt": "a", "completion": "b"}, row))


def test_a_run_of_texts_takes_no_images(write: Any) -> None:
    with pytest.raises(DataError, match=r"row 1: holds images.*model that takes images learns them with trainer sft"):
        load(write({"image": "0.png", "prompt": "colour?", "completion": "red"}), FORM._replace(pictures=False))
    assert (
        "images"
        not in load(write({"images": [], "prompt": "a", "completion": "b"}), FORM._replace(pictures=False)).rows[0]
    )


def test_texts_of_such_a_model_are_parts_and_stay_as_they_are(write: Any) -> None:
    """Templates of models that take images print nothing of a message that is a text alone."""
    spare = [{"type": "text", "text": "  a", "image": None}, {"type": "text", "text": "b"}]  # as Parquet has it
    rows = [{"prompt": "a?", "completion": "use <image>"}, {"messages": [{"role": "user", "content": spare}, ANSWER]}]
    first, second = load(write(*rows)).rows
    assert first == {"prompt": [said("a?", "user")], "completion": [said("use <image>")]}
    assert second["prompt"][0]["content"] == [{"type": "text", "text": "  a"}, {"type": "text", "text": "b"}]


@pytest.mark.parametrize("reads", [tiny_processor(), sizing_processor(), sizing_processor(FIRST_PART)])
@pytest.mark.parametrize("turns", [True, False])
def test_no_example_is_longer_than_it_is_counted(reads: Any, turns: bool, tmp_path: Path) -> None:
    names = save_pictures(tmp_path, [(16, 16), (40, 16), (16, 40), (64, 8)])
    Image.new("RGB", (40, 16), "red").save(tmp_path / "turned.jpg", exif=_turned())
    rows = [{"images": [name], "messages": [ASKED, said("red")]} for name in [*names, "turned.jpg"]]
    rows += [
        {"images": names[:2], "messages": [ASKED, said("red"), MORE, said("green")]},
        {"messages": [said("a", "user"), said("b")]},
    ]
    data_file(tmp_path / "train.jsonl", *rows)
    form = FORM if turns else FORM._replace(turns=False, columns=(frozenset({"messages"}),))
    read = load(tmp_path / "train.jsonl", form)
    found = count_tokens(read, "sft", reads.tokenizer, processor=reads)
    collate = DataCollatorForVisionLanguageModeling(reads)
    made = [int(collate([dict(row)])["attention_mask"].sum()) for row in to_dataset(read.rows, pictures=True)]
    for example, length, row in zip(found, made, read.rows, strict=True):
        assert 0 <= example.total - length <= (ROOM + 2) * len(row.get("images", ()))
    assert (len({*made[:4]}) > 1) is (type(reads) is not type(tiny_processor()))  # by the sizes of the images


def _turned() -> Any:
    exif = Image.Exif()
    exif[0x0112] = 6  # by a quarter
    return exif


def test_a_damaged_image_is_found_before_training(tmp_path: Path, write: Any) -> None:
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:20])
    rows = load(write(*({"image": name, "prompt": "colour?", "completion": "red"} for name in write.names)))
    with pytest.raises(DataError, match="row 2: an image cannot be read"):
        count_tokens(rows, "sft", tiny_processor().tokenizer, processor=tiny_processor())


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows that say the colour of an image, and a recipe."""
    folder = tmp_path_factory.mktemp("colours")
    names = save_pictures(folder, [(16 + i, 20) for i in range(12)])
    rows = [{"image": name, "prompt": "colour?", "completion": COLOURS[i % 3]} for i, name in enumerate(names)]
    for split, part in (("train", rows[:9]), ("test", rows[9:])):
        longer = {"prompt": "which colour?"} if split == "test" else {}  # held-out rows may be the longest
        data_file(folder / f"{split}.jsonl", *(row | longer for row in part))
    write_recipe(
        folder / "recipe.yaml",
        save_llava(folder / "base"),
        data={"train": str(folder), "train_examples": None},
        training={"max_steps": 8, "max_length": None, "learning_rate": 2e-2, "per_device_train_batch_size": 9},
        evaluation={"exact_match": False},
    )
    return folder


@pytest.mark.process
def test_a_model_is_trained_on_what_it_sees(colours: Path, tmp_path: Path) -> None:
    result = train(colours / "recipe.yaml", tmp_path / "run")
    assert loss(result.after) < loss(result.before)
    adapter = tmp_path / "run" / "adapter"
    folded = fold_checkpoint(adapter, tmp_path / "folded", check_error=True)
    assert folded.verdict == "passed"

    # A fresh model, PEFT and TRL compute the same loss from the files.
    reads = AutoProcessor.from_pretrained(adapter)
    model = PeftModel.from_pretrained(
        AutoModelForImageTextToText.from_pretrained(colours / "base"), tmp_path / "folded"
    )
    rows = load(colours / "test.jsonl").rows
    unseen = [row | {"images": rows[0]["images"]} for row in rows]

    def by_trl(rows: list[dict[str, Any]]) -> float:
        shown = [dict(row) for row in to_dataset(rows, pictures=True)]
        batch = DataCollatorForVisionLanguageModeling(reads, completion_only_loss=True)(shown)
        return token_loss(example_losses(model, [batch]))

    assert by_trl(rows) == pytest.approx(loss(result.after), rel=1e-5)
    assert abs(by_trl(unseen) - by_trl(rows)) > 1e-3


@pytest.mark.matrix
@pytest.mark.process
def test_two_processes_learn_from_images_as_one_does(colours: Path, tmp_path: Path) -> None:
    shared = {"data.train_examples": 8, "training.per_device_train_batch_size": 4, "training.max_steps": 3}
    train(colours / "recipe.yaml", tmp_path / "one", overrides=shared | {"training.gradient_accumulation_steps": 2})
    words = [word for key, value in shared.items() for word in ("--set", f"{key}={value}")]
    launched((*TORCHRUN, "-m"), Path("loraover.cli"), "train", colours / "recipe.yaml", "-o", tmp_path / "two", *words)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    one, two = (read_run(tmp_path / name) for name in ("one", "two"))
    assert two.processes == 2
    assert loss(two.after) == pytest.approx(loss(one.after), rel=1e-5)


@pytest.mark.process
@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"training.max_length": 20}, DataError, r"row 1 holds images and may need \d+ tokens"),
        ({"evaluation.exact_match": True}, ConfigError, "row 1 has images. Set it to false"),
        ({"training.packing": True}, ConfigError, "Packing is not supported"),
        ({"data.chat": False}, DataError, "needs chat messages"),
    ],
)
def test_what_images_do_not_allow_is_refused(
    changes: dict[str, Any], kind: type[Exception], message: str, colours: Path, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=message):
        train(colours / "recipe.yaml", tmp_path / "run", overrides=changes)
    assert not (tmp_path / "run").exists()


@pytest.mark.process
def test_a_plan_counts_the_tokens_of_images(colours: Path) -> None:
    plan = make_plan(load_recipe(colours / "recipe.yaml"))
    assert plan.lengths is not None
    assert 20 < plan.lengths.longest <= plan.lengths.max_length  # which held-out images have to fit, too


@pytest.mark.process
def test_without_a_processor_texts_are_learnt_and_images_refused(colours: Path, tmp_path: Path) -> None:
    base = shutil.copytree(colours / "base", tmp_path / "base")
    (base / "processor_config.json").unlink()
    with pytest.raises(ConfigError, match=r"cannot read images: .*processor"):
        train(colours / "recipe.yaml", tmp_path / "refused", overrides={"model": str(base)})
    text = {"model": str(base), "data.train": "word-problems", "training.max_steps": 1, "evaluation.examples": 0}
    assert train(colours / "recipe.yaml", tmp_path / "run", overrides=text).steps == 1
