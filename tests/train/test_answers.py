"""The number that an answer ends in, and the share of answers whose number is right."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig, PretrainedConfig

from loraover.data.final_number import final_number
from loraover.training.run.measure import exact_match

from support.tiny_hub import BOS, tiny_tokenizer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 72", "72"),
        ("20%-30%", "30"),
        ("(10)-3", "3"),
        ("The answer is:\n- 42 apples", "42"),
        ("5 + 3 = 8 #### 8", "8"),
        ("#### 18 eggs.", "18"),
        ("9 + 9 = #### 18\nQuestion: next one 5", "18"),
        ("#### Step 1: add\n3 + 4 = 7\nThe answer is 7.", "7"),
        ("The answer is **18**.\n\n#### Check\nAll good.", "18"),
        ("#### 3. Add up\nTotal: 18", "18"),
        ("#### 3 steps of two\nTotal: 18\n#### 18\n#### Step 2", "18"),
        ("It is 7.5.", "7.5"),
        ("#### $.50", "0.5"),
        ("#### 007", "7"),
        ("one of 1, 2, 3", "3"),
        ("#### $1,234.50 each", "1234.50"),
        ("#### 5€", "5"),
        ("#### \N{MINUS SIGN}5", "-5"),
        ("#### -$5", "-5"),
        ("#### -1,000.5", "-1000.5"),
        ("you lose -$3", "-3"),
        ("9 - 5", "5"),
        ("between 3,000-4,000", "4000"),
        ("from 2020\N{EN DASH}2024", "2024"),
        ("<<3*4=12>>12\n#### 12", "12"),
    ],
)
def test_the_final_number(text: str, number: str) -> None:
    assert final_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "none", "####", "-", "$", ".", ",", "#### -", "½"])
def test_text_without_a_number_has_none(text: str) -> None:
    assert final_number(text) is None


NUMBERS = st.decimals(min_value=-(10**12), max_value=10**12, places=2) | st.integers(-(10**15), 10**15).map(Decimal)


@given(
    number=NUMBERS,
    before=st.text(st.characters(exclude_characters="#")),
    unit=st.sampled_from(["", ".", " apples", "%", "\nThat is all.", " kg, of course"]),
    currency=st.sampled_from(["", "$", "€", "£"]),
    separator=st.sampled_from(["", ","]),
    space=st.sampled_from(["", " ", "\n"]),
)
def test_a_number_written_behind_the_mark_is_read_back(
    number: Decimal, before: str, unit: str, currency: str, separator: str, space: str
) -> None:
    sign = "-" if number.is_signed() else ""
    text = f"{before}####{space}{sign}{currency}{abs(number):{separator}}{unit}"
    assert final_number(text) == number


@given(
    numbers=st.lists(st.integers(-(10**6), 10**6), min_size=1), separator=st.sampled_from([" ", "; ", " = ", " is "])
)
def test_without_a_mark_the_last_number_counts(numbers: list[int], separator: str) -> None:
    last = f"so: {numbers[-1]}"
    assert final_number(separator.join([*map(str, numbers[:-1]), last])) == numbers[-1]


@given(st.text("0123456789,.-+$ #", max_size=60))
def test_text_full_of_signs_has_a_finite_number_or_none(text: str) -> None:
    number = final_number(text)
    assert number is None or number.is_finite()
    assert (number is None) or any(c.isdigit() for c in text)


class Parrot:
    """A model that answers what it was told, and remembers what it was asked."""

    def __init__(self, tokenizer: Any, answers: Sequence[str], *, is_encoder_decoder: bool = False) -> None:
        self.tokenizer = tokenizer
        self.answers = list(answers)
        self.asked: list[list[int]] = []
        self.options: list[dict[str, Any]] = []
        self.training = True
        self.modes: list[bool] = []
        self.device = torch.device("cpu")
        self.generation_config = GenerationConfig()
        self.config = PretrainedConfig(is_encoder_decoder=is_encoder_decoder)

    def train(self, mode: bool = True) -> None:
        self.training = mode

    def eval(self) -> None:
        self.train(False)

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> torch.Tensor:
        self.modes.append(self.training)
        self.options.append(options)
        assert (attention_mask[:, -1] == 1).all(), "prompts are padded on the left"
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            self.asked.append(ids[mask.bool()].tolist())
        said, self.answers = self.answers[: len(input_ids)], self.answers[len(input_ids) :]
        new = self.tokenizer(said, return_tensors="pt", padding=True, add_special_tokens=False).input_ids
        new = new.long()  # transformers 4 makes an empty text a tensor of floats
        return new if self.config.is_encoder_decoder else torch.cat([input_ids, new], dim=1)


ROWS = [{"prompt": f"what is {n}?", "completion": f" it is {n} #### {n}"} for n in (1, 22, 333, 4, 5)]
RIGHT = ["#### 1", "22.0", "it is 333 apples", "so #### $4", "5"]


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
@pytest.mark.parametrize("is_encoder_decoder", [False, True])
def test_exact_match_is_the_share_of_right_answers(batch_size: int, is_encoder_decoder: bool) -> None:
    tokenizer = tiny_tokenizer()
    answers = [*RIGHT[:2], "334", "none", RIGHT[4]]
    model = Parrot(tokenizer, answers, is_encoder_decoder=is_encoder_decoder)
    done: list[int] = []
    share = exact_match(model, tokenizer, ROWS, max_new_tokens=7, batch_size=batch_size, on_batch=done.append)
    assert share == 3 / 5
    assert [tokenizer.decode(ids) for ids in model.asked] == [row["prompt"] for row in ROWS]
    assert done[-1] == 5
    assert done == sorted(set(done))
    assert all(options["max_new_tokens"] == 7 and options["do_sample"] is False for options in model.options)


@pytest.mark.parametrize("is_encoder_decoder", [False, True])
def test_labels_are_compared_as_text(is_encoder_decoder: bool) -> None:
    tokenizer = tiny_tokenizer()
    rows = [{"prompt": "result: ", "completion": label} for label in ("neutral", "neutral", "neutral", "answer 1")]
    model = Parrot(tokenizer, [" neutral\n", "neutrally", "", "other 1"], is_encoder_decoder=is_encoder_decoder)
    assert exact_match(model, tokenizer, rows, max_new_tokens=9, batch_size=1, answer="text") == 1 / 4


def test_exact_match_leaves_the_model_as_it_was() -> None:
    for training in (True, False):
        model = Parrot(tiny_tokenizer(), RIGHT)
        model.train(training)
        assert exact_match(model, model.tokenizer, ROWS, max_new_tokens=7, batch_size=2) == 1
        assert not any(model.modes)
        assert model.training is training


def test_a_chat_prompt_starts_with_one_bos() -> None:
    """Llama's template writes the BOS that its tokenizer adds to plain text too."""
    tokenizer = tiny_tokenizer(chat=True, adds=f"{BOS} $A")
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    rows = [{"prompt": [{"role": "user", "content": "7?"}], "completion": [{"role": "assistant", "content": "7"}]}]
    model = Parrot(tokenizer, ["7"])
    exact_match(model, tokenizer, rows, max_new_tokens=7, batch_size=1)
    assert model.asked[0] == tokenizer.apply_chat_template(
        rows[0]["prompt"], add_generation_prompt=True, return_dict=False
    )
    assert model.asked[0].count(tokenizer.bos_token_id) == 1
