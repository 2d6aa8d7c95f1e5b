"""Held-out rows: their losses, answers that a model generates to them, and which answers are right."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerFast

from loraover.common.errors import DataError, EngineError
from loraover.data.word_problems import final_number
from loraover.training.run.answers import greedy_answers
from loraover.training.run.measure import exact_match, example_losses, token_loss

from support.tiny_experts import tiny_moe
from support.tiny_hub import BOS, tiny_tokenizer
from support.tiny_models import tiny_gpt2, tiny_llama, with_lora


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


TOKENS = ["<pad>", "</s>", "\u2581", "\u2581def", ":", "\n", "return", "\u2581x", "\u2581."]
ANSWER = ["\u2581", "\u2581", "\u2581", "\u2581", "return", "\u2581x", "\u2581.", "</s>"]


def as_llama_2s() -> Any:
    """A tokenizer whose decoder drops the first space of a text."""
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    parts = [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")


class Writes(torch.nn.Module):
    """A model that goes on with `ANSWER`."""

    config = PretrainedConfig()
    generation_config = GenerationConfig()
    device = "cpu"

    def generate(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        answer = torch.tensor([[TOKENS.index(token) for token in ANSWER]])
        return torch.cat([input_ids, answer.expand(len(input_ids), -1)], dim=1)


@pytest.mark.parametrize("cleans_up", [False, True])
def test_an_answer_keeps_its_indentation(cleans_up: bool) -> None:
    tokenizer = as_llama_2s()
    tokenizer.clean_up_tokenization_spaces = cleans_up
    answers = greedy_answers(Writes(), tokenizer, ["def :", "def"], max_new_tokens=7, batch_size=2)
    assert answers == ["    return x ."] * 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_give_no_answer(value: float) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[7] = value
    with pytest.raises(EngineError, match="scores of the next token hold NaN or infinity"):
        greedy_answers(model, tiny_tokenizer(), ["what?"], max_new_tokens=2, batch_size=1)


NOT_GREEDY = {
    "repetition_penalty": 9.0,
    "no_repeat_ngram_size": 1,
    "num_beams": 3,
    "suppress_tokens": list(range(20, 60)),
}


@pytest.mark.parametrize("name", NOT_GREEDY)
def test_the_settings_of_a_models_folder_do_not_change_greedy_answers(name: str) -> None:
    tokenizer, inner = tiny_tokenizer(), tiny_llama(seed=3)
    model = with_lora(inner, task_type="CAUSAL_LM")
    ids = tokenizer("what is", return_tensors="pt").input_ids
    for _ in range(12):
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    greedy = tokenizer.decode(ids[0, 7:], skip_special_tokens=True)
    inner.generation_config = own = GenerationConfig(**{name: NOT_GREEDY[name]})
    assert greedy_answers(model, tokenizer, ["what is"], max_new_tokens=12, batch_size=1) == [greedy]
    assert inner.generation_config is own


def test_routers_whose_loss_is_asked_for_do_not_change_answers() -> None:
    """TRL asks a mixture of experts for it during training; it cannot be computed from a cache."""
    tokenizer, model = tiny_tokenizer(), tiny_moe()
    expected = greedy_answers(model, tokenizer, ["what", "why is"], max_new_tokens=4, batch_size=2)
    model.config.output_router_logits = True
    assert greedy_answers(model, tokenizer, ["what", "why is"], max_new_tokens=4, batch_size=2) == expected
    assert model.config.output_router_logits


def test_an_answer_ends_where_the_context_does() -> None:
    """GPT-2 has a learnt embedding for each position, and none beyond."""
    model, tokenizer = tiny_gpt2(), tiny_tokenizer()
    context = model.config.max_position_embeddings
    model.generation_config.eos_token_id = None
    prompts = ["a" * (context - 5), "b", "c" * (context - 1)]
    answers = greedy_answers(model, tokenizer, prompts, max_new_tokens=9, batch_size=2)
    alone = greedy_answers(model, tokenizer, prompts, max_new_tokens=5, batch_size=2)
    assert answers == alone
    with pytest.raises(DataError, match=f"question 4: its {context} tokens leave no room .* context of {context}"):
        greedy_answers(model, tokenizer, [*prompts, "d" * context], max_new_tokens=9, batch_size=4)


VOCABULARY = 11
LABELS = torch.tensor([[-100, 3, 4, 5], [-100, -100, 7, -100]])
INPUTS = torch.tensor([[1, 3, 4, 5], [1, 2, 7, 0]])


class Model(nn.Module):
    """A stand-in whose logits are rows of a table.

    If it is causal, it returns no logits where it is given labels, as under TRL 1.9; if not, it needs them.
    """

    def __init__(self, *, is_encoder_decoder: bool) -> None:
        super().__init__()
        self.config = SimpleNamespace(is_encoder_decoder=is_encoder_decoder)
        self.table = torch.randn(8, VOCABULARY, generator=torch.Generator().manual_seed(0))

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        wants_labels = self.config.is_encoder_decoder
        return SimpleNamespace(logits=self.table[input_ids] if wants_labels == (labels is not None) else None)


@pytest.mark.parametrize("is_encoder_decoder", [False, True], ids=["causal", "encoder-decoder"])
def test_losses_of_examples_are_those_of_their_labelled_tokens(is_encoder_decoder: bool) -> None:
    model = Model(is_encoder_decoder=is_encoder_decoder).train()
    found = example_losses(model, [{"input_ids": INPUTS, "labels": LABELS}])
    shift = 0 if is_encoder_decoder else 1
    logits = model.table.double().numpy()[INPUTS.numpy()]
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for i, one in enumerate(found):
        places = [t for t, label in enumerate(LABELS[i]) if label != -100]
        nats = -sum(logs[i, t - shift, LABELS[i, t]] for t in places)
        assert one.tokens == len(places)
        assert one.nats == pytest.approx(nats, rel=1e-6)
    assert token_loss(found) == pytest.approx(sum(one.nats for one in found) / 4)
    assert model.training


@pytest.mark.parametrize("kind", ["plain", "adapted"])
def test_logits_of_prompts_are_not_computed(kind: str) -> None:
    model: Any = tiny_llama() if kind == "plain" else with_lora(tiny_llama())
    ids = torch.randint(1, 32, (3, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    for row, start in enumerate((7, 9, 11)):
        labels[row, :start] = -100
    sizes = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: sizes.append(output.shape[1]))
    found = example_losses(model, [{"input_ids": ids, "labels": labels}])
    assert sizes == [6]  # the places before tokens 7 to 11, and the last
    logs = torch.log_softmax(model.eval()(input_ids=ids).logits.double(), -1)
    for row, one in enumerate(found):
        places = range(int((labels[row] != -100).nonzero()[0]), 12)
        assert one.nats == pytest.approx(-sum(float(logs[row, t - 1, ids[row, t]]) for t in places), rel=1e-5)
