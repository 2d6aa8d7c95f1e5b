"""Lengths of training examples in tokens: which are cut, and which are left without anything to learn."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from loraover.common.errors import DataError
from loraover.common.reporter import Reporter
from loraover.data.formats import Row
from loraover.data.sources import BadRows, Counted, Rows
from loraover.training.recipe import Recipe
from loraover.training.rows.data import Examples
from loraover.training.rows.template import checked, is_chat, learned, whole_texts
from loraover.training.run_result import Lengths

FEW = 0.01
"""Share of examples that may be cut without a warning."""

KEPT = 0.99
"""Share of examples that the suggested length does not cut."""


class Tokens(NamedTuple):
    """Numbers of tokens of an example: those of its prompt, which are not learned, and all of them."""

    prompt: int
    total: int


def count_tokens(
    rows: Rows,
    name: str,
    tokenizer: Any,
    *,
    answers_only: bool | None = None,
    processor: Any = None,
    bad: BadRows | None = None,
) -> list[Tokens]:
    """Count the tokens of each example as its trainer does; of an input and a target, the longer stands for both."""
    if bad is None:
        bad = BadRows()
        found = count_tokens(rows, name, tokenizer, answers_only=answers_only, processor=processor, bad=bad)
        bad.refuse(rows.origin)
        return found
    rows = learned(rows, name)
    first = rows.rows[0]
    if name == "seq2seq":
        sides = [_sizes([row[side] for row in rows.rows], tokenizer, first) for side in ("prompt", "completion")]
        return [Tokens(0, max(pair)) for pair in zip(*sides, strict=True)]
    reads = tokenizer if processor is None else processor
    whole = whole_texts(rows, reads, bad)
    sizes = iter(_sizes([text for texts in whole for text in texts], tokenizer, first))
    end = int(name in ENDED and not is_chat(first))
    totals = [end + max(next(sizes) for _ in texts) for texts in whole]
    prompts = []
    for i, row in enumerate(rows.rows):
        prompts.append("")
        with bad.of(rows.number(i), i):
            asked = _until_answer(row, rows.place(i)) if answers_only else row
            if name in FINDS_PROMPT and "prompt" not in row:
                from trl.data_utils import extract_prompt

                asked = row | extract_prompt(row)
            if asked.get("prompt"):
                prompts[-1] = checked(asked, None, reads, rows.place(i))
    starts = [size if text else 0 for text, size in zip(prompts, _sizes(prompts, tokenizer, first), strict=True)]
    shown = [0] * len(totals) if processor is None else picture_tokens(rows, processor, bad)
    return [Tokens(start + more, total + more) for start, total, more in zip(starts, totals, shown, strict=True)]


FINDS_PROMPT = ("dpo", "orpo")
"""Trainers that may take the common beginning of the chosen and the rejected text as the prompt."""

AT_ONCE = 1000
"""Texts whose tokens are in memory at once, at 150 bytes a token."""

ENDED = ("sft", "dpo", "kto", "reward")
"""Trainers that add the token which ends a text to text without chat messages."""


def _until_answer(row: Row, where: str) -> Row:
    """Return a conversation with its messages before the assistant's first turn as its prompt."""
    if "messages" not in row:
        return row
    turn = next((n for n, message in enumerate(row["messages"]) if message["role"] == "assistant"), None)
    if turn is None:
        raise DataError(f"{where}: messages holds no assistant turn, and training.assistant_only_loss learns no other.")
    return row | {"prompt": row["messages"][:turn]}


def _sizes(texts: list[str], tokenizer: Any, first: Row) -> list[int]:
    """Count the tokens of texts; a chat template writes the special tokens itself."""
    adds = not is_chat(first)
    parts = (texts[start : start + AT_ONCE] for start in range(0, len(texts), AT_ONCE))
    return [len(ids) for part in parts for ids in tokenizer(part, add_special_tokens=adds)["input_ids"]]


ROOM = 4
"""Tokens for each image that are counted besides its own, since texts around it may merge into tokens otherwise."""


def picture_tokens(rows: Rows, processor: Any, bad: BadRows) -> list[int]:
    """Count the tokens that the images of each example add to its texts, at most.

    They depend on an image's size and on the number of images in an example, so that one image for each of these is
    processed, and of others only the size is read.
    """
    known: dict[tuple[tuple[int, int], int], int] = {}

    def count(picture: dict[str, Any], shown: int, where: str) -> int:
        key = _picture_size(picture, where), shown
        if key not in known:
            known[key] = ROOM + _tokens_of_size(*key, processor, where)
        return known[key]

    found = []
    for i, row in enumerate(rows.rows):
        pictures = row.get("images", ())
        found.append(0)
        with bad.of(rows.number(i), i):
            found[-1] = sum(count(picture, len(pictures), rows.place(i)) for picture in pictures)
    return found


def _tokens_of_size(size: tuple[int, int], shown: int, processor: Any, where: str) -> int:
    """Count the tokens that each of several images of one size adds to a message."""
    from PIL import Image

    text, images = [{"type": "text", "text": "a"}], [Image.new("RGB", size)] * shown
    seen, unseen = (
        processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        for content in ([{"type": "image"}] * shown + text, text)
    )
    try:
        made = processor(text=[seen], images=[images], add_special_tokens=False)
    except ValueError as error:
        raise DataError(f"{where}: the model takes no image of {size[0]} x {size[1]} pixels: {error}") from error
    more = len(made["input_ids"][0]) - len(processor.tokenizer(unseen, add_special_tokens=False)["input_ids"])
    return -(-more // shown)


def _picture_size(picture: dict[str, Any], where: str) -> tuple[int, int]:
    """Return an image's width and height, as `datasets` turns it: the size is known without its pixels."""
    from PIL import ExifTags, Image

    try:
        with Image.open(picture["path"] if picture["bytes"] is None else io.BytesIO(picture["bytes"])) as image:
            is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) > 4  # by a quarter
            return image.size[::-1] if is_turned else image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{where}: an image cannot be read: {error}.") from error


def check_fit(
    recipe: Recipe, name: str, examples: Examples, counted: Sequence[list[Tokens]], report: Reporter
) -> Lengths | None:
    """Check that no example with images is cut, and report which others are; None for a trainer that cuts none."""
    limit = recipe.training.tokens
    for rows, tokens in zip(examples.parts, counted, strict=True):
        for i, one in enumerate(tokens):
            if rows.rows[i].get("images") and one.total > limit:
                raise DataError(
                    f"{rows.place(i)} holds images and may need {one.total} tokens, more than training.max_length = "
                    f"{limit}, and the tokens of an image cannot be cut. Leave training.max_length out, or remove such "
                    "rows."
                )
    if name == "grpo":
        return None
    found, *held_out = (summarise(*part, recipe, name) for part in zip(counted, examples.parts, strict=True))
    kept = f"{found.keeps_99} would keep 99 % of all examples whole"
    if found.unlabelled == found.examples:
        why = "trainer reward leaves out what is longer" if name == "reward" else "every prompt fills it"
        raise DataError(
            f"{recipe.data.name}: no example fits training.max_length = {limit}, since {why}. The longest example has "
            f"{found.longest} tokens; {kept}."
        )
    if found.cut:
        warning = "warning: " if found.cut_share > FEW else ""
        report.line(f"{warning}{_cut_line(found, 'examples', recipe, name)}; {kept}")
    if found.unlabelled and name != "reward":
        report.line(
            f"{found.unlabelled} of {found.examples} examples have no room for their completion within "
            f"training.max_length = {limit} and are left out ({Counted(found.unlabelled, found.unlabelled_rows).rows})"
        )
    for summary in held_out:
        if summary.cut:
            report.line(_cut_line(summary, "held-out examples", recipe, name) + ", and count so in the loss")
    return found


def summarise(tokens: list[Tokens], rows: Rows, recipe: Recipe, name: str) -> Lengths:
    """Summarise lengths of examples, and what a largest length cuts."""
    training, totals = recipe.training, sorted(one.total for one in tokens)
    most = training.tokens
    cut, unlabelled = Counted(), Counted()
    if not _splits(recipe):
        for i, one in enumerate(tokens):
            if one.total > most:
                cut.add(rows.number(i))
                if is_left_out(one, most, recipe, name):
                    unlabelled.add(rows.number(i))
    return Lengths(
        examples=len(totals),
        max_length=most,
        cut=cut.count,
        cut_rows=cut.first,
        unlabelled=unlabelled.count,
        unlabelled_rows=unlabelled.first,
        longest=totals[-1],
        keeps_99=totals[-int(len(totals) * (1 - KEPT)) - 1],
        histogram=Counter(1 << max(0, total - 1).bit_length() for total in totals),
    )


def is_left_out(one: Tokens, most: int, recipe: Recipe, name: str) -> bool:
    """Whether an example has nothing to learn within the length; the reward trainer leaves out every longer one."""
    extra = recipe.training.model_extra or {}
    keeps_labels = extra.get("truncation_mode") == "keep_end" or extra.get("completion_only_loss") is False
    is_full = name == "reward" or (one.prompt >= most and not keeps_labels)
    return one.total > most and is_full and not _splits(recipe)


def _splits(recipe: Recipe) -> bool:
    return recipe.packs and (recipe.training.model_extra or {}).get("packing_strategy") in SPLITS


SPLITS = ("wrapped", "bfd_split", "bfd-requeue")
"""Strategies of packing that put the rest of a longer example into the next row."""


def _cut_line(found: Lengths, what: str, recipe: Recipe, name: str) -> str:
    """Say which examples are cut, and at which end."""
    fate = "they are left out" if name == "reward" else "their ends are cut"
    if (recipe.training.model_extra or {}).get("truncation_mode") == "keep_end":
        fate = "their beginnings are cut"
    return (
        f"{found.cut} of {found.examples} {what} are longer than training.max_length = {found.max_length}, so {fate} "
        f"({Counted(found.cut, found.cut_rows).rows})"
    )
